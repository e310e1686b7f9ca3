"""The study's families, quotes, counts and stalls."""

from __future__ import annotations

import pandas as pd
import pytest

import regimes as study
import regimes_figures
from vramlab.regimes import updates
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_regimes, read_row

ROWS = read_regimes()
STUDY = study.read_study()


def test_every_row_is_in_exactly_one_family_and_every_quote_is_of_a_row():
    placed = [row for family in STUDY.families.values() for row in (*family.shown, *family.rest)]
    assert sorted(placed) == sorted(ROWS) and set(STUDY.quotes) <= set(ROWS)
    assert {quote.by for quote in STUDY.quotes.values()} <= {"authors", "library", "third party"}
    assert all(
        len(text) <= 50 for quote in STUDY.quotes.values() for text in (quote.figure, quote.of)
    ), "a table cuts it"


def test_the_notebook_has_a_chapter_for_every_family():
    text = (study.REGIMES_FILE.parents[1] / "notebooks" / "studies" / "regimes.ipynb").read_text()
    for key, family in STUDY.families.items():
        assert text.count(f'chapters.show(\\"{key}\\")') == 1 and f"## {family.title}\\n" in text


def test_chapters_are_what_was_asked_for():
    assert STUDY.chapters(["no_backward"]) == {"no_backward": ["mezo"]}
    assert STUDY.chapters(rows=["chunkft", "badam", "dora"]) == {
        "leaves": ["badam", "chunkft"],
        "adapters": ["dora"],
    }
    assert sum(map(len, STUDY.chapters(rows=["all"]).values())) == len(ROWS)
    with pytest.raises(ValueError, match="families has leafs; there are dense, lifetime"):
        STUDY.chapters(["leafs"])
    with pytest.raises(ValueError, match="rows has badm; there are all, full"):
        STUDY.chapters(rows=["badm"])


@pytest.mark.parametrize(
    ("name", "mean", "least", "most"),
    [
        ("full", 1000, 1000, 1000),
        ("lomo", 1000, 1000, 1000),
        ("mezo", 1000, 1000, 1000),
        ("zero_shot", 0, 0, 0),
        ("lora", 0, 0, 0),
        ("approx_literal", 0, 0, 0),
        ("chunkft_128", 1000 / 128, 7, 8),
        ("chunkft", 125, 125, 125),
    ],
)
def test_updates_are_counted_from_parts_and_schedule(name, mean, least, most):
    found = updates.updates(model_spec("tiny"), ROWS[name])
    assert (found.least, found.most) == (least, most) and found.mean == pytest.approx(
        mean, rel=0.02
    )
    assert (found.added > 0) is (name in ("lora", "approx_literal"))


def test_updates_of_blocks_are_steps_times_the_blocks_share():
    """tiny: five equal blocks; embeddings, head and final norm rest in BAdam and train always in
    LISA."""
    spec = model_spec("tiny")
    hidden, inner, words, blocks = (
        spec.config.hidden_size,
        spec.config.intermediate_size,
        spec.config.vocab_size,
        spec.config.num_hidden_layers,
    )
    block, ends = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden, 2 * words * hidden + hidden
    badam = updates.updates(spec, ROWS["badam"])
    assert (
        badam.mean == 1000 * block / (blocks * block + ends)
        and badam.least == 0
        and badam.most == 200
    )
    lisa = updates.updates(spec, ROWS["lisa"])
    assert lisa.mean == 1000 * (2 * block + ends) / (blocks * block + ends) and lisa.most == 1000
    assert updates.updates(
        spec, ROWS["lora"]
    ).added == 8 * blocks * (  # A (8, in) and B (out, 8) of the five Linears
        2 * hidden + 4 * hidden + 3 * (hidden + inner)
    )


def test_storage_is_bf16_unless_the_row_is_about_storage():
    asked = {name: study.storage(row) for name, row in ROWS.items()}
    assert asked["lomo"] == asked["lora"] == "bf16"
    assert not any(
        asked[name] for name in ("full", "mixed", "master", "bf16", "bf16_sr", "qlora", "int8_lora")
    )


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("galore", {0: "new projection", 10: "new projection"}),
        ("badam", {0: "switch", 10: "switch"}),
        ("full", {}),
        ("approx_residual", {0: "anchor", 8: "anchor"}),
        ("approx_literal", {0: "probe", 10: "probe"}),
        ("approx_identity", {}),
    ],
)
def test_the_steps_that_are_unlike_the_others_are_told(name, marked):
    row = study.hurried(ROWS[name])
    parts = 32 if name == "badam" else 1
    assert {step: what for step in range(16) if (what := study.event(row, step, parts))} == marked


def test_a_stall_is_compared_with_the_steps_after_it():
    times = [
        9.0,
        1,
        1,
        1,
        6,
        2,
        2,
        2,
        12,
        4,
        4,
        4,
    ]  # a turn's own pace doubles; its first step is three times it
    frame = pd.DataFrame(
        {"row": "x", "step": range(12), "step_s": times, "event": ["switch", "", "", ""] * 3}
    )
    assert regimes_figures.stall_words(frame) == [
        "`x`, switch: 3.00 times as long as the steps after it (median of 2)."
    ]
    always = frame.assign(event="switch")
    assert regimes_figures.stall_words(always) == ["`x`: switch at every step, 1000 to 12000 ms."]


def test_stalls_are_real_steps_of_rows_that_have_some():
    frame = study.stalls(["lomo", "hift"], steps=3, progress=False)
    assert (
        frame["row"].tolist() == ["hift"] * 3
        and (frame["step_s"] > 0).all()
        and (frame["event"] == "switch").all()
    )
    assert list(study.stalls(["lomo"], progress=False).columns) == list(frame.columns)


def test_a_far_limit_is_told_and_a_near_one_is_drawn():
    cell = {
        "ledger": {"weights": 2**30},
        "requested_bytes": 2**30,
        "host_bytes": 0,
        "weights": "bf16",
        "card": "A",
        "cards": {"a": {"reserved_bytes": 2**30, "allocated_bytes": 2**30}},
    }
    counts = {"x": updates.Updates(1000.0, 1000, 1000, 0)}
    for limit, drawn in ((2, [2, 2]), (9, [None, None])):
        figure = regimes_figures.ledger({"x": {**cell, "capacity_bytes": limit * 2**30}}, counts)
        line = next(trace for trace in figure.data if trace.name.startswith("limit"))
        assert list(line.x) == drawn and ("off the scale" in line.name) is (drawn[0] is None)


def test_the_takeaway_tells_the_least_and_the_least_that_updates_everything():
    cells = {
        name: {"cards": {"a": {"allocated_bytes": size * 2**30, "reserved_bytes": size * 2**30}}}
        for name, size in (("badam", 2), ("lomo", 3), ("full", 9))
    }
    counts = {
        "badam": updates.Updates(20.0, 0, 40, 0),
        "lomo": updates.Updates(1000.0, 1000, 1000, 0),
        "full": updates.Updates(1000.0, 1000, 1000, 0),
    }
    said = regimes_figures.takeaway(cells, counts)
    assert (
        said.startswith("**badam** needs least of the 3 rows drawn, 2.0 GiB")
        and "is **lomo**, 3.0 GiB" in said
    )
    assert "as often as can be" in regimes_figures.takeaway({"lomo": cells["lomo"]}, counts)


def test_storage_types_are_told_apart_by_the_row_itself():
    row = read_row("new", {"weights": "int8", "trains": "lora"})
    assert study.storage(row) == ""
