"""The report's figures and tables by value: every mark is worked out by hand from small runs and
forecasts made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd

from test_report_values import CARDS, cell, made
from vramlab.report import figures, forecast_figures, rank_figures, tables
from vramlab.report.forecast_tables import GIB

MIB = 1 << 20
MOVED = [{"visible": [True, False]}, {"visible": [False, True]}]


def menu(figure, at: int = 0) -> list[tuple]:
    return [(button.label, button.args[0]) for button in figure.layout.updatemenus[at].buttons]


def points(figure) -> list[tuple]:
    return [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data]


# forecasts ----------------------------------------------------------------------------------------


def outcomes(**changes) -> dict:
    return {
        key: {**held, "retries": at}
        for at, (key, held) in enumerate(cell(**changes)["cards"].items(), 3)
    }


def test_a_heat_of_the_atlas_by_hand():
    figure = forecast_figures.atlas(
        made(
            cell(cards=outcomes()),
            cell(cards=outcomes(), name="lora", phase="update"),
            cell(cards=outcomes(), seq=9),
        )
    )
    first, second = figure.data
    assert (list(first.x), list(first.y), list(second.y)) == (
        ["a", "b"],
        ["full", "lora"],
        ["full"],
    )
    assert [list(row) for row in first.z] == [[-2, 6]] * 2
    assert [list(row) for row in first.text] == [["lacks<br>2.0", "fits<br>+6.0"]] * 2
    assert [[tuple(held) for held in row] for row in first.customdata] == [
        [(10, "A", phase, 3), (10, "B", phase, 4)] for phase in ("backward", "update")
    ]
    assert [trace.visible for trace in figure.data] == [True, False]
    assert menu(figure) == [("m, 2 × 8 tokens", MOVED[0]), ("m, 2 × 9 tokens", MOVED[1])]
    assert (
        not forecast_figures.atlas(made()).data
        and not forecast_figures.atlas(made(cell(cards=outcomes()))).layout.updatemenus
    )


def test_over_the_bar_of_a_group_stands_what_the_peak_would_be_without_it():
    group = {
        "module": "model.norm",
        "category": "weights",
        "op": "aten.mm.default",
        "bytes": 3 * GIB // 2,
    }
    groups = [
        {**group, "peak_bytes": 5 * GIB, "peak_phase": "update"},
        {
            **group,
            "module": "",
            "category": "odd",
            "op": "x",
            "peak_bytes": 8 * GIB,
            "peak_phase": "backward",
        },
    ]
    figure = forecast_figures.why([cell(without=groups), cell(name="lora", without=groups[:1])])
    assert [(list(trace.x), list(trace.y)) for trace in figure.data] == [
        ([1.5, 1.5], [0, 1]),
        ([0, 0], [-0.45, 0.55]),
        ([1.5], [0]),
        ([0], [-0.45]),
    ]
    assert list(figure.data[1].text) == [
        "<b>norm</b><br>weights, mm, 1.5; without: 5.0 (-3.0), in update",
        "<b>the loss</b><br>odd, x, 1.5; without: 8.0 (+0.0)",
    ]
    assert list(figure.data[0].marker.color) == [figures.COLORS["weights"], "#888"]
    assert [trace.visible for trace in figure.data] == [True, True, False, False]
    assert menu(figure) == [
        ("full, 2 × 8 tokens", {"visible": [True, True, False, False]}),
        ("lora, 2 × 8 tokens", {"visible": [False, False, True, True]}),
    ]
    assert list(figure.layout.yaxis.range) == [1.6, -0.9] and not forecast_figures.why([]).data


def test_the_predicted_step_by_hand():
    curve = {
        "share": [0, 50, 100],
        "phase": ["forward", "odd", "forward"],
        "bytes": {
            "odd": [1, 1, 1],
            "gradients": [0, GIB, 0],
            "weights": [GIB, GIB // 2, GIB // 1024],
        },
    }
    figure = forecast_figures.timeline([cell(curve=curve), cell(name="lora", curve=curve)], CARDS)
    its = [
        ("weights", [0, 50, 100], [1, 0.5, 0.001]),
        ("gradients", [0, 50, 100], [0, 1, 0]),
        ("forward", [0, 100], [1, 1]),
        ("odd", [50], [1]),
    ]
    assert points(figure) == [*its, *its, ("limit: A", [0, 100], [8, 8])]
    assert [trace.visible for trace in figure.data] == [True] * 4 + [False] * 4 + [None]
    assert [said["visible"] for _, said in menu(figure)] == [
        [True] * 4 + [False] * 4 + [True],
        [False] * 4 + [True] * 5,
    ]
    assert [(button.label, *button.args) for button in figure.layout.updatemenus[1].buttons] == [
        ("A", {"y": [[8, 8]], "name": "limit: A"}, (8,)),
        ("B", {"y": [[16, 16]], "name": "limit: B"}, (8,)),
    ]


def test_one_rank_by_hand():
    def rank(world: int, fits: bool, **more) -> dict:
        ledger = {"weights": 6 * GIB // world, "inputs": 8 * MIB, "buffers": 8 * MIB - 1}
        return cell(
            world=world,
            ledger=ledger,
            requested_bytes=8000 * MIB,
            cards={
                key: {**held, "fits": key == "b" and fits, "reserved_bytes": 10 * GIB // world}
                for key, held in cell()["cards"].items()
            },
            **more,
        )

    figure = rank_figures.worlds(
        made(worlds=[rank(2, False), rank(4, True), rank(4, False, model="n")])
    )
    assert points(figure) == [
        ("weights", [1, 2], [3, 1.5]),
        ("inputs", [1, 2], [0.0078] * 2),
        ("reserved at the peak", [1, 2], [5, 2.5]),
        ("weights", [2], [1.5]),
        ("inputs", [2], [0.0078]),
        ("reserved at the peak", [2], [2.5]),
        ("limit: B", [0.5, 2.5], [16, 16]),
    ]
    assert list(figure.data[0].customdata) == [2, 4] == list(figure.data[2].customdata)
    assert list(figure.data[2].text) == ["does<br>not<br>fit", "fits<br>+6.0"]
    assert [trace.visible for trace in figure.data] == [True] * 3 + [False] * 3 + [None]
    assert menu(figure) == [
        ("m, 2 × 8 tokens a rank", {"visible": [True] * 3 + [False] * 3 + [True]}),
        ("n, 2 × 8 tokens a rank", {"visible": [False] * 3 + [True] * 4}),
    ]
    change, where = figure.layout.updatemenus[1].buttons[0].args
    assert where == (2, 5, 6) and change["name"] == ["reserved at the peak"] * 2 + ["limit: A"]
    assert [list(y) for y in change["y"]] == [[5, 2.5], [2.5], [8, 8]]
    assert [text and list(text) for text in change["text"]] == [
        ["lacks<br>2.0"] * 2,
        ["lacks<br>2.0"],
        None,
    ]
    assert figure.layout.updatemenus[1].active == 1 and list(figure.layout.xaxis.tickvals) == [1, 2]
    alike = rank_figures.worlds(made(worlds=[rank(2, True), rank(4, True)]))
    assert alike.layout.updatemenus[0].active == 0 and alike.data[-1].name == "limit: A", (
        "no card tells worlds apart: the first"
    )


def test_two_regimes_side_by_side_start_with_full_and_lomo():
    cells = [
        cell(
            name="lora",
            regime="lora",
            groups=[
                {"category": "weights", "module": "lm_head", "bytes": 8 * MIB},
                {"category": "inputs", "module": "", "bytes": 8 * MIB - 1},
            ],
            requested_bytes=800 * MIB,
        ),
        cell(),
        cell(name="lomo", regime="lomo", groups=[], requested_bytes=4 * GIB),
    ]
    figure = forecast_figures.difference(cells)
    assert points(figure) == [
        ("full, 2 × 8 tokens", [5, 1, 2], ["weights, mlp", "gradients, head", "rest, "]),
        ("lomo, 2 × 8 tokens", [4], ["rest, "]),
    ]
    assert [menu.active for menu in figure.layout.updatemenus] == [1, 2]
    assert figure.layout.updatemenus[1].buttons[0].args == (
        {"x": [[0.008, 0.766]], "y": [["weights, head", "rest, "]], "name": "lora, 2 × 8 tokens"},
        (1,),
    )
    assert figure.layout.updatemenus[0].buttons[0].args[1] == (0,)
    assert [
        menu.active for menu in forecast_figures.difference([cells[0]] * 3).layout.updatemenus
    ] == [0, 2]


def test_no_setting_has_no_bars():
    assert not forecast_figures.allocators(made(cell())).data


# runs ---------------------------------------------------------------------------------------------


def run(name: str, **more) -> SimpleNamespace:
    events = [
        ("alloc", 0, 2, "weights", "", 2, "forward"),
        ("alloc", 1, 1, "gradients", "a", 3, "backward"),
        ("alloc", 2, 9, "host", "a", 3, "backward"),
        ("free", 1, 1, "gradients", "a", 2, "backward"),
    ]
    frame = pd.DataFrame(
        events, columns=["event", "storage", "bytes", "category", "module", "live_bytes", "phase"]
    ).assign(step=0, op="")
    frame[["bytes", "live_bytes"]] *= MIB
    owners = [
        {"op": op, "module": module, "category": "weights", "bytes": size * MIB}
        for op, module, size in (
            ("aten.mm.default", "a", 3),
            ("", "b", 2),
            ("x", "", 1),
            ("", "d", 1),
        )
    ]
    peak = {
        "peak_bytes": 3 * MIB,
        "phase": "backward",
        "step": 0,
        "owners": owners,
        "categories": {"weights": 2 * MIB, "gradients": MIB, "inputs": 0, "buffers": 0},
    }
    return SimpleNamespace(
        name=name, ok=True, has_timeline=True, timeline=frame, result={"peak": peak}, **more
    )


def test_a_runs_timeline_and_its_peak_by_hand():
    figure = figures.timelines(
        [
            run("lora"),
            run("full"),
            SimpleNamespace(ok=False),
            SimpleNamespace(ok=True, has_timeline=False),
        ]
    )
    stack = [("weights", [0, 1, 3], [2, 2, 2]), ("gradients", [0, 1, 3], [0, 1, 0])]
    assert [
        one if one[0] in figures.COLORS else (*one[:2], [y == y and y for y in one[2]])
        for one in points(figure)
    ] == 2 * [
        *((name, [0, 1, 2, 3], [*y[:2], *y[1:]]) for name, _, y in stack),
        ("forward", [0, 1, 2, 3], [1, False, False, False]),
        ("backward", [0, 1, 2, 3], [False, 1, 1, 1]),
    ]
    assert menu(figure) == [
        ("full", {"visible": [True] * 4 + [False] * 4}),
        ("lora", {"visible": [False] * 4 + [True] * 4}),
    ]
    arrow, words = figure.layout.annotations
    assert (arrow.x, arrow.y) == (1, 3) and words.text.split("<br>") == [
        "<b>peak 3.0 MiB, backward of step 0</b>",
        "weights 2.0, gradients 1.0, inputs 0.0",
        "largest: a mm (weights) 3.0",
        "b (weights) 2.0",
        "the loss (weights) 1.0",
    ]
    assert [trace.visible for trace in figure.data] == [True] * 4 + [False] * 4
    assert (
        not figures.timelines([]).data and not figures.timelines([run("full")]).layout.updatemenus
    )


def test_what_is_alive_by_hand():
    frame = run("full").timeline.assign(storage=[0, 1, 2, 1])
    (bars,) = figures.alive_at(frame, 2).data
    assert list(zip(bars.y, bars.x, strict=True)) == [
        ("a · gradients", 1),
        ("the model · weights", 2),
    ]
    figure = figures.alive_at(frame, 3)
    assert list(figure.data[0].y) == ["the model · weights"]
    assert figure.layout.title.text == "Alive after event 3: 2.00 MiB, step 0, backward"
    assert list(figures.alive_at(frame, 2, most=1).data[0].x) == [2]


def scored(name: str, value: float, **more) -> SimpleNamespace:
    rows = [
        ("news", "none", "yesno", value),
        ("law", "none", "likelihood", value + 0.125),
        ("news", "none", "overlap", 0.5),
    ]
    frame = pd.DataFrame(rows, columns=["domain", "shift", "scoring", "value"]).assign(
        metric="balanced_accuracy", n=7
    )
    frame = frame.assign(low=frame["value"] - 0.0625, high=frame["value"] + 0.03125)
    return SimpleNamespace(
        name=name, ok=True, accuracy=frame, params={"train_domain": "news"}, **more
    )


def test_the_matrix_by_hand():
    figure = figures.matrix([scored("full", 0.5), SimpleNamespace(name="lost", ok=False)])
    yes, likelihood = figure.data
    assert (list(yes.x), list(yes.y), list(likelihood.y)) == (
        ["news", "law"],
        ["full", "overlap"],
        ["full", "overlap"],
    )
    assert [list(row) for row in yes.z] == [[0.5, None]] * 2 and [
        list(row) for row in yes.text
    ] == [["0.50", ""]] * 2
    assert [list(row) for row in likelihood.z] == [[None, 0.625], [0.5, None]]
    assert [[tuple(at) for at in row] for row in yes.customdata] == [
        [(0.4375, 0.53125, 7), (0, 0, 0)]
    ] * 2
    assert (yes.visible, likelihood.visible) == (None, False)
    assert menu(figure) == list(zip(figures.SCORINGS.values(), MOVED, strict=True))


def summary(_) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "regime": ["zero", "full", "lora", "dead", "blind"],
            "outcome": ["ok"] * 3 + ["failed", "ok"],
            "peak_mib": [1.0, 9.0, 5.0, 3.0, None],
            "process_peak_mib": [10.0, 20.0, 30.0, 40.0, 50.0],
            "trainable_parameters": [0, 1, 1, 1, 1],
            "tokens_per_s": [900.0, 10.0, 30.0, 5.0, 1.0],
            **{
                f"{phase}_ms": [at, 1.0, 2.0, 3.0, 4.0]
                for at, phase in enumerate(("forward", "backward", "update"))
            },
        }
    )


def test_the_trade_off_and_the_bars_of_the_finished_runs_by_hand(monkeypatch):
    monkeypatch.setattr(tables, "summary", summary)
    figure = figures.trade_off([scored("full", 0.5), scored("lora", 0.75)])
    assert [list(trace.x) for trace in figure.data] == [[1, 9, 5]] * 4 and len(menu(figure)) == 4
    first = figure.data[0]
    assert list(first.text) == ["zero", "full", "lora"] and list(first.y)[1:] == [0.5, 0.75]
    assert (list(first.error_y.array)[1:], list(first.error_y.arrayminus)[1:]) == (
        [0.03125] * 2,
        [0.0625] * 2,
    )
    assert [tuple(said) for said in first.customdata][1:] == [
        (10, 0.4375, 0.53125, 7),
        (30, 0.6875, 0.78125, 7),
    ]
    assert (first.marker.cmin, first.marker.cmax, list(first.marker.color)) == (
        10,
        30,
        [900, 10, 30],
    )
    assert list(first.textposition) == ["top center", "top center", "bottom center"]
    assert list(figure.data[3].y)[1:] == [0.625, 0.875] and figure.layout.shapes[0].y0 == 0.5
    assert [trace.visible for trace in figure.data] == [True, False, False, False]
    assert menu(figure)[2] == (
        "news: likelihood of the claim",
        {"visible": [False, False, True, False]},
    )
    assert points(figures.speed([])) == [
        (phase, ["zero", "full", "lora", "blind"], [at, 1, 2, 4])
        for at, phase in enumerate(("forward", "backward", "update"))
    ]
    its = [
        SimpleNamespace(
            name=name,
            ok=True,
            has_timeline=name != "blind",
            result={"memory_ledger": {"gradients": MIB, "weights": size * MIB}},
        )
        for name, size in (("full", 3), ("lora", 2), ("blind", 9))
    ]
    assert points(figures.ledger([*its, SimpleNamespace(ok=False)])) == [
        ("weights", ["full", "lora"], [3, 2]),
        ("gradients", ["full", "lora"], [1, 1]),
        ("process peak (OS)", ["zero", "full", "lora", "blind"], [10, 20, 30, 50]),
    ]


def test_differences_and_losses_by_hand(monkeypatch):
    frame = pd.DataFrame(
        [
            ("news", "yesno", "lora", 0.25),
            ("news", "yesno", "lomo", -0.5),
            ("news", "likelihood", "lora", 0.125),
        ],
        columns=["place", "scoring", "regime", "difference"],
    ).assign(holm_p=0.03, n=7)
    frame = frame.assign(low=frame["difference"] - 0.25, high=frame["difference"] + 0.5)
    monkeypatch.setattr(tables, "against_reference", lambda _: frame)
    figure = figures.differences([])
    assert [one[1:] for one in points(figure)] == [
        ([0.25, -0.5], ["lora", "lomo"]),
        ([0.125], ["lora"]),
    ]
    assert (list(figure.data[0].error_x.array), list(figure.data[0].error_x.arrayminus)) == (
        [0.5] * 2,
        [0.25] * 2,
    )
    assert [list(said) for said in figure.data[0].customdata] == [
        [0.03, 7]
    ] * 2 and figure.layout.shapes[0].x0 == 0
    assert menu(figure) == [
        ("news: yes/no answer", MOVED[0]),
        ("news: likelihood of the claim", MOVED[1]),
    ]
    assert [trace.visible for trace in figure.data] == [True, False]
    monkeypatch.setattr(tables, "against_reference", lambda _: frame.iloc[:0])
    assert not figures.differences([]).data
    steps = pd.DataFrame({"step": range(12), "loss": [0.0] * 11 + [10.0]})
    its = [SimpleNamespace(name="full", ok=True, steps=steps), SimpleNamespace(ok=False)]
    assert points(figures.losses(its)) == [("full", list(range(12)), [0] * 11 + [1])]
