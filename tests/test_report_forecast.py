"""The report's forecast part says what the forecasts say, and the page's planner computes what
Python computes."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

import planner_reference
from test_report import browser  # noqa: F401, the fixture
from test_report import (
    test_with_the_network_off_every_figure_is_drawn_and_nothing_is_wider_than_the_window as browse,
)
from vramlab.files import write_checked
from vramlab.forecast.chart import Atlas, chart
from vramlab.forecast.chart_worlds import chart_worlds
from vramlab.report import build, forecast_figures, planner, rank_figures
from vramlab.report import forecast_tables as forecasts
from vramlab.report.forecast_tables import GIB, Forecasts


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    atlas = Atlas(
        "small",
        ("tiny",),
        (32, 64),
        (1, 2),
        regimes=("full", "mixed", "lomo"),
        allocators=(
            "expandable_segments:True",
            "garbage_collection_threshold:0.8,per_process_memory_fraction:0.999",
        ),
        worlds=(1, 8, 1024),
        world_seq=32,
    )
    kept = tmp_path_factory.mktemp("cache")
    content = {
        **chart(atlas, kept, progress=False, jobs=1),
        "worlds": chart_worlds(atlas, kept, progress=False, jobs=1),
    }
    return Forecasts(json.loads(json.dumps(content)))


@pytest.fixture(scope="module")
def page(finished, said, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "both"
    shutil.copytree(finished, folder)
    write_checked(folder / "forecast.json", said.content)
    return build(folder)


def _content(capacity: dict, **changes) -> Forecasts:
    """One made-up cell: 10 GiB requested, reserved 14 by default and 11 with a setting."""

    def held(reserved, fits):
        return {
            key: {
                "allocated_bytes": 10 * GIB,
                "reserved_bytes": reserved * GIB,
                "margin_bytes": (size - reserved) * GIB,
                "fits": fits(size),
                "retries": 0,
            }
            for key, size in capacity.items()
        }

    cell = {
        "model": "m",
        "regime": "full",
        "weights": "fp32",
        "name": "full",
        "seq": 8,
        "batch": 1,
        "reason": "",
        "phase": "backward",
        "requested_bytes": 10 * GIB,
        "host_bytes": 0,
        "cards": held(14, lambda size: size >= 14),
        "allocators": [
            {
                "allocator": "a:1",
                "label": "not verified on a GPU: a",
                "cards": held(11, lambda size: size >= 11),
            }
        ],
    }
    cards = {
        key: {"name": key.upper(), "capacity_bytes": size * GIB} for key, size in capacity.items()
    }
    return Forecasts({"cards": cards, "cells": [{**cell, **changes}]})


def test_the_heatmap_is_the_margins_and_says_them_in_words(said):
    figure = forecast_figures.atlas(said)
    assert len(figure.data) == 4 == len(figure.layout.updatemenus[0].buttons) and list(
        figure.data[0].x
    ) == list(said.cards)
    for heat, where in zip(figure.data, said.places, strict=True):
        cells = [cell for cell in said.cells if forecasts.place(cell) == where]
        assert list(heat.y) == [cell["name"] for cell in cells]
        assert heat.z[0][2] == pytest.approx(
            list(cells[0]["cards"].values())[2]["margin_bytes"] / GIB, abs=0.006
        )
    held = {"fits": True, "margin_bytes": 3.14 * GIB}
    assert [
        forecasts.verdict({**held, **other})
        for other in (
            {},
            {"margin_bytes": -GIB},
            {"fits": False, "margin_bytes": -12.3 * GIB},
            {"fits": False, "margin_bytes": -1.26 * GIB},
        )
    ] == ["fits +3.1", "fits flushing", "lacks 12", "lacks 1.3"]


def test_a_failed_cell_stays_in_the_table_with_its_reason():
    frame = forecasts.atlas_table(
        Forecasts(
            {
                "cards": {},
                "cells": [
                    {
                        "model": "m",
                        "name": "full",
                        "seq": 1,
                        "batch": 1,
                        "reason": "RuntimeError: no",
                    }
                ],
            }
        )
    )
    assert frame["reason"].tolist() == ["RuntimeError: no"]


def test_the_stack_of_the_timeline_reaches_the_peak_and_the_limit_is_the_cards(said):
    cell = said.detailed[0]
    figure = forecast_figures.timeline([cell], said.cards)
    stack = [trace for trace in figure.data if trace.stackgroup]
    assert max(map(sum, zip(*(trace.y for trace in stack), strict=True))) == pytest.approx(
        cell["requested_bytes"] / GIB, abs=0.006
    )
    sizes = [button.args[0]["y"][0][0] * GIB for button in figure.layout.updatemenus[-1].buttons]
    assert sizes == [card["capacity_bytes"] for card in said.cards.values()]
    bands = {trace.name for trace in figure.data if trace.yaxis == "y2"}
    assert bands == set(cell["curve"]["phase"]) >= {"forward", "backward", "update"}


def test_one_variable_is_said_only_where_it_is_true():
    only = forecasts.settings_that_save(_content({"small": 9, "tight": 12, "large": 24}))
    assert len(only) == 1 and only[0].startswith(
        "full, 1 × 8 tokens, on TIGHT: you do not need a bigger card"
    )
    assert (
        "PYTORCH_ALLOC_CONF=a:1 (reserved 11.0 GiB instead of 14.0; predicted, not verified on a"
        " GPU: a)" in only[0]
    )
    frame = forecasts.allocator_table(_content({"small": 9, "tight": 12, "large": 24}))
    assert frame["card"].tolist() == [
        "TIGHT",
        "LARGE",
    ], "a card smaller than the request is nobody's what-if"


def test_a_setting_that_loses_a_step_is_named_with_its_reason():
    made = _content({"tight": 15})
    assert forecasts.settings_that_lose(made) == []
    held = made.cells[0]["allocators"][0]
    held["cards"]["tight"] |= {"fits": False}
    assert forecasts.settings_that_lose(made) == [
        "With a:1 these do not fit that fit without it: full, 1 × 8 tokens, on TIGHT."
    ]
    held["allocator"] = "garbage_collection_threshold:0.8"
    assert "Collection returns whole cached blocks" in forecasts.settings_that_lose(made)[0]


def test_what_moved_adds_up_to_the_difference_of_the_peaks(said):
    full, lomo = (
        next(cell for cell in said.cells if cell["regime"] == name) for name in ("full", "lomo")
    )
    frame = forecasts.moved(full, lomo)
    assert frame["moved_GiB"].sum() * GIB == pytest.approx(
        lomo["requested_bytes"] - full["requested_bytes"], abs=1
    )
    assert sum(forecasts.parts(full).values()) == full["requested_bytes"]
    assert set(frame.query("category == 'optimizer'")["to_GiB"]) == {0.0}


def test_between_two_forecasts_the_planner_draws_a_line_and_outside_it_refuses(said):
    known, (card, *_) = planner.config(said), said.cards
    ask = {"known": known, "model": "tiny", "name": "full", "card": card}
    one, half, two = (planner_reference.estimate(**ask, seq=seq, batch=1) for seq in (32, 48, 64))
    assert one["exact"] and two["exact"] and not half["exact"]
    assert half["reserved_bytes"] == (one["reserved_bytes"] + two["reserved_bytes"]) / 2
    cell = next(c for c in said.cells if (c["name"], c["seq"], c["batch"]) == ("full", 32, 1))
    assert one["reserved_bytes"] == cell["cards"][card]["reserved_bytes"]
    for seq, batch in ((31, 1), (65, 1), (64, 3), (64, 0)):
        assert planner_reference.estimate(**ask, seq=seq, batch=batch) == {"verdict": "refused"}
    missing = {**known, "cells": [c for c in known["cells"] if (c["seq"], c["batch"]) != (64, 2)]}
    assert (
        planner_reference.estimate(**{**ask, "known": missing}, seq=40, batch=1.5)["verdict"]
        == "refused"
    )


def test_the_page_marks_what_is_predicted_and_has_a_table_behind_each_figure(page):
    text = page.read_text()
    assert page.stat().st_size < 10_000_000
    for title in (
        "The atlas",
        "Why this peak",
        "The predicted timeline",
        "Allocator what-if",
        "Regime diff",
        "One rank of many",
        "Planner",
    ):
        assert f"<h2>{title} <span class=badge>predicted, " in text
    assert text.count("<details>") == text.count("data-figure=") + 1, (
        "the planner has a table and no figure"
    )


def _two_models(said) -> Forecasts:
    """The same worlds for a second model, and cards so small that it depends on the world whether a
    rank fits."""
    again = [
        {
            **cell,
            "model": "twice",
            "requested_bytes": 2 * cell["requested_bytes"],
            "ledger": {name: 2 * size for name, size in cell["ledger"].items()},
        }
        for cell in said.worlds
    ]
    one, many = (
        cell["cards"]["a100-40"]["reserved_bytes"] for cell in (said.worlds[0], said.worlds[-1])
    )
    cards = {
        "all": {**said.cards["a100-40"], "name": "ALL"},
        "some": {**said.cards["a100-40"], "name": "SOME", "capacity_bytes": (one + many) // 2},
    }
    cells = [
        {
            **cell,
            "cards": {
                "all": {**cell["cards"]["a100-40"]},
                "some": {
                    **cell["cards"]["a100-40"],
                    "fits": cell["world"] > 1,
                    "margin_bytes": (one + many) // 2 - many,
                },
            },
        }
        for cell in [*said.worlds, *again]
    ]
    return Forecasts({**said.content, "cards": cards, "worlds": cells})


def test_the_stack_over_worlds_is_each_ranks_peak_and_the_limit_the_cards(said):
    made = _two_models(said)
    figure = rank_figures.worlds(made)
    models, cards = figure.layout.updatemenus
    for index, (button, model) in enumerate(zip(models.buttons, ("tiny", "twice"), strict=True)):
        shown = [
            trace
            for trace, seen in zip(figure.data, button.args[0]["visible"], strict=True)
            if seen
        ]
        bars = [trace for trace in shown if trace.type == "bar"]
        peaks = [
            sum(cell["ledger"].values()) / GIB for cell in made.worlds if cell["model"] == model
        ]
        assert np.allclose(
            np.sum([bar.y for bar in bars], axis=0), peaks, rtol=0.003, atol=0.0001 * len(bars)
        )
        assert list(bars[0].x) == [0, 3, 10] and list(bars[0].customdata) == [1, 8, 1024]
        assert (
            sum(trace.name == rank_figures.RESERVED for trace in shown) == 1
            and shown[-1].name == "limit: SOME"
        )
        assert bool(shown[0].visible) is (index == 0)
    assert cards.active == 1 and list(figure.layout.xaxis.ticktext) == ["1", "8", "1,024"]
    for button, card in zip(cards.buttons, made.cards.values(), strict=True):
        change, where = button.args
        assert [figure.data[at].name for at in where] == [rank_figures.RESERVED] * 2 + [
            "limit: SOME"
        ]
        assert (
            change["y"][-1] == [card["capacity_bytes"] / GIB] * 2
            and change["name"][-1] == f"limit: {card['name']}"
        )
    assert (
        forecasts.smallest_worlds(made)[0]
        == "tiny, the smallest of the worlds 1, 8, 1,024 whose ranks fit: ALL 1; SOME 8."
    )


def test_the_table_of_worlds_has_every_category_and_keeps_what_failed(said):
    lost = {
        "model": "m",
        "name": "fsdp",
        "world": 2,
        "seq": 32,
        "batch": 1,
        "reason": "RuntimeError: no",
    }
    frame = forecasts.worlds_table(
        Forecasts({**said.content, "worlds": [*said.content["worlds"], lost]})
    )
    assert frame["world"].tolist() == [1, 8, 1024, 2] and frame["reason"].tolist() == [
        "",
        "",
        "",
        "RuntimeError: no",
    ]
    parts = frame.loc[:2, [f"{name}_GiB" for name in said.worlds[0]["ledger"]]].sum(axis=1)
    assert np.allclose(parts, frame.loc[:2, "peak_requested_GiB"]) and "collectives_GiB" in frame


def test_forecasts_made_before_there_were_worlds_still_render(said, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "old")
    write_checked(
        tmp_path / "old" / "forecast.json", {k: v for k, v in said.content.items() if k != "worlds"}
    )
    text = build(tmp_path / "old").read_text()
    assert "<h2>The atlas" in text and "<h2>One rank of many" not in text


def test_a_folder_without_forecasts_has_no_such_part(finished):
    assert "<h2>The atlas" not in build(finished).read_text()


@pytest.mark.parametrize("width", [1280, pytest.param(390, marks=pytest.mark.slow)])
def test_the_whole_page_is_drawn_with_the_network_off(browser, page, width):  # noqa: F811
    browse(browser, page, width, "light")


def test_the_page_computes_what_python_computes(browser, said, tmp_path):  # noqa: F811
    path = tmp_path / "planner.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{planner.embed(said, expose=True)}")
    known, dice = planner.config(said), random.Random(0)
    known["cards"] = {
        key: {**card, "capacity_bytes": dice.randint(10_000_000, 90_000_000)}
        for key, card in known["cards"].items()
    }
    names = list(dict.fromkeys(cell["name"] for cell in known["cells"]))
    asked = [
        (
            "tiny",
            dice.choice(names),
            dice.choice(list(known["cards"])),
            dice.choice([32, 64, dice.randint(28, 68)]),
            dice.choice([1, 2, 1.5, 3]),
        )
        for _ in range(200)
    ]
    here = [planner_reference.estimate(known, *one) for one in asked]
    tab = browser.new_page()
    tab.goto(path.as_uri())
    there = tab.evaluate(
        "([known, asked]) => asked.map((one) => vramlabEstimate(known, ...one))", [known, asked]
    )
    assert there == here and {one["verdict"] for one in here} == {"fits", "lacks", "refused"} | {
        one["verdict"] for one in here if one["verdict"] == "may fit"
    }
    tab.close()


def test_the_verdict_follows_the_inputs_by_keyboard(browser, page, said):  # noqa: F811
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.locator(".planner select").nth(1).select_option("full")
    status = tab.locator(".planner [role=status]")
    card = next(iter(said.cards))
    assert status.text_content() == planner_reference.sentence(
        planner_reference.estimate(planner.config(said), "tiny", "full", card, 32, 1)
    )
    tokens = tab.get_by_label("tokens a row")
    assert tokens.get_attribute("data-lm-suppress-shortcuts") == "true"
    tokens.press("ArrowUp")
    assert "interpolated linearly between forecasts" in status.text_content()
    tokens.fill("5000")
    assert (
        status.text_content().startswith("Refused")
        and status.get_attribute("data-verdict") == "refused"
    )
    tab.close()
