"""What was asked is resolved in one place: a run, its forecast, what would have fitted and a study
mean the same row and model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vramlab.allocator.settings import Settings
from vramlab.forecast import what_fits as fitting
from vramlab.forecast.forecast import Question, forecast
from vramlab.regimes.parameters import model_spec, row_of, run_row, run_spec
from vramlab.runs.parameters import KNOWN_PARAMETERS, resolve

CHANGED = {
    "weights": "bf16",
    "axes": {"acts": "checkpoint", "clip": 0.5},
    "config": {"norm_head": False, "num_hidden_layers": 3},
}
ASKED = [
    {},
    *({name: value} for name, value in CHANGED.items()),
    CHANGED,
    {**CHANGED, "regime": "qlora", "axes": {}},
    {"weights": "bf16", "axes": {"weights": "bf16_sr"}, "regime": "lomo"},
]


@pytest.mark.parametrize(
    ("regime", "weights", "axes", "stored"),
    [
        ("full", "", {}, "fp32"),
        ("full", "bf16", {}, "bf16"),
        ("qlora", "", {}, "nf4"),
        ("qlora", "bf16", {}, "bf16"),
        ("bf16", "master", {}, "master"),
        ("qlora", "bf16", {"weights": "int8"}, "int8"),
        ("master", "", {"weights": "fp32"}, "fp32"),
    ],
)
def test_what_was_asked_for_wins_over_the_row_and_an_axis_over_the_storage_type(
    regime, weights, axes, stored
):
    assert row_of(regime, weights, axes).values["weights"] == stored


@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_run_forecast_study_and_notebook_mean_the_same_row_and_model(changes):
    params = {**KNOWN_PARAMETERS, **changes}
    question, row = Question.of_run(params), run_row(params)
    assert question.row.axes() == row.axes() == resolve(changes)["regime_row"]
    assert (question.row.clip, question.seq, question.batch) == (
        row.clip,
        params["max_length"],
        params["batch_size"],
    )
    assert question.spec.fingerprint() == run_spec(params).fingerprint()
    assert row_of(params["regime"], params["weights"], params["axes"]).axes() == row.axes()


def test_a_changed_config_is_another_forecast_and_changes_its_bytes():
    questions = [
        Question.of_run({**KNOWN_PARAMETERS, "config": config}, seq=32)
        for config in ({}, CHANGED["config"])
    ]
    assert len({question.key() for question in questions}) == 2 and questions[0] == Question(
        "tiny", "full", 32, 16
    )
    whole, cut = (forecast(question, cache_dir=None).ledger["weights"] for question in questions)
    parameters = [
        sum(map(lambda name: getattr(question.spec.config, name), ("num_hidden_layers",)))
        for question in questions
    ]
    assert parameters == [5, 3] and whole - cut == 2 * 4 * (4 * 96**2 + 3 * 96 * 192 + 2 * 96)


def test_what_would_have_fitted_keeps_axes_config_and_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fitting,
        "asked_apart",
        lambda question, capacity_bytes: asked.append((question, capacity_bytes)) or [],
    )
    params = {**KNOWN_PARAMETERS, **CHANGED, "regime": "mixed", "max_length": 64, "batch_size": 2}
    assert fitting.evidence(params, {"capacity_bytes": 7}) == {"capacity_bytes": 7, "would_fit": []}
    ((question, capacity_bytes),) = asked
    assert (
        capacity_bytes == 7
        and question.row.axes() == run_row(params).axes()
        and question.row.clip == 0.5
    )
    assert question.spec.fingerprint() == run_spec(params).fingerprint()
    for _, changed, _ in fitting.changes(question, Settings()):
        kept = dataclasses.replace(changed, seq=64, batch=2, axes=question.axes)
        assert kept == question and {
            **json.loads(question.axes),
            **json.loads(changed.axes),
        } == json.loads(changed.axes)
    rungs = fitting.ladder(question)
    assert rungs and all(
        rung.config == question.config and json.loads(rung.axes) == CHANGED["axes"]
        for rung in rungs
    )
    assert ("bf16", "adam8bit") in [(rung.weights, rung.regime) for rung in rungs]


def test_a_rung_that_what_was_asked_for_excludes_says_why():
    rungs = fitting.ladder(Question("tiny", "galore", 16, 1, "bf16", axes='{"clip": 1.0}'))
    lomo = next(rung for rung in rungs if rung.regime == "lomo")
    answer = fitting._answer("lomo", lomo, Settings(), fitting.limited(1 << 20), None)
    assert answer["fits"] is None and "clip" in answer["reason"] and rungs[0].row.clip == 1.0


def test_a_model_that_is_not_there_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"no model 'baichuan2-7' \(did you mean baichuan2-7b\?\).*llama-7b"
    ):
        model_spec("baichuan2-7")
