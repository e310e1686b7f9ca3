"""Cards, and an atlas that is held against them, by hand: no step is traced."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vramlab.allocator.settings import Settings
from vramlab.cards import Card, read_cards
from vramlab.forecast import card_summary as summary
from vramlab.forecast import chart_table, kept_answers
from vramlab.forecast import chart_worlds as worlds
from vramlab.forecast.chart import Atlas
from vramlab.timeline.events import any_block

GIB = 2**30


def _card(**changes) -> Card:
    sizes = {
        "total_gib": 24.0,
        "context_mib": 512.0,
        "bf16_tflops": 1.0,
        "fp32_tflops": 1.0,
        "gb_per_s": 1.0,
        "host_gb_per_s": 1.0,
    }
    return Card(
        **{"key": "k", "name": "K", "compute_capability": (8, 0), "source": {}, **sizes, **changes}
    )


def test_a_cards_bytes():
    made = _card(total_gib=1.5, context_mib=256.5)
    assert (made.total_bytes, made.context_bytes, made.capacity_bytes) == (
        1610612736,
        268959744,
        1341652992,
    )
    sizes = [card.total_gib for card in read_cards().values()]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3


@pytest.mark.parametrize(
    "name", ["total_gib", "bf16_tflops", "fp32_tflops", "gb_per_s", "host_gb_per_s"]
)
def test_a_cards_figures_are_above_nothing_and_a_billion_at_most(name):
    for value in (1e-9, 1e9):
        assert getattr(_card(context_mib=0, **{name: value}), name) == value
    for value in (0, -1, 0.99e-9, 1.01e9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"card k: {name} is {value}"):
            _card(context_mib=0, **{name: value})


def test_a_context_leaves_something_of_the_card():
    assert (
        _card(total_gib=1, context_mib=1023).capacity_bytes == 2**20
        and _card(context_mib=0).context_bytes == 0
    )
    for value in (-1, 1024, 1025):
        with pytest.raises(ValueError, match=f"context_mib is {value}"):
            _card(total_gib=1, context_mib=value)


# an atlas as a table and as text ------------------------------------------------------------------


def _held(margin: float, fits: bool = True) -> dict:
    return {"margin_bytes": int(margin * GIB), "fits": fits}


def _cell(name: str, seq: int = 8, **more) -> dict:
    return {
        "model": "m",
        "name": name,
        "regime": name,
        "weights": "bf16",
        "seq": seq,
        "batch": 2,
        "reason": "",
        "phase": "update",
        "requested_bytes": 7,
        "host_bytes": 3,
        **more,
    }


CONTENT = {
    "kind": "predicted",
    "cards": {"a": {"capacity_bytes": 5}, "b": {"capacity_bytes": 6}},
    "cells": [
        _cell("full", cards={"a": _held(-1.5, False), "b": _held(0.0)}),
        _cell("lomo", cards={"a": _held(-0.25), "b": _held(2.26)}),
        _cell("full", 16, reason="Error: no"),
    ],
}


def test_the_table_has_a_row_a_cell_and_card_and_one_for_what_failed():
    frame = chart_table.table(CONTENT)
    assert frame.loc[:3, ["name", "seq", "card", "capacity_bytes", "reason"]].values.tolist() == [
        ["full", 8, "a", 5, ""],
        ["full", 8, "b", 6, ""],
        ["lomo", 8, "a", 5, ""],
        ["lomo", 8, "b", 6, ""],
    ]
    assert len(frame) == 5 and frame.loc[4].dropna().to_dict() == {
        "kind": "predicted",
        "model": "m",
        "name": "full",
        "regime": "full",
        "weights": "bf16",
        "seq": 16,
        "batch": 2,
        "reason": "Error: no",
    }
    assert frame["fits"].tolist()[:4] == [False, True, True, True] and set(frame["kind"]) == {
        "predicted"
    }
    assert set(frame.loc[:3, "requested_bytes"]) == {7} and set(frame.loc[:3, "host_bytes"]) == {3}


def test_the_text_has_a_margin_a_card_and_a_mark_where_it_does_not_just_fit():
    assert chart_table.to_text(CONTENT).splitlines()[1:] == [
        "",
        "m, 2 x 8 tokens",
        f"{'':<20}{'a':>11}{'b':>11}",
        f"{'full':<20}{'-1.5!':>11}{'+0.0 ':>11}",
        f"{'lomo':<20}{'-0.2*':>11}{'+2.3 ':>11}",
        "",
        "m, 2 x 16 tokens",
        f"{'':<20}{'a':>11}{'b':>11}",
        f"{'full':<20}Error: no",
    ]


def test_an_answer_is_kept_with_all_that_it_depends_on(tmp_path, monkeypatch):
    path, params, made = tmp_path / "mine.yml", tmp_path / "params", []
    (params / "models").mkdir(parents=True)
    files = [params / name for name in ("regimes.yml", "cards.yml", "models/tiny.yml")]
    for file in (path, *files):
        file.write_text("a: 1\n")
    monkeypatch.setattr(kept_answers, "ROOT", tmp_path)
    monkeypatch.setattr(kept_answers, "FORECASTS", tmp_path / "kept" / "deep")

    def answers(content: dict = {}) -> int:  # noqa: B006
        """How many answers have been computed."""
        kept_answers.recall_or_compute(
            "atlas", path.read_bytes(), lambda: made.append(1) or {**CONTENT, **content}
        )
        return len(made)

    good = {"cells": CONTENT["cells"][:2]}
    assert answers() == 1 and answers() == 2, "a cell failed"
    assert answers({**good, "worlds": [{"reason": "no"}]}) == 3, "a world failed"
    assert answers({**good, "worlds": [{"reason": ""}]}) == 4 == answers()
    for count, file in enumerate((path, *files), 5):
        before = file.read_text()
        file.write_text("a: 2\n")
        assert answers(good) == count == answers(), file
        file.write_text(before)
    assert answers() == 8
    monkeypatch.setattr(kept_answers.importlib.metadata, "version", lambda _: "another")
    assert answers(good) == 9


def test_a_world_is_one_row_a_rank_and_keeps_what_a_stack_needs(monkeypatch):
    seen = []

    def chart_cells(questions, kept, *how):
        seen.append((questions, kept, how))
        return [
            {"name": "fsdp", "curve": 1, "ledger": {"weights": question.world}}
            for question in questions
        ]

    monkeypatch.setattr(worlds, "chart_cells", chart_cells)
    asked = Atlas(
        "a",
        ("tiny", "llama-7b"),
        (8,),
        (4,),
        allocators=("expandable_segments:True",),
        worlds=(1, 8),
        world_seq=64,
    )
    found = worlds.chart_worlds(asked, None, False, 3)
    ((questions, kept, how),) = seen
    assert [(q.model, q.regime, q.seq, q.batch, q.world, q.weights) for q in questions] == [
        (model, "fsdp", 64, 1, world, "") for model in ("tiny", "llama-7b") for world in (1, 8)
    ]
    assert how == (False, 3) and kept.allocators == () and kept.cache_dir is None
    assert found == [
        {"world": world, "name": "fsdp", "ledger": {"weights": world}} for world in (1, 8, 1, 8)
    ]
    assert worlds.chart_worlds(Atlas("a", ("tiny",), (8,), (1,)), None) == []


# a trace against cards ----------------------------------------------------------------------------


def _rows(*rows) -> pd.DataFrame:
    frame = pd.DataFrame(
        rows, columns=["event", "storage", "bytes", "category", "module", "op", "phase"]
    )
    return frame.assign(stream=0)


ROWS = _rows(
    ("alloc", 1, 100, "weights", "layers.0", "x", "init"),
    ("alloc", 2, 40, "workspace", "", "aten.mm.default", "init"),
    ("alloc", 3, 30, "activations", "layers.1.mlp", "mm", "forward"),
    ("free", 3, 30, "activations", "layers.1.mlp", "mm", "forward"),
    ("alloc", 4, 50, "activations", "layers.0.mlp", "mm", "backward"),
    ("free", 4, 50, "activations", "layers.0.mlp", "mm", "update"),
)


def _traced(reported: slice, alive: dict | None = None, peak_bytes: int = 190):
    events = {name: ROWS[name].to_numpy() for name in ("event", "storage", "bytes", "stream")}
    return SimpleNamespace(
        reported=reported,
        device_rows=lambda: ROWS,
        events=events,
        alive=alive or {},
        peak_bytes=peak_bytes,
        architecture=(8, 0),
    )


def test_the_curve_is_of_the_reported_step_by_category():
    found = summary._curve(_traced(slice(2, 6)), ROWS)
    assert found == {
        "share": [0.0, 25.0, 50.0, 75.0],
        "phase": ["forward", "forward", "backward", "update"],
        "bytes": {"weights": [100] * 4, "workspace": [40] * 4, "activations": [30, 0, 50, 0]},
    }
    assert set(summary._curve(_traced(slice(0, 2)), ROWS)["bytes"]) == {
        "weights",
        "workspace",
    }, "what is nowhere is left out"


def test_a_thinned_curve_keeps_the_highest_of_each_bin(monkeypatch):
    monkeypatch.setattr(summary, "POINTS", 2)
    found = summary._curve(
        _traced(slice(1, 6)), ROWS
    )  # of five events three fall into the first bin
    assert found["share"] == [20.0, 60.0] and found["phase"] == ["forward", "backward"]
    assert found["bytes"]["activations"] == [30, 50]


def test_groups_are_one_for_all_blocks_largest_first():
    alive = {
        ("layers.0.mlp", "weights", "mm"): 5,
        ("layers.12.mlp", "weights", "mm"): 6,
        ("layers.0.mlp", "weights", "add"): 20,
        ("layer2", "gradients", "mm"): 1,
    }
    assert summary._groups(_traced(slice(0, 6), alive), 2) == [
        {"category": "weights", "module": "layers.*.mlp", "op": "add", "bytes": 20},
        {"category": "weights", "module": "layers.*.mlp", "op": "mm", "bytes": 11},
    ]
    assert any_block("a.10.b2.3") == "a.*.b2.*"


def test_without_a_group_the_peak_and_its_phase():
    alive = {
        ("layers.0.mlp", "activations", "mm"): 50,
        ("layers.0", "weights", "x"): 100,
        ("", "workspace", "aten.mm.default"): 40,
    }
    found = {
        group["category"]: (group["bytes"], group["peak_bytes"], group["peak_phase"])
        for group in summary._counterfactuals(_traced(slice(2, 6), alive), ROWS)
    }
    assert found == {
        "weights": (100, 90, "backward"),
        "activations": (50, 140, "forward"),
        "workspace": (40, 150, "backward"),
    }


def test_only_the_workspaces_of_products_become_the_cards(monkeypatch):
    product = sorted(summary._PRODUCTS)[0]
    rows = _rows(
        ("alloc", 1, 8, "workspace", "", product, "init"),
        ("alloc", 2, 8, "workspace", "", "attention", "init"),
        ("alloc", 3, 8, "weights", "", product, "init"),
        ("alloc", 4, 7, "workspace", "", product, "init"),
    )
    monkeypatch.setattr(
        summary, "matrix_workspace_bytes", lambda architecture: 8 if architecture == (8, 0) else 32
    )
    traced = SimpleNamespace(
        events={"bytes": rows["bytes"].to_numpy(), "stream": 5},
        architecture=(8, 0),
        device_rows=lambda: rows,
    )
    hopper = summary.events_for(traced, rows, (9, 0))
    assert hopper["bytes"].tolist() == [32, 8, 8, 7] and hopper["stream"] == 5
    assert summary.events_for(traced, rows, (8, 0))["bytes"].tolist() == [8, 8, 8, 7]


def _simulated(reserved, allocated=(1, 2, 9), oom=None, retries=0):
    return SimpleNamespace(
        allocated_bytes=np.array(allocated),
        reserved_bytes=np.array(reserved),
        oom=oom,
        num_alloc_retries=retries,
        peak_reserved_bytes=max(reserved),
    )


def test_a_second_simulation_is_made_only_where_its_outcome_is_open(monkeypatch):
    """A card of 10 bytes; the step is the second of three events."""
    ends = []

    def simulate(events, settings, capacity_bytes, total_bytes):
        ends.append((capacity_bytes, total_bytes))
        return _simulated([3, 8, 8], oom=outcome, retries=4)

    monkeypatch.setattr(summary, "simulate", simulate)
    card, traced = (
        SimpleNamespace(capacity_bytes=10, total_bytes=12),
        _traced(slice(1, 2), peak_bytes=10),
    )

    def on_card(reserved, text=""):
        return summary._on_card(
            traced, {}, _simulated(reserved, retries=0), Settings.parse(text), card
        )

    outcome = None
    assert on_card([5, 10, 10]) == {
        "allocated_bytes": 2,
        "reserved_bytes": 10,
        "fits": True,
        "retries": 0,
        "margin_bytes": 0,
    }
    assert (
        on_card([5, 7, 10])["reserved_bytes"] == 7 and on_card([8, 7, 10])["reserved_bytes"] == 8
    ), "up to the step's end"
    assert not ends
    assert on_card([5, 11, 11]) == {
        "allocated_bytes": 2,
        "reserved_bytes": 11,
        "fits": True,
        "retries": 4,
        "margin_bytes": -1,
    }
    assert ends == [(10, 12)]
    collects = "garbage_collection_threshold:0.8,per_process_memory_fraction:0.9"
    assert on_card([5, 11, 11], collects)["reserved_bytes"] == 8
    outcome = "out of memory"
    assert [on_card([5, 11, 11], text)["reserved_bytes"] for text in ("", collects)] == [11, 11]
    assert on_card([5, 11, 11])["fits"] is False
    ends.clear()
    traced.peak_bytes = 11
    assert on_card([5, 11, 11]) == {
        "allocated_bytes": 2,
        "reserved_bytes": 11,
        "fits": False,
        "retries": 0,
        "margin_bytes": -1,
    }
    assert not ends, "more is asked for than there is"
