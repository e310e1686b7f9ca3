"""Figures and tables of the studies of ChunkFT, LOMO and checkpointing by value: every point is a
number of the records."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import checkpointing_figures
import chunkft_figures
import lomo
import lomo_figures
from vramlab.studies.estimates import Figure, NotRun

GIB = 1 << 30


def lab(figures=(), tables=(), **more) -> SimpleNamespace:
    """A study whose figures and tables are these."""
    records = SimpleNamespace(tables=dict(tables), **more.pop("records", {}))
    settings = {"published_gib": 3.5, "quoted_recalled_gib": {"AdamW": 90.0, "LOMO": 50.0}}
    return SimpleNamespace(
        figures=dict(figures),
        records=records,
        plan=SimpleNamespace(settings=settings, pairs=[], **more),
    )


def figure(value: float, spread: float = 0.25, **more) -> Figure:
    return Figure(value, "learned", low=value - spread, high=value + 2 * spread, **more)


def drawn(trace) -> list[tuple]:
    """(x, y, up, down) of points with intervals."""
    return list(zip(trace.x, trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True))


# ChunkFT ------------------------------------------------------------------------------------------


def test_the_count_of_chunks_is_drawn_with_its_intervals_in_three_panels():
    named = {
        "balanced.K=1": figure(0.5),
        "balanced.K=8": figure(0.75),
        "final_loss.K=8": figure(1.5),
        "peak.K=64": figure(13.0),
        "peak.tiny": figure(99.0),
    }
    found = chunkft_figures.count(
        lab({name: one for name, one in named.items() if name != "peak.tiny"})
    )
    assert [drawn(trace) for trace in found.data] == [
        [(1, 0.5, 0.5, 0.25), (8, 0.75, 0.5, 0.25)],
        [(8, 1.5, 0.5, 0.25)],
        [(64, 13.0, 0.5, 0.25)],
    ]
    assert [trace.xaxis for trace in found.data] == ["x", "x2", "x3"] and [
        shape.y0 for shape in found.layout.shapes
    ] == [3.5]


def test_figures_in_words_keep_what_is_not_there_empty():
    named = {
        "a.x": figure(0.5, p_holm=0.0123, seeds=5, n=100, contains="95%"),
        "a.y": Figure(2.0, "computed", "GiB"),
        "b": figure(1.0),
    }
    assert chunkft_figures.table(named, "a.").reset_index().to_dict("records") == [
        {
            "figure": "a.x",
            "value": "0.5 [0.25, 1]",
            "Holm's p": "0.0123",
            "interval": "95%",
            "seeds": 5,
            "items": 100,
            "how": "learned",
        },
        {
            "figure": "a.y",
            "value": "2 GiB",
            "Holm's p": "",
            "interval": "",
            "seeds": "",
            "items": "",
            "how": "computed",
        },
    ]
    assert (
        list(chunkft_figures.table(named, "a.", "b").index) == ["a.x", "a.y", "b"]
        and chunkft_figures.table(named, "c").empty
    )


def test_a_pair_needs_both_its_accuracy_and_its_loss():
    named = {
        "accuracy.one": figure(0.5, p_holm=0.25, seeds=5, n=7),
        "loss.one": figure(2.0, p_holm=0.5),
        "accuracy.two": figure(0.5),
    }
    asked = lab(named)
    asked.plan.pairs = [SimpleNamespace(name=name, equal="tokens") for name in ("one", "two")]
    assert chunkft_figures.pairs(asked).reset_index().to_dict("records") == [
        {
            "pair": "one",
            "equal": "tokens",
            "balanced accuracy, difference": "0.5 [0.25, 1]",
            "Holm's p": "0.25",
            "loss, difference": "2 [1.75, 2.5]",
            "p of loss": "0.5",
            "seeds": 5,
            "items": 7,
        }
    ]
    assert chunkft_figures.pairs(lab()).empty


def test_distances_are_drawn_over_training_for_all_weights_and_by_layer_at_the_end():
    rows = [
        (seed, progress, layer, base + seed)
        for seed in (0, 2)
        for progress, layer, base in (
            (0.5, "all", 1.0),
            (1.0, "all", 3.0),
            (0.5, "head", 7.0),
            (1.0, "head", 5.0),
        )
    ]
    table = pd.DataFrame(rows, columns=["seed", "progress", "layer", "relative"]).assign(
        row="K = 8", against="AdamW"
    )
    found = chunkft_figures.apart(lab(tables={"trajectory": table}))
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in found.data] == [
        ("K = 8 against AdamW", [0.5, 1.0], [2.0, 4.0]),
        ("K = 8 against AdamW", ["all", "head"], [4.0, 6.0]),
    ]


def test_a_budgets_curve_has_its_costs_on_three_axes():
    runs = pd.DataFrame(
        {
            "arm": "budgets",
            "outcome": ["ok", "ok", "failed"],
            "steps": 3,
            "run_id": ["a", "b", "c"],
            "regime": "full",
        }
    )
    steps = pd.DataFrame(
        {
            "run_id": np.repeat(["a", "b", "c"], 3),
            "step": [0, 1, 2] * 3,
            "tokens_seen": [10, 20, 30] * 3,
            "loss": [1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 99.0, 99.0, 99.0],
        }
    )
    cost = pd.DataFrame({"row": ["full", "full"], "step_s": [0.5, 1.5], "updates": [2000, 4000]})
    found = chunkft_figures.budgets(
        lab(tables={"cost": cost}, records={"runs": runs, "steps": steps})
    )
    assert [list(trace.x) for trace in found.data] == [[10, 20, 30], [1, 2, 3], [3, 6, 9]]
    assert all(list(trace.y) == [3.0, 3.0, 3.0] for trace in found.data), (
        "the mean of seeds, then of seven kept steps around each"
    )
    assert not chunkft_figures.budgets(lab(records={"runs": runs, "steps": steps})).data, (
        "no costs, no curves"
    )


def shapes() -> pd.DataFrame:
    ledger = json.dumps(
        {
            "weights": 2 * GIB,
            "activations": GIB // 2,
            "inputs": GIB // 512,
            "cached": GIB,
            "context": GIB,
        }
    )
    return pd.DataFrame(
        [
            {
                "model": "7b",
                "regime": "chunkft",
                "peak_allocated_bytes": 3 * GIB,
                "peak_reserved_bytes": 4 * GIB,
                "host_bytes": GIB // 4,
                "ledger": ledger,
            }
        ]
    )


def test_the_published_budget_beside_ours_in_gib():
    found = chunkft_figures.published_budget(lab(tables={"bytes_shapes": shapes()}))
    assert found.reset_index().to_dict("records") == [
        {
            "forecast": "7b, chunkft",
            "weights": 2.0,
            "published total leaves": 1.5,
            "ours needs": 1.0,
            "peak": 3.0,
            "activations": 0.5,
            "host": 0.25,
        }
    ]
    assert chunkft_figures.published_budget(lab()).empty
    bars = chunkft_figures.budget_7b(
        lab(tables={"bytes_shapes": shapes(), "bytes_peers": shapes().assign(model="13b")})
    )
    assert {(trace.name, *trace.x) for trace in bars.data} == {
        ("weights", 2.0, 2.0),
        ("activations", 0.5, 0.5),
    }
    assert (
        list(bars.data[0].y) == ["7b, chunkft", "13b, chunkft"] and bars.layout.shapes[0].x0 == 3.5
    )


def test_chunkfts_takeaway_is_in_points():
    named = {
        "accuracy.AdamW, equal tokens": figure(-0.013, 0.005),
        "accuracy.AdamW, equal updates": figure(0.02, 0.01),
        "distance.K = 8 against K = 1": figure(0.625),
    }
    words = chunkft_figures.takeaway(lab(named))
    assert (
        "**-1.3 points** [-1.8, -0.3] on equal tokens" in words
        and "**+2.0 points** [+1.0, +4.0] at equal updates" in words
    )
    assert "0.62 times" in words and "not there" in chunkft_figures.takeaway(
        lab(dict(list(named.items())[:2]))
    )


# LOMO ---------------------------------------------------------------------------------------------


def asked(regime: str, peak_gib: float, axes: dict | None = None, **more) -> dict:
    return {
        "reason": "",
        "regime": regime,
        "model": "tiny",
        "phase": "update",
        "peak_allocated_bytes": int(peak_gib * GIB),
        "margin_bytes": -GIB,
        "axes": axes and json.dumps(axes),
        "ledger": json.dumps({"weights": GIB, "gradients": GIB // 100}),
        **more,
    }


def test_a_forecast_of_lomos_study_is_read_with_what_was_asked():
    table = pd.DataFrame(
        [
            asked("master", 8),
            asked("lomo", 2),
            asked("master", 4, {"acts": "checkpoint", "place": "fsdp"}),
            asked("sgd", 3, {"head": "fused", "acts": "keep"}),
            asked("lomo", 9, reason="it cannot"),
        ]
    )
    found = lomo.memory(lab(tables={"published": table}).records, "published")
    assert found[
        ["rule", "checkpointing", "head", "ranks", "peak_gib", "margin_gib", "weights"]
    ].to_dict("split")["data"] == [
        ["AdamW", False, "plain", 1, 8.0, -1.0, 1.0],
        ["LOMO", True, "fused", 1, 2.0, -1.0, 1.0],
        ["AdamW", True, "plain", 8, 4.0, -1.0, 1.0],
        ["SGD", False, "fused", 1, 3.0, -1.0, 1.0],
    ]
    assert lomo.memory(lab().records, "published").empty


def test_the_papers_totals_stand_beside_the_rows_they_are_of():
    table = pd.DataFrame(
        [
            asked("master", 100, {"acts": "checkpoint"}),
            asked("master", 150),
            asked("lomo", 50, {"head": "plain"}),
            asked("lomo", 40),
            asked("sgd", 60, {"acts": "checkpoint"}),
        ]
    )
    named = {
        "adamw_gib": Figure(100.0, "predicted", "GiB"),
        "lomo_gib": Figure(25.0, "predicted", "GiB"),
    }
    bars, shown, words = lomo_figures.bytes_at_7b(lab(named, {"published": table}))
    assert shown["quoted_recalled_gib"].fillna(0).tolist() == [90.0, 0, 50.0, 0, 0]
    assert "**LOMO's peak is 25.0% of AdamW's**" in words and "25 GiB against 100 GiB" in words
    *parts, paper = bars.data
    assert [(trace.name, list(trace.x)) for trace in parts] == [("weights", [1.0] * 5)], (
        "a part below .05 GiB is not drawn"
    )
    assert [value for value in paper.x if value == value] == [90.0, 50.0] and list(paper.y) == list(
        parts[0].y
    ) == [
        "AdamW, checkpointing",
        "AdamW",
        "LOMO, checkpointing",
        "LOMO, checkpointing, fused head",
        "SGD, checkpointing",
    ]
    assert lomo_figures.bytes_at_7b(lab()) == [] == lomo_figures.cards(lab())


def test_one_cards_share_of_eight_ranks_is_told_where_it_is_known():
    tables = {"cards": pd.DataFrame([asked("lomo", 2)])}
    (table,) = lomo_figures.cards(lab((), tables))
    again, words = lomo_figures.cards(lab({"share_of_sharded_adamw": figure(0.125)}, tables))
    assert (
        table["margin_gib"].tolist() == [-1.0] == again["margin_gib"].tolist()
        and "**12.5%**" in words
    )


def test_differences_are_in_points():
    named = {"a_minus_b": figure(-0.03, 0.01, p=0.04, p_holm=0.08, seeds=5, n=100, equal="tokens")}
    assert lomo_figures._differences(lab(named), ["a_minus_b"]).to_dict("records") == [
        {
            "comparison": "a minus b",
            "points": "-3.0",
            "95 %": "-4.0 to -1.0",
            "p": 0.04,
            "p, Holm": 0.08,
            "seeds": 5,
            "n": 100,
            "equal": "tokens",
        }
    ]


@pytest.mark.parametrize(
    ("until", "way"),
    [
        ("step", "none"),
        (None, "none"),
        ({"backward": {}}, "none"),
        ({"backward": {"clip_norm": 1.0}}, "norm, two looks"),
        ({"backward": {"clip_norm": 1.0, "norm": "last"}}, "last norm"),
        ({"backward": {"clip_value": 1.0}}, "by value"),
    ],
)
def test_a_way_of_clipping_is_named_after_its_fields(until, way):
    assert lomo_figures._way(until) == way


def test_ways_of_clipping_stand_beside_none_at_the_same_learning_rates():
    def run(regime: str, lr: float, **clip) -> dict:
        return {
            "regime": regime,
            "lr": lr,
            "params": {"axes": {"until": {"backward": clip}}} if clip else {},
        }

    arms = {
        "clipping": pd.DataFrame(
            [run("lomo", 0.25, clip_norm=1.0), run("lomo", 0.5, clip_value=1.0)]
        ),
        "rates": pd.DataFrame([run("sgd", 0.25), run("sgd", 0.125), run("full", 0.5)]),
    }

    def select(arm: str) -> pd.DataFrame:
        if arm not in arms:
            raise NotRun(arm)
        return arms[arm]

    asked = lab(
        records={"select": select, "balanced": lambda rows, domain: figure(rows["lr"].sum())}
    )
    clipped = [
        ("norm, two looks", [("learning rate 0.25", 0.25, 0.5, 0.25)]),
        ("by value", [("learning rate 0.5", 0.5, 0.5, 0.25)]),
    ]
    (found,) = lomo_figures.clippings(asked)
    assert [(trace.name, drawn(trace)) for trace in found.data] == [
        ("none", clipped[0][1]),
        *clipped,
    ]
    del arms["rates"]
    (found,) = lomo_figures.clippings(asked)
    assert [(trace.name, drawn(trace)) for trace in found.data] == clipped
    del arms["clipping"]
    assert lomo_figures.clippings(asked) == []


def test_step_times_are_medians_in_milliseconds():
    frame = pd.DataFrame(
        {
            "row": ["lomo"] * 3 + ["full"],
            "step_s": 0.1,
            "forward_s": [0.001, 0.002, 0.009, 0.004],
            "backward_s": 0.0256,
            "update_s": 0.5,
        }
    )
    bars, words = lomo_figures.seconds(
        lab({"time_of_plain_hooks": figure(1.5)}, {"seconds": frame})
    )
    assert [(trace.name, list(trace.x)) for trace in bars.data] == [
        ("forward", [2.0, 4.0]),
        ("backward", [25.6] * 2),
        ("update", [500.0] * 2),
    ]
    assert list(bars.data[0].y) == ["lomo", "full"] and "plain hooks 1.50 [1.25, 2.00]" in words
    assert lomo_figures.seconds(lab()) == []


def test_lomos_takeaways_by_value():
    assert "**2 of 5** seeds" in lomo_figures.same(
        lab({"seeds_that_differ": Figure(2.0, "learned", seeds=5)})
    )
    words = lomo_figures.takeaway(
        lab({"lomo_minus_adamw": figure(-0.05, 0.01), "adalomo_minus_adamw": figure(0.01, 0.02)})
    )
    assert (
        "LOMO against AdamW: -5.0 points [-6.0, -3.0]; AdaLomo against AdamW: +1.0 points [-1.0,"
        " +5.0]" in words
    )


# Checkpointing ------------------------------------------------------------------------------------


def test_counted_peaks_are_drawn_in_mib_over_tokens():
    rows = [
        ("full, keep", 128, 3),
        ("full, keep", 64, 1.5),
        ("full, checkpoint", 64, 0.5),
        ("mixed, keep", 64, 2),
    ]
    table = pd.DataFrame(
        [
            {"row": row, "seq": seq, "peak_bytes": int(mib * (1 << 20)), "reason": ""}
            for row, seq, mib in rows
        ]
    )
    found = checkpointing_figures.bytes_by_length(lab(tables={"bytes": table}))
    assert [(trace.name, trace.xaxis, list(trace.x), list(trace.y)) for trace in found.data] == [
        ("keep", "x", [64, 128], [1.5, 3.0]),
        ("checkpoint", "x", [64], [0.5]),
        ("keep", "x2", [64], [2.0]),
    ]
    assert checkpointing_figures.bytes_by_length(lab()) is None
