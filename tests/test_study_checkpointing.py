"""The study of checkpointing: its own functions, by hand and by law."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import checkpointing
import checkpointing_figures
from checkpointing import FULL, KEEP, label
from vramlab.studies.records import Records

GIB, PLAN = checkpointing.GIB, SimpleNamespace(pairs=(), settings={"scoring": "yesno"})
EMPTY = {name: pd.DataFrame() for name in ("runs", "items", "calls", "accuracy", "steps", "probes")}


def _lab(**frames):
    lab = SimpleNamespace(plan=PLAN, records=Records(**{**EMPTY, "tables": {}, **frames}))
    lab.figures = checkpointing.figures(lab)
    return lab


@pytest.mark.parametrize(
    "axes, words",
    [
        ("{}", KEEP),
        ("", KEEP),
        ({"acts": "selective"}, "selective"),
        ({"acts": {"checkpoint": {"every": 2}}}, "checkpoint every 2"),
        (json.dumps({"acts": {"checkpoint": {"offload": True}}}), "checkpoint offload"),
    ],
)
def test_labels(axes, words):
    assert label(axes) == words


def test_a_study_without_runs_has_no_figure_and_breaks_nothing():
    lab = _lab()
    assert lab.figures == {} and checkpointing_figures.answer(lab) == ""
    for chapter in ("exactness", "lowered", "why_not", "updates_lost"):
        assert not len(getattr(checkpointing_figures, chapter)(lab))
    for chapter in ("bytes_by_length", "seconds_by_length", "scores"):
        assert getattr(checkpointing_figures, chapter)(lab) is None
    assert checkpointing_figures.forecast_by_length(lab, "baichuan2-7b") is None


def _runs(*rows):
    names = ("arm", "regime", "axes", "seed", "run_id", "weights_hash")
    alike = {
        "outcome": "ok",
        "train_domain": "news",
        "steps": 2,
        "train_items": 40,
        "item_set": "x",
    }
    return pd.DataFrame(
        [{**dict(zip(names, row, strict=True)), **alike, "params": {}} for row in rows]
    )


def test_a_changed_bit_is_found_only_beside_its_own_precision_and_seed():
    kept, less = json.dumps({"acts": KEEP}), json.dumps({"acts": FULL})
    runs = _runs(
        ("exact", "full", kept, 0, "a", "h1"),
        ("exact", "full", less, 0, "b", "h1"),
        ("exact", "bf16", kept, 0, "c", "h2"),
        ("exact", "bf16", less, 0, "d", "other"),
        ("exact", "full", less, 1, "e", "h9"),
    )
    losses = {
        "a": [2.0, 1.0],
        "b": [2.0, np.nextafter(1.0, 2)],
        "c": [2.0, 1.5],
        "d": [2.0, 1.5],
        "e": [2.0, 1.0],
    }
    steps = pd.DataFrame(
        [{"run_id": run, "loss": loss} for run, its in losses.items() for loss in its]
    )
    found = checkpointing.changed(Records(**{**EMPTY, "runs": runs, "steps": steps}, tables={}))
    assert found[["regime", "weights", "losses"]].values.tolist() == [
        ["full", False, True],
        ["bf16", True, False],
    ]


def _forecast(acts, seq, peak_gib, activations_gib, again, host_gib=0.0):
    ledger = {
        "optimizer": (peak_gib - activations_gib) * GIB,
        "activations": activations_gib * GIB,
        "cached": 9 * GIB,
    }
    return {
        "model": "m",
        "regime": "lora",
        "weights": "bf16",
        "seq": seq,
        "axes": json.dumps({"acts": acts}),
        "reason": "",
        "peak_allocated_bytes": peak_gib * GIB,
        "ledger": json.dumps(ledger),
        "phase": "backward",
        "host_bytes": host_gib * GIB,
        "flops": 3.0 + again,
        "phase_flops": json.dumps({"forward": 1.0, "backward": 2.0, "recompute": again}),
    }


def test_forecasts_by_hand():
    every, host = {"checkpoint": {"every": 2}}, {"checkpoint": {"offload": True}}
    seven = pd.DataFrame(
        [
            _forecast(KEEP, 512, 20, 0, 0),
            _forecast(FULL, 512, 20, 0, 0.8),
            _forecast(KEEP, 1024, 40, 20, 0),
            _forecast(FULL, 1024, 30, 10, 0.8),
            _forecast(every, 1024, 34, 14, 0.4),
        ]
    )
    lab = _lab(
        tables={
            "forecast_7b": seven,
            "forecast_host": pd.DataFrame([_forecast(host, 1024, 27, 7, 0.8, host_gib=3)]),
        }
    )
    found = {name: figure.value for name, figure in lab.figures.items()}
    assert (
        found["m lora, checkpoint of keep, 512"] == 1
        and found["m lora, activations at the peak, 512"] == 0
    )
    assert (
        found["m lora, checkpoint of keep, 1024"] == 0.75
        and found["m lora, activations at the peak, 1024"] == 0.5
    )
    assert found["m lora, checkpoint every 2 saves of checkpoint, 1024"] == pytest.approx(0.6)
    assert found["m lora, checkpoint every 2 computes of checkpoint, 1024"] == pytest.approx(0.5)
    assert found["m lora, checkpoint computes again, 1024"] == pytest.approx(0.8)
    assert (
        found["m lora, checkpoint offload of checkpoint, 1024"] == 0.9
        and found["m, blocks' inputs on the host, 1024"] == 3
    )
    assert all(figure.kind == "predicted" for figure in lab.figures.values())
    assert checkpointing_figures.lowered(lab)["lower"].to_list() == [False, True]
    why = "* `m`, lora: lower from 1,024 tokens on; at 512 tokens its peak is optimizer 20.00."
    assert checkpointing_figures.why_not(lab) == why
    assert "leaves **75%** of the peak of m" in checkpointing_figures.answer(lab)


def test_an_update_below_bf16s_last_bit_is_lost_and_one_above_is_not():
    moved = {
        (regime, lr): checkpointing.lost("tiny", "smoke", "news", regime, lr)["moved"].item()
        for regime in ("full", "bf16")
        for lr in (1e-6, 1e-1)
    }
    assert moved["full", 1e-6] > 0 and moved["bf16", 1e-6] < 0.1 * moved["full", 1e-6]
    assert moved["bf16", 1e-1] > 0.9 * moved["full", 1e-1]
