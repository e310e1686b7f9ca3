"""The report's forecasts, planner and claims by value, from contents made by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest

import planner_reference as plan
from vramlab.report import claims_page, forecast_figures
from vramlab.report import forecast_tables as forecasts
from vramlab.report.forecast_tables import GIB, MOST_CELLS, Forecasts
from vramlab.studies.claims import NOT_REPRODUCED, REPRODUCED, UNTESTED
from vramlab.studies.estimates import Figure, by_seed, ratio_by_seed, share, two_level

CARDS = {
    "a": {"name": "A", "capacity_bytes": 8 * GIB},
    "b": {"name": "B", "capacity_bytes": 16 * GIB},
}


def cell(**changes) -> dict:
    held = {
        "a": {
            "allocated_bytes": 9 * GIB,
            "reserved_bytes": 10 * GIB,
            "margin_bytes": -2 * GIB,
            "fits": False,
        },
        "b": {
            "allocated_bytes": 9 * GIB,
            "reserved_bytes": 10 * GIB,
            "margin_bytes": 6 * GIB,
            "fits": True,
        },
    }
    groups = [
        {"category": "weights", "module": "model.layers.0.mlp.up", "bytes": 3 * GIB},
        {"category": "weights", "module": "model.layers.0.mlp.down", "bytes": 2 * GIB},
        {"category": "gradients", "module": "lm_head", "bytes": GIB},
    ]
    without = [
        {
            "module": "model.norm",
            "category": "weights",
            "op": "aten.mm.default",
            "bytes": GIB,
            "peak_bytes": 5 * GIB,
            "peak_phase": "update",
        }
    ]
    return {
        "model": "m",
        "regime": "full",
        "name": "full",
        "seq": 8,
        "batch": 2,
        "reason": "",
        "phase": "backward",
        "cards": held,
        "requested_bytes": 8 * GIB,
        "host_bytes": 3 * GIB // 2,
        "groups": groups,
        "without": without,
        "allocators": [],
        "ledger": {"weights": 6 * GIB, "gradients": 2 * GIB},
    } | changes


def made(*cells: dict, **more) -> Forecasts:
    return Forecasts({"cards": CARDS, "cells": list(cells), **more})


def test_tables_of_forecasts_are_in_gib():
    content = made(
        cell(),
        cell(name="lost", reason="no"),
        cell(regime="lora", name="lora", ledger={"weights": GIB}),
    )
    first = forecasts.atlas_table(content).iloc[0].to_dict()
    assert first == {
        "name": "full",
        "model": "m",
        "seq": 8,
        "batch": 2,
        "peak_allocated_GiB": 9,
        "peak_reserved_GiB": 10,
        "phase": "backward",
        "host_GiB": 1.5,
        "A": "lacks 2.0",
        "B": "fits +6.0",
        "reason": "",
    }
    assert forecasts.atlas_table(content)["reason"].tolist() == ["", "no", ""]
    assert forecasts.curve_table(content).drop(columns=["cell", "phase"]).values.tolist() == [
        [8, 6, 2],
        [8, 1, 0],
    ]
    assert forecasts.peak_table(content).iloc[0].to_dict() == {
        "cell": "full, 2 × 8 tokens",
        "module": "norm",
        "category": "weights",
        "made_by": "mm",
        "GiB": 1,
        "peak_GiB": 8,
        "phase": "backward",
        "without_it_GiB": 5,
        "then_in": "update",
    }
    assert forecasts.place_label(("m", 8, 2)) == "m, 2 × 8 tokens"


@pytest.mark.parametrize(
    ("fits", "margin", "words"),
    [
        (True, 0.0, "fits +0.0"),
        (True, -0.01, "fits flushing"),
        (False, -10.0, "lacks 10"),
        (False, -9.96, "lacks 10.0"),
        (False, -0.26, "lacks 0.3"),
        (False, 0.0, "does not fit"),
        (False, 1.0, "does not fit"),
    ],
)
def test_an_outcome_in_words(fits, margin, words):
    assert forecasts.verdict({"fits": fits, "margin_bytes": margin * GIB}) == words


def test_places_are_shown_whole_as_long_as_there_is_room_and_one_always():
    many = [cell(regime=f"r{at}", batch=1) for at in range(MOST_CELLS + 1)]
    assert len(made(*many, cell()).detailed) == MOST_CELLS + 1
    two = [*many[: MOST_CELLS - 1], cell(), cell(seq=9)]
    assert len(made(*two).detailed) == MOST_CELLS and made(*two).detailed[0]["regime"] == "full"
    assert (
        len(made(*many[: MOST_CELLS - 1], cell(), cell(regime="x"), cell(seq=9)).detailed)
        == MOST_CELLS - 1
    )


def test_a_setting_is_tried_where_the_request_itself_fits():
    tried = [
        {
            "allocator": "x:1",
            "label": "l",
            "cards": {key: {"reserved_bytes": 7 * GIB, "fits": True} for key in CARDS},
        }
    ]
    frame = forecasts.allocator_table(made(cell(allocators=tried)))
    assert frame[
        ["card", "default_GiB", "reserved_GiB", "by_default", "with_it"]
    ].values.tolist() == [["A", 10, 7, "does not fit", "fits"], ["B", 10, 7, "fits", "fits"]]
    assert forecasts.allocator_table(made(cell(allocators=tried, requested_bytes=8 * GIB + 1)))[
        "card"
    ].tolist() == ["B"]


def test_a_settings_bars_are_of_one_place_and_card_beside_the_default_and_the_limit():
    def tried(*gib: int) -> list[dict]:
        return [
            {
                "allocator": f"{name}:1",
                "label": "l",
                "cards": {
                    key: {"reserved_bytes": (size + more) * GIB, "fits": True}
                    for more, key in enumerate(CARDS)
                },
            }
            for name, size in zip("xy", gib, strict=True)
        ]

    found = forecast_figures.allocators(
        made(
            cell(allocators=tried(5, 6)),
            cell(name="lora", allocators=tried(3, 4)),
            cell(seq=9, allocators=tried(7, 7)),
        )
    )
    assert [button.label for button in found.layout.updatemenus[0].buttons] == [
        "A: 2 × 8 tokens",
        "B: 2 × 8 tokens",
        "A: 2 × 9 tokens",
        "B: 2 × 9 tokens",
    ]
    assert [(trace.name.split(" (")[0], list(trace.x), list(trace.y)) for trace in found.data][
        :12
    ] == [
        ("default", ["full", "lora"], [10, 10]),
        ("x:1", ["full", "lora"], [5, 3]),
        ("y:1", ["full", "lora"], [6, 4]),
        ("limit: A", ["full", "lora"], [8, 8]),
        ("default", ["full", "lora"], [10, 10]),
        ("x:1", ["full", "lora"], [6, 4]),
        ("y:1", ["full", "lora"], [7, 5]),
        ("limit: B", ["full", "lora"], [16, 16]),
        ("default", ["full"], [10]),
        ("x:1", ["full"], [7]),
        ("y:1", ["full"], [7]),
        ("limit: A", ["full"], [8]),
    ]
    assert [trace.visible for trace in found.data] == [True] * 4 + [False] * 12


def test_parts_and_what_moved_by_hand():
    one, other = (
        cell(),
        cell(
            name="lora",
            regime="lora",
            requested_bytes=5 * GIB,
            groups=[
                {"category": "weights", "module": "model.layers.3.mlp.up", "bytes": 4 * GIB},
                {"category": "activations", "module": "", "bytes": GIB},
            ],
        ),
    )
    assert forecasts.parts(one) == {
        ("weights", "mlp"): 5 * GIB,
        ("gradients", "head"): GIB,
        ("rest", ""): 2 * GIB,
    }
    assert forecasts.parts(other) == {
        ("weights", "mlp"): 4 * GIB,
        ("activations", "loss and step"): GIB,
    }
    frame = forecasts.moved(one, other)
    assert frame[["category", "from_GiB", "to_GiB", "moved_GiB"]].values.tolist()[0] == [
        "rest",
        2,
        0,
        -2,
    ]
    assert sorted(map(tuple, frame[["category", "moved_GiB"]].values.tolist()[1:])) == [
        ("activations", 1),
        ("gradients", -1),
        ("weights", -1),
    ]
    almost = cell(
        name="y",
        regime="y",
        groups=[
            {**group, "bytes": group["bytes"] + (at == 0) * GIB // 128}
            for at, group in enumerate(one["groups"])
        ],
    )
    frame = forecasts.moved_table(made(other, almost, one))
    assert frame["from"].unique().tolist() == ["full"] and frame["to"].unique().tolist() == ["lora"]
    assert set(frame["tokens"]) == {"2 × 8"} and len(frame) == 4
    assert list(forecasts.moved_table(made(one))) == ["from", "to"]


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("model.layers.0.mlp.up", "mlp"),
        ("model.norm", "norms"),
        ("", "loss and step"),
        ("model.embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("model.layers.0", "blocks"),
    ],
)
def test_the_part_of_a_module(module, part):
    assert forecasts.part(module) == part


def test_the_smallest_world_that_fits_each_card_and_the_worlds_table():
    def rank(world: int, *fits: bool) -> dict:
        return cell(name="fsdp", world=world) | {
            "cards": {
                key: {**held, "fits": fit}
                for (key, held), fit in zip(cell()["cards"].items(), fits, strict=True)
            }
        }

    lost = {**rank(2, True, True), "reason": "no"}
    content = made(
        worlds=[rank(1024, True, True), rank(1, False, False), rank(8, False, True), lost]
    )
    assert forecasts.smallest_worlds(content) == [
        "m, the smallest of the worlds 1, 8, 1,024 whose ranks fit: A 1,024; B 8."
    ]
    assert forecasts.smallest_worlds(made(worlds=[rank(1, False, True)]))[0].endswith(
        "A none; B 1."
    )
    first = forecasts.worlds_table(content).iloc[0]
    assert (
        first["tokens_a_rank"],
        first["peak_requested_GiB"],
        first["peak_reserved_GiB"],
        first["weights_GiB"],
    ) == (16, 8, 10, 6)


# the planner --------------------------------------------------------------------------------------

KNOWN = {
    "cards": {"c": {"capacity_bytes": 100}, "d": {"capacity_bytes": 80}},
    "cells": [
        {"model": "m", "name": "full", "seq": seq, "batch": batch, "cards": {"c": held, "d": held}}
        for seq, batch, held in (
            (10, 1, (41, 60, True)),
            (20, 1, (60, 100, True)),
            (10, 2, (50, 101, True)),
            (20, 2, (150, 200, False)),
        )
    ],
}


@pytest.mark.parametrize(
    ("card", "seq", "batch", "verdict", "allocated", "reserved"),
    [
        ("c", 20, 1, "fits", 60, 100),
        ("c", 10, 2, "may fit", 50, 101),
        ("c", 20, 2, "lacks", 150, 200),  # forecasts themselves
        ("c", 12.5, 1, "fits", 46, 70),
        ("c", 15, 1, "fits", 51, 80),
        ("d", 15, 1, "fits", 51, 80),
        ("c", 10, 1.5, "fits", 46, 81),
        ("d", 10, 1.5, "may fit", 46, 81),
        ("c", 15, 2, "may fit", 100, 151),
        ("c", 19, 2, "lacks", 140, 190),
        ("c", 15, 1.5, "may fit", 75, 115),
    ],
)
def test_between_forecasts_by_hand(card, seq, batch, verdict, allocated, reserved):
    exact = seq in (10, 20) and batch in (1, 2)
    assert plan.estimate(KNOWN, "m", "full", card, seq, batch) == {
        "verdict": verdict,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "exact": exact,
        "margin_bytes": KNOWN["cards"][card]["capacity_bytes"] - reserved,
    }


@pytest.mark.parametrize(
    "asked",
    [
        ("m", "lora", "c", 10, 1),
        ("x", "full", "c", 10, 1),
        ("m", "full", "e", 10, 1),
        ("m", "full", "c", 9, 1),
        ("m", "full", "c", 21, 1),
        ("m", "full", "c", 10, 3),
    ],
)
def test_outside_the_forecasts_the_planner_refuses(asked):
    assert plan.estimate(KNOWN, *asked) == {"verdict": "refused"}


def test_the_planners_verdict_in_words():
    found = {
        "verdict": "fits",
        "reserved_bytes": 3 * GIB // 2,
        "margin_bytes": -GIB // 2,
        "exact": True,
    }
    assert (
        plan.sentence(found) == "Fits: 1.5 GiB reserved, margin -0.5 GiB (a forecast, predicted)."
    )
    assert plan.sentence({**found, "verdict": "lacks", "exact": False}).startswith(
        "Does not fit: 1.5 GiB"
    )
    assert (
        "interpolated linearly" in plan.sentence({**found, "exact": False})
        and plan.sentence({"verdict": "refused"})[:7] == "Refused"
    )


# claims and their figures -------------------------------------------------------------------------


def verdict(word: str, study: str = "lomo", **figures) -> SimpleNamespace:
    claim = SimpleNamespace(
        study=study, words=f"{study} {word}", quoted={}, source="s", statement="t"
    )
    return SimpleNamespace(claim=claim, word=word, figures=figures, why="w")


def test_verdicts_are_counted_in_all_and_by_study():
    its = [
        verdict(REPRODUCED),
        verdict(REPRODUCED),
        verdict(UNTESTED),
        verdict(NOT_REPRODUCED, "chunkft"),
    ]
    whole, *studies = claims_page.sentences(its)
    assert whole == f"4 claims: 2 {REPRODUCED}, 1 {NOT_REPRODUCED}, 1 {UNTESTED}."
    assert sorted(studies) == [
        f"chunkft: 1 {NOT_REPRODUCED}.",
        f"lomo: 2 {REPRODUCED}, 1 {UNTESTED}.",
    ]
    bars = {
        trace.name: dict(zip(trace.y, trace.x, strict=True))
        for trace in claims_page.figure(its).data
    }
    assert (
        bars[REPRODUCED]["lomo"] == 2
        and bars[NOT_REPRODUCED]["chunkft"] == 1
        and sum(bars[UNTESTED].values()) == 1
    )


def test_a_figures_basis_tells_what_there_is_and_nothing_else():
    full = Figure(1.0, "learned", seeds=5, n=1200, contains="95%", p_holm=0.012, equal="tokens")
    assert claims_page.basis(full) == "5 seeds; 1,200 items; 95%; p 0.012 by Holm; equal tokens"
    assert claims_page.basis(Figure(1.0, "computed")) == ""


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (Figure(1234.6, "measured", "bytes"), "1,235 bytes"),
        (Figure(0.51234, "learned", low=0.25, high=0.75), "0.5123 [0.25, 0.75]"),
        (Figure(2, "computed", "GiB"), "2 GiB"),
        (Figure(1, "learned", "nats", low=math.nan, high=2.0), "1 nats"),
    ],
)
def test_a_figure_in_words_and_through_json(figure, words):
    assert figure.words() == words
    assert str(Figure.from_json(json.loads(json.dumps(figure.to_json())))) == str(figure)
    assert (
        Figure(math.inf, "x").to_json()["value"]
        is None
        is Figure(-math.inf, "x").to_json()["value"]
    )


def test_shares_and_ratios_have_their_intervals():
    found = share(5, 10)  # Wilson's interval, as in the tests of the statistics
    assert (found.value, found.low, found.high, found.seeds) == pytest.approx(
        (0.5, 0.23659309, 0.76340691, 10)
    )
    ratio = ratio_by_seed(
        [2.0, 8.0], [1.0, 1.0]
    )  # logarithms 1 and 3 of 2: mean 2, standard error 1, t of one degree 12.706
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (4, 2 ** (2 - 12.7062), 2 ** (2 + 12.7062)), rel=1e-4
    )
    assert (
        ratio.unit == "times"
        and math.isnan(by_seed([1.0, 2.0]).p)
        and by_seed([1.0], [0.5]).contains == ""
    )


def test_one_seeds_interval_is_its_items_and_normal():
    right = pd.Series([True] * 30 + [False] * 10 + [True] * 20 + [False] * 20).to_numpy()[None]
    found = two_level(right, [1] * 40 + [0] * 40)
    error = math.sqrt(0.75 * 0.25 / 40 + 0.5 * 0.5 / 40) / 2  # two independent shares of 40
    assert found.value == 0.625 and found.n == 80 and found.seeds == 1 and math.isnan(found.p)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
