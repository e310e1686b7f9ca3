"""A number that is not finite ends the run where it appears: a result of its own, which no figure
and no score has part in."""

from __future__ import annotations

import json
import math
import shutil

import pandas as pd
import pytest
import torch

from conftest import SMALL
from micro import batch, model, ranks
from vramlab.cli import main
from vramlab.regimes.regime import read_regimes, read_row
from vramlab.report import tables
from vramlab.report import takeaways as words
from vramlab.report.page import build
from vramlab.runs import learning, preparation
from vramlab.runs.execute import execute
from vramlab.runs.folder import RETRY, read_runs
from vramlab.runs.parameters import KNOWN_PARAMETERS
from vramlab.runs.sweep import read_sweep
from vramlab.studies import runner
from vramlab.studies.plan import StudyCell
from vramlab.training.trainer import Diverged, Schedule, Trainer

REGIMES = read_regimes()
TRAINED = [name for name in REGIMES if name != "zero_shot"]


def spoil(trainer: Trainer, value: float) -> None:
    """From now on a gradient of a block's leaf has one number that is not finite; the loss of the
    step knows nothing of it."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    next(
        leaf for name, leaf in trainer.active.items() if "layers" in name and leaf.dim() > 1
    ).register_hook(hook)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"rule": "sgd", "head": "fused"},
        {"until": "backward", "rule": "sgd"},
        {"weights": "bf16_sr"},
        {"trains": "lora"},
        {"trains": {"blocks": {"interval": 9}}},
        {"clip": 1.0},
        {"place": "fsdp"},
        {"rule": "adam8bit"},
        {"rule": "adafactor"},
        {"place": "host_state"},
        {"until": {"backward": {"clip_norm": 0.5}}, "rule": "sgd"},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_found_at_its_step(row, value):
    regime = read_row("row", row)
    with ranks(regime):
        trainer = Trainer(model(), regime, Schedule(1e-2, 9))
        assert trainer.check(trainer.step([batch(0)])) > 0
        if row.get("place") == "fsdp":  # no hook may change a sharded gradient: here its update
            with torch.no_grad():
                next(iter(trainer.active.values())).to_local().view(-1)[0] = value
            with pytest.raises(Diverged) as raised:
                trainer.check(torch.tensor(1.0))
            assert raised.value.step == 0
            return
        spoil(trainer, value)
        loss = trainer.step([batch(1)])
        with pytest.raises(
            Diverged,
            match="step 1 left weights that are not finite though its loss of .* is: a gradi",
        ) as raised:
            trainer.check(loss)
        assert math.isfinite(float(loss)) and (raised.value.step, raised.value.quantity) == (
            1,
            "weights",
        )


@pytest.mark.parametrize("name", TRAINED)
def test_every_row_is_found_out_by_its_loss_or_weights(name):
    """A weight that every forward reads is nan before the second step."""
    with ranks(REGIMES[name]):
        trainer = Trainer(model(), REGIMES[name], Schedule(1e-3, 4))
        trainer.check(trainer.step([batch(0)]))
        norm = next(p for n, p in trainer.model.named_parameters() if n.endswith("norm.weight"))
        with torch.no_grad():
            (norm.to_local() if hasattr(norm, "to_local") else norm).fill_(math.nan)
        with pytest.raises(Diverged, match="the loss of step 1 is nan: use a lower lr") as raised:
            trainer.check(trainer.step([batch(1)]))
        assert (raised.value.step, raised.value.quantity) == (1, "loss")


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A sweep's folder with a run that ended ok and one whose learning rate is absurd."""
    folder = tmp_path_factory.mktemp("runs")
    quick = {**SMALL, "measure": False}
    execute({**quick, "regime": "full"}, folder / "full-0", progress=False)
    execute({**quick, "regime": "sgd", "lr": 1e30}, folder / "sgd-0", progress=False)
    return folder


