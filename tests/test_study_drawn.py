"""What the studies' chapters draw and say, worked out by hand from records made by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import checkpointing_figures
import chunkft_figures
import lomo_figures
import readme_pictures as pictures
from test_study_figures import drawn, figure, lab
from vramlab.studies.estimates import Figure, NotRun

GIB = 1 << 30


def placed(found) -> list[tuple]:
    """(name, axis, x, y, whether it is in the legend) of each trace."""
    return [
        (trace.name, trace.xaxis, list(trace.x), list(trace.y), trace.showlegend)
        for trace in found.data
    ]


# checkpointing ------------------------------------------------------------------------------------


def forecast(
    acts: str,
    seq: int,
    gib: float,
    model: str = "m",
    regime: str = "lora",
    weights: str = "bf16",
    flops: float = 4.0,
    **ledger: float,
) -> dict:
    return {
        "model": model,
        "regime": regime,
        "weights": weights,
        "seq": seq,
        "axes": json.dumps({"acts": acts}),
        "reason": "",
        "peak_allocated_bytes": gib * GIB,
        "phase": f"phase of {acts}",
        "flops": flops,
        "host_bytes": 0,
        "ledger": json.dumps({name: size * GIB for name, size in ledger.items()}),
        "phase_flops": json.dumps({"forward": 1.0}),
    }


def predicted(*rows: dict):
    return lab(tables={"forecast_7b": pd.DataFrame(list(rows))})


def test_step_times_are_drawn_with_their_repeats_and_told_at_the_longest_row():
    table = pd.DataFrame(
        {
            "row": ["full, checkpoint", "full, checkpoint", "full, keep", "bf16, checkpoint"],
            "seq": [1024, 512, 512, 512],
            "reason": "",
            "step_s": 1.0,
        }
    )
    named = {
        "step time, checkpoint of keep, 512": figure(1.5),
        "step time, checkpoint of keep, 1024": figure(2.0),
        "step time, bf16, checkpoint of keep, 512": figure(3.0),
    }
    asked = lab(named, {"seconds": table})
    found = checkpointing_figures.seconds_by_length(asked)
    assert placed(found) == [
        ("checkpoint", "x", [512, 1024], [1.5, 2], True),
        ("checkpoint", "x2", [512], [3], False),
    ]
    assert [one[2:] for one in drawn(found.data[0])] == [(0.5, 0.25)] * 2 and list(
        found.layout.xaxis.tickvals
    ) == [512, 1024]
    assert "takes **2 [1.75, 2.5]** as long at 1024 tokens" in checkpointing_figures.time_words(
        asked
    )
    assert (
        checkpointing_figures.time_words(lab()) == ""
        and checkpointing_figures.seconds_by_length(lab()) is None
    )


def test_forecasts_of_one_model_that_name_their_weights_are_drawn_in_gib():
    asked = predicted(
        forecast("checkpoint", 512, 2),
        forecast("keep", 512, 3),
        forecast("keep", 256, 1),
        forecast("keep", 64, 9, "n"),
        forecast("keep", 64, 9, weights=""),
    )
    found = checkpointing_figures.forecast_by_length(asked, "m")
    assert placed(found) == [
        ("keep", "x", [256, 512], [1, 3], True),
        ("checkpoint", "x", [512], [2], True),
    ]
    assert [note.text for note in found.layout.annotations][0] == "lora, bf16"
    assert checkpointing_figures.forecast_by_length(asked, "other") is None
    assert pictures.PICTURES["checkpointing"](
        predicted(forecast("keep", 64, 2, "baichuan2-7b"))
    ).data[0].y == (2,)


def test_what_checkpointing_lowers_and_why_not():
    rows = [
        forecast("keep", 64, 100, weights_=98, inputs=1, buffers=0.99, cached=50),
        forecast("checkpoint", 64, 99, flops=5),
        forecast("keep", 128, 100, optimizer=1),
        forecast("checkpoint", 128, 99.5),
        forecast("keep", 256, 9),
        forecast("keep", 64, 10, regime="bf16", a=1),
        forecast("checkpoint", 64, 10, regime="bf16", flops=6),
        forecast("keep", 32, 10, regime="bf16", a=1),
        forecast("checkpoint", 32, 5, regime="bf16"),
    ]
    asked = predicted(*rows)
    table = checkpointing_figures.lowered(asked)
    assert table.to_dict("split")["data"] == [
        ["m", "bf16", 32, 10, 5, True, "phase of keep", "a 1.00", 1],
        ["m", "bf16", 64, 10, 10, False, "phase of keep", "a 1.00", 1.5],
        ["m", "lora", 64, 100, 99, True, "phase of keep", "weights_ 98.00, inputs 1.00", 1.25],
        ["m", "lora", 128, 100, 99.5, False, "phase of keep", "optimizer 1.00", 1],
    ]
    assert (
        checkpointing_figures.why_not(asked)
        == "* `m`, bf16: lower from 32 tokens on; at 64 tokens its peak is a 1.00.\n"
        "* `m`, lora: lower from 64 tokens on; at 128 tokens its peak is optimizer 1.00."
    )
    alike = predicted(forecast("keep", 64, 10), forecast("checkpoint", 64, 10))
    assert (
        checkpointing_figures.why_not(alike)
        == "* `m`, lora: lower at no length asked for; at 64 tokens its peak is ."
    )
    lower = predicted(forecast("keep", 64, 10), forecast("checkpoint", 64, 5))
    assert checkpointing_figures.why_not(lower) == "* `m`, lora: lower from 64 tokens on."
    more = predicted(
        *rows,
        forecast("keep", 128, 10, regime="bf16"),
        forecast("checkpoint", 128, 2, regime="bf16"),
    )
    assert (
        checkpointing_figures.bytes_words(more)
        == "At 128 tokens checkpointing leaves **20%** of the peak of m, bf16, and 100% of that of"
        " m, lora; of 5 forecasts it is lower in 3, at 1.00 to 1.50 times the FLOPs (predicted)."
    )
    assert checkpointing_figures.bytes_words(lab()) == ""


def test_exactness_precision_and_lost_updates_in_words(monkeypatch):
    def exact(weights: float, losses: float):
        return lab(
            {
                "runs whose weights differ": Figure(weights, "learned", "of 3 runs"),
                "runs whose losses differ": Figure(losses, "learned", "of 3 runs"),
            }
        )

    words = checkpointing_figures.exact_words
    assert (
        words(exact(0, 0))
        == "Keeping less changed the weights in **0** of 3 runs, and a loss in 0: scores with"
        " checkpointing are those without it."
    )
    assert words(exact(1, 0)).endswith("a loss in 0: it is not exact here.") and words(
        exact(1, -1)
    ).endswith("without it.")
    assert words(lab()) == ""
    family = {
        "a": figure(0.01, p_holm=0.05),
        "b": figure(-0.03, p_holm=0.049),
        "c": figure(0.02, p_holm=0.01),
    }
    for shown, end in (
        (family, "more than chance are 2 of 3 differences: b; c."),
        ({name: family[name] for name in "ab"}, "more than chance is 1 of 2 differences: b."),
        ({"a": family["a"]}, "more than chance are 0 of 1 differences."),
    ):
        monkeypatch.setattr(checkpointing_figures, "differences", lambda lab, shown=shown: shown)
        said = checkpointing_figures.precision_words(lab())
        assert (
            said.endswith(end)
            and ("**-3.0** points at most (b)" if "b" in shown else "**+1.0** points at most (a)")
            in said
        )
    assert checkpointing_figures.answer(exact(0, 0)) == f"{words(exact(0, 0))} {said}"
    monkeypatch.setattr(checkpointing_figures, "differences", lambda lab: {})
    assert checkpointing_figures.answer(lab()) == ""
    its = checkpointing_figures.updates_lost(
        lab({"updates lost in bf16": figure(0.123456), "other": figure(1)})
    )
    assert its.values.tolist() == [["updates lost in bf16", 0.1235]]
    compared = checkpointing_figures.compared(
        {
            "a": Figure(
                0.12345,
                "learned",
                low=-0.01234,
                high=0.25,
                p_holm=0.03125,
                n=7,
                seeds=5,
                equal="tokens",
            )
        }
    )
    assert compared.values.tolist() == [["a", 12.35, -1.23, 25, 0.0312, 7, 5, "tokens"]]
    rows = pd.DataFrame(
        [
            ("full", "checkpoint", 2, True, False),
            ("full", "checkpoint", 2, False, False),
            ("bf16", "x", 3, True, True),
        ],
        columns=["regime", "acts", "steps", "losses", "weights"],
    )
    monkeypatch.setattr(checkpointing_figures, "changed", lambda records: rows)
    assert checkpointing_figures.exactness(lab()).reset_index().values.tolist() == [
        ["full", "checkpoint", 2, 2, 1, 0],
        ["bf16", "x", 3, 1, 1, 1],
    ]


def test_scores_stand_by_place_and_training_domain(monkeypatch):
    monkeypatch.setattr(
        checkpointing_figures,
        "trained",
        lambda lab: [("full", "news", 0), ("base", "law", 0), ("full", "law", 0)],
    )
    monkeypatch.setattr(
        checkpointing_figures, "places", lambda records, rows: [("none", 0, 0), ("far", 0, 0)]
    )
    named = {
        f"{regime}: {place}": figure(value)
        for value, regime, place in (
            (0.5, "full, news", "none"),
            (0.75, "full, news", "far"),
            (0.25, "base, law", "none"),
            (1, "base, law", "far"),
            (0.125, "full, law", "none"),
            (0.375, "full, law", "far"),
        )
    }
    found = checkpointing_figures.scores(lab(named))
    assert placed(found) == [
        ("full", "x", pytest.approx([-0.21, 0.79]), [0.5, 0.75], True),
        ("base", "x2", pytest.approx([0.21, 1.21]), [0.25, 1], True),
        ("full", "x2", pytest.approx([-0.21, 0.79]), [0.125, 0.375], False),
    ]
    assert [one[2:] for one in drawn(found.data[0])] == [(0.5, 0.25)] * 2 and list(
        found.data[0].customdata
    ) == ["none", "far"]
    assert list(found.layout.xaxis2.tickvals) == [0, 1] and [
        note.text for note in found.layout.annotations
    ][:2] == ["trained on news", "trained on law"]
    assert {shape.y0 for shape in found.layout.shapes} == {0.5}


# LOMO ---------------------------------------------------------------------------------------------


def test_learning_rates_are_drawn_over_the_middle_of_those_tried(monkeypatch):
    table = pd.DataFrame(
        [
            ("AdamW", 0.125, True, 1.23456, 0.5),
            ("AdamW", 0.5, False, 2.0, 0.75),
            ("LOMO", 3.0, True, 3.0, 0.25),
        ],
        columns=["rule", "lr", "best", "loss", "runs"],
    )
    monkeypatch.setattr(lomo_figures, "rates", lambda lab: table)
    asked = lab(
        {"a_minus_b": figure(0.5), "rate_drop_x": figure(0.25), "other": figure(1)},
        records={"balanced": lambda runs, domain: figure(runs, seeds=5, n=7)},
    )
    bars, shown, compared = lomo_figures.learning_rates(asked)
    assert [
        (trace.name, trace.mode, *np.round(drawn(trace), 9).tolist()) for trace in bars.data
    ] == [
        ("LOMO", "lines+markers", [1, 0.25, 0.5, 0.25]),
        ("AdamW", "lines+markers", [0.5, 0.5, 0.5, 0.25], [2, 0.75, 0.5, 0.25]),
    ]
    assert shown.values.tolist()[0] == ["AdamW", 0.125, True, 1.2346, "0.5 [0.25, 1]", 5, 7]
    assert compared["comparison"].tolist() == ["a minus b", "rate drop x"]
    monkeypatch.setattr(lomo_figures, "rates", lambda lab: table.iloc[:0])
    assert lomo_figures.learning_rates(asked) == []


def test_comparisons_are_those_named_before_the_runs():
    asked = lab({"a_b": figure(0.5), "other": figure(1)})
    asked.plan.pairs = [SimpleNamespace(name="a b"), SimpleNamespace(name="not run")]
    assert (
        lomo_figures.comparisons(asked)[0]["comparison"].tolist() == ["a b"]
        and lomo_figures.comparisons(lab()) == []
    )


def test_half_types_are_told_apart_by_their_scale():
    rows = pd.DataFrame(
        [
            {"value": value, "params": {"axes": {"weights": weights, "until": {"backward": scale}}}}
            for value, weights, scale in (
                (0.25, "bf16", {}),
                (0.5, "fp16", {"loss_scale": 8}),
                (0.75, "fp16", {}),
            )
        ]
    )
    records = {
        "select": lambda arm: rows,
        "balanced": lambda its, domain: figure(its["value"].sum()),
    }
    (bars,) = lomo_figures.halves(lab(records=records))
    assert [(trace.name, *drawn(trace)) for trace in bars.data] == [
        ("bf16", ("bf16", 0.25, 0.5, 0.25)),
        ("fp16, loss scaled", ("fp16, loss scaled", 0.5, 0.5, 0.25)),
        ("fp16", ("fp16", 0.75, 0.5, 0.25)),
    ]
    _, table, words = lomo_figures.halves(
        lab(
            {
                "fp16_against_bf16": figure(0.5),
                "hooks_under_scaler": figure(65536.0),
                "ours_under_scale": figure(1.00006),
            },
            records=records,
        )
    )
    assert table["comparison"].tolist() == ["fp16 against bf16"]
    assert "moved the weights **65,536** times too far" in words and "was 1.0001 times" in words
    assert len(lomo_figures.halves(lab({"hooks_under_scaler": figure(1.0)}, records=records))) == 1

    def nothing(arm: str):
        raise NotRun(arm)

    assert lomo_figures.halves(lab(records={"select": nothing})) == []


def test_ledgers_stand_in_a_panel_an_arm_with_one_legend():
    def step(regime: str, **ledger: float) -> dict:
        return {
            "reason": "",
            "regime": regime,
            "model": "tiny",
            "phase": "update",
            "peak_allocated_bytes": GIB,
            "margin_bytes": None,
            "axes": None,
            "ledger": json.dumps({name: size * GIB for name, size in ledger.items()}),
        }

    tables = {
        "published": pd.DataFrame(
            [step("lomo", weights=1, gradients=0.04), step("sgd", weights=2, inputs=0.25)]
        ),
        "one_row": pd.DataFrame([step("lomo", weights=3)]),
    }
    bars, *rest = lomo_figures.bytes_at_7b(lab(tables=tables))
    names = ["LOMO, checkpointing, fused head", "SGD"]
    assert [one for one in placed(bars) if "paper" not in one[0]] == [
        ("weights", "x", [1, 2], names, True),
        ("inputs", "x", [0, 0.25], names, True),
        ("weights", "x2", [3], names[:1], False),
    ]
    assert (
        len(rest) == 2 and "quoted_recalled_gib" in rest[0] and "quoted_recalled_gib" not in rest[1]
    )
    alone = lomo_figures.bytes_at_7b(lab(tables={"one_row": tables["one_row"]}))
    assert [trace.name for trace in alone[0].data] == ["weights"]
    assert placed(pictures.PICTURES["lomo"](lab(tables={"one_row": tables["one_row"]}))) == placed(
        alone[0]
    )


def test_lomos_words_where_runs_are_missing():
    assert "not there" in lomo_figures.same(lab()) and "not there" in lomo_figures.takeaway(lab())


# ChunkFT ------------------------------------------------------------------------------------------


def test_budgets_are_of_whole_finished_runs_of_two_arms_once_each():
    rows = [
        ("budgets", "ok", 3, "a"),
        ("peers", "ok", 3, "a"),
        ("peers", "ok", 2, "short"),
        ("other", "ok", 3, "o"),
        ("peers", "ok", 3, "b"),
    ]
    runs = pd.DataFrame(rows, columns=["arm", "outcome", "steps", "run_id"]).assign(
        regime=["x", "x", "x", "x", "y"]
    )
    steps = pd.DataFrame(
        [
            (run, at, 10 * at, {"a": at, "b": 5}.get(run, 99))
            for run in ("a", "short", "o", "b")
            for at in range(9)
        ],
        columns=["run_id", "step", "tokens_seen", "loss"],
    )
    cost = pd.DataFrame({"row": ["x", "y"], "step_s": [2.0, 3.0], "updates": [500, 1000]})
    found = chunkft_figures.budgets(
        lab(tables={"cost": cost}, records={"runs": runs, "steps": steps})
    )
    assert [
        (trace.name, trace.xaxis, list(trace.x)[:2], trace.showlegend) for trace in found.data
    ] == [
        ("x", "x", [0, 10], True),
        ("x", "x2", [2, 4], False),
        ("x", "x3", [0.5, 1], False),
        ("y", "x", [0, 10], True),
        ("y", "x2", [3, 6], False),
        ("y", "x3", [1, 2], False),
    ]
    assert list(found.data[0].y) == [
        1.5,
        2,
        2.5,
        3,
        4,
        5,
        5.5,
        6,
        6.5,
    ], "three before and three after, fewer at the ends"


def test_intervals_are_drawn_by_their_length(monkeypatch):
    steps = pd.DataFrame(
        {"run_id": ["a", "a", "b"], "step": [0, 1, 0], "tokens_seen": 1, "loss": [1.0, 3.0, 5.0]}
    )
    arms = {1: pd.DataFrame({"run_id": ["a"]}), 4: pd.DataFrame({"run_id": ["b"]})}
    monkeypatch.setattr(
        chunkft_figures,
        "by_chunks",
        lambda lab, arm, field: arms if (arm, field) == ("interval",) * 2 else {},
    )
    found = chunkft_figures.intervals(lab(records={"steps": steps}))
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in found.data] == [
        ("T = 1", [0, 1], [2, 2]),
        ("T = 4", [0], [5]),
    ]


def test_no_records_no_marks():
    assert not chunkft_figures.apart(lab()).data
    assert not any(len(trace.x) for trace in chunkft_figures.count(lab()).data)


def test_parts_of_a_200th_of_a_gib_or_less_are_left_out():
    rows = pd.DataFrame(
        [
            {
                "model": "7b",
                "regime": "x",
                "peak_allocated_bytes": GIB,
                "peak_reserved_bytes": GIB,
                "host_bytes": 0,
                "ledger": json.dumps(
                    {"weights": 0.005 * GIB, "inputs": 0.005 * GIB, "buffers": 0.0051 * GIB}
                ),
            }
        ]
    )
    found = chunkft_figures.budget_7b(lab(tables={"bytes_peers": rows}))
    assert [(trace.name, *trace.x, *trace.y) for trace in found.data] == [
        ("buffers", 0.0051, "7b, x")
    ]
    table = chunkft_figures.published_budget(lab(tables={"bytes_shapes": rows}))
    assert "inputs" not in table and table["buffers"].tolist() == [0.01]