def test_a_run_that_diverges_is_a_result_with_its_step(diverged):
    result = json.loads((diverged / "sgd-0" / "result.json").read_text())
    step = result["diverged"]["step"]
    assert (
        result["outcome"] == "diverged"
        and result["diverged"]["what"] in ("loss", "weights")
        and 0 <= step < SMALL["steps"]
    )
    assert f"step {step}" in result["reason"] and "use a lower lr" in result["reason"]
    assert not {"weights_hash", "speed", "loss_last", "peak"} & set(result)
    assert not [
        path.name for path in (diverged / "sgd-0").iterdir() if path.suffix in (".parquet", ".part")
    ]


def test_it_is_in_the_reports_first_lines_and_in_no_figure(diverged):
    runs = read_runs(diverged)
    first = words.takeaways(runs)[0]
    assert first.startswith("1 of 2 runs did not finish: sgd (diverged: ") and "step" in first
    assert list(tables.summary(runs).set_index("regime").loc["sgd"].dropna().index) == [
        "outcome",
        "reason",
    ]
    for frame in (
        tables.accuracy(runs),
        tables.recalls(runs),
        tables.ledger(runs),
        tables.against_reference(runs),
    ):
        assert "sgd" not in frame.to_string()
    page = build(diverged).read_text()
    assert page.index("sgd (diverged: ") < page.index("<h2")


def test_a_sweep_keeps_it_and_runs_it_again_only_when_told(diverged, tmp_path, capsys):
    file = tmp_path / "s.yml"
    file.write_text("grid:\n  regime: [sgd]\n")
    cell = read_sweep(file, tmp_path / "out")[2][0]
    shutil.copytree(diverged / "sgd-0", cell.folder)
    assert {retry for retry, outcomes in RETRY.items() if "diverged" in outcomes} == {
        "diverged",
        "all",
    }
    for retry, state in (
        (None, "diverged"),
        ("failed", "diverged"),
        ("oom", "diverged"),
        ("diverged", "due"),
        ("all", "due"),
    ):
        main(
            [
                "sweep",
                str(file),
                "--out",
                str(tmp_path / "out"),
                "--dry-run",
                "--json",
                *(["--retry", retry] if retry else []),
            ]
        )
        assert json.loads(capsys.readouterr().out)["cells"][0]["state"] == state
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--no-report", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["cells"][0]["outcome"] == "diverged"


def test_scores_that_are_not_finite_are_not_scores(tmp_path, monkeypatch):
    def score(*_):
        return pd.DataFrame({"yesno": [0.5, math.inf], "likelihood": [-1.0, -2.0]})

    monkeypatch.setattr("vramlab.runs.evaluate.score", score)
    execute({**SMALL, "measure": False}, tmp_path / "r", progress=False)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "diverged" and result["diverged"] == {
        "step": SMALL["steps"] - 1,
        "what": "scores",
    }
    assert (
        not (tmp_path / "r" / "scores.parquet").exists()
        and not (tmp_path / "r" / "accuracy.parquet").exists()
    )


def test_a_studys_measurement_that_diverges_is_not_tried_again(tmp_path, monkeypatch):
    def diverge(*_):
        raise Diverged(3, "loss", "the loss of step 3 is nan")

    monkeypatch.setattr(runner, "_measure", diverge)
    cell = StudyCell("arm", {"seed": 0}, call="module:function")
    assert "the loss of step 3 is nan" in runner.run_cell((tmp_path, cell))
    assert json.loads((tmp_path / cell.name / "result.json").read_text())["outcome"] == "diverged"
    assert runner.due([(tmp_path, cell)]) == []


def test_the_learning_pass_stops_at_the_step(monkeypatch):
    steps = []

    class Once(Trainer):
        def step(self, *given):
            steps.append(self.steps_done)
            return super().step(*given) * (math.inf if self.steps_done == 2 else 1.0)

    monkeypatch.setattr(preparation, "Trainer", Once)
    prepared = preparation.prepare({**KNOWN_PARAMETERS, **SMALL, "lr": 1e-3}, progress=False)
    with pytest.raises(Diverged, match="the loss of step 1 is inf"):
        learning.learn(prepared, progress=False)
    assert steps == [0, 1]
