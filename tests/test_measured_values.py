"""Measurements beside forecasts, and a driver's ledger, by value."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd

from test_figure_values import MIB, points
from vramlab.report import comparison as measured
from vramlab.timeline.agreement import Agreement, Divergence
from vramlab.timeline.byte_ledger import Ledger


def agreement(*sizes: int) -> Agreement:
    curve = pd.DataFrame(
        {
            "at": range(4),
            "phase": ["forward", "forward", "backward", "backward"],
            "measured_bytes": [MIB, 4 * MIB, 2 * MIB, MIB],
            "predicted_bytes": [MIB, 3 * MIB, 6 * MIB, MIB],
        }
    )
    curve["error_bytes"] = curve["predicted_bytes"] - curve["measured_bytes"]
    curve["measured_reserved_bytes"] = curve["measured_bytes"] * 2
    parted = tuple(
        Divergence(at, "not predicted", "forward", "mm" * (at % 2), "m" * (at % 2), "", size)
        for at, size in enumerate(sizes, 1)
    )
    joined = SimpleNamespace(share=0.5, bytes_share=0.25, method="names")
    return Agreement(4 * MIB, 6 * MIB, curve, {"reserved": (4 * MIB, 5 * MIB)}, parted, joined)


def test_an_overlay_by_hand():
    figure = measured.overlay(agreement(2000, 9000, 10), "here", "there")
    assert points(figure) == [
        ("here", [0, 1, 2, 3], [1, 4, 2, 1]),
        ("there", [0, 1, 2, 3], [1, 3, 6, 1]),
        ("here, reserved", [0, 1, 2, 3], [2, 8, 4, 2]),
        ("difference", [0, 1, 2, 3], [0, -1, 4, 0]),
        ("forward", [0, 1], [1, 1]),
        ("backward", [2, 3], [1, 1]),
    ]
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [1, 2]
    assert figure.layout.annotations[-1].text.split("<br>") == [
        "<b>error at the peak +50.000%</b> of 4.0 MiB, at most 100.000% of it over time",
        "matched 50.0% of allocations, 25.0% of bytes (names); 3 divergences",
        "reserved: 5.0 MiB predicted, against 4.0: +25.000%",
        "first: 2,000 bytes, mm of m in forward, not predicted",
        "largest: 9,000 bytes, an allocation in forward, not predicted",
    ]
    alike = measured.overlay(agreement(), "here", "there")
    assert not alike.layout.shapes and len(alike.layout.annotations[0].text.split("<br>")) == 3
    assert measured._thinned(agreement().curve, 2)["at"].tolist() == [1, 2]
    curve = pd.DataFrame(
        {
            "measured_bytes": [9, 1, 1, 1, 1],
            "predicted_bytes": [5, 1, 6, 1, 1],
            "error_bytes": [-4, 0, 5, -7, 0],
        }
    ).assign(at=range(5))
    assert measured._thinned(curve, 1)["at"].tolist() == [0, 2, 3] and measured._thinned(curve, 2)[
        "at"
    ].tolist() == [0, 2, 3]
    assert measured._thinned(curve, 500)["at"].tolist() == [0, 1, 2, 3, 4]


def test_tokens_and_the_kind_of_a_timeline():
    frame = pd.DataFrame(
        {
            "category": ["weights", "inputs", "inputs"],
            "event": ["alloc", "free", "alloc"],
            "bytes": [9, 10, 8 * 3 * 64],
            "source": "recorder",
        }
    )
    its = SimpleNamespace(name="full", timeline=frame, params={"batch_size": 3})
    assert (
        measured.tokens(its) == 64 and measured.run_timeline(its).name == "full: recorded on CUDA"
    )


def test_a_drivers_ledger_by_hand():
    whole = Ledger({"weights": 4 * MIB}, MIB, 2 * MIB, 3 * MIB, 0, 11 * MIB)
    lacking = Ledger({"inputs": MIB}, None, 0, None, MIB, 5 * MIB)
    unread = Ledger({"weights": MIB}, 0, 0, 0, 0, None)
    figure = measured.ledgers({"one": whole, "two": lacking, "three": unread})
    names = ["one", "two", "three"]
    assert points(figure) == [
        ("weights", names, [4, None, 1]),
        ("rounding", names, [1, None, 0]),
        ("cached", names, [2, 0, 0]),
        ("context", names, [3, None, 0]),
        ("other processes", names, [0, 1, 0]),
        ("inputs", names, [None, 1, None]),
        ("the rest", names, [1, 3, None]),
        ("used (driver)", names, [11, 5, None]),
    ]
    assert list(figure.data[6].customdata) == [
        "the rest",
        "the rest, with rounding, context in it",
        "the rest",
    ]
    assert [(said.x, said.text) for said in figure.layout.annotations] == [
        ("two", f"{measured.NOT_AVAILABLE}: rounding, context"),
        ("three", f"{measured.NOT_AVAILABLE}: used"),
    ]
    table = measured.ledger_table({"one": whole, "two": lacking})
    assert table["one"].to_dict() == {
        "weights": "4.00",
        "rounding": "1.00",
        "cached": "2.00",
        "context": "3.00",
        "other processes": "0.00",
        "the rest": "1.00",
        "used (driver)": "11.00",
        "inputs": "0.00",
    }
    assert (
        table.loc["the rest", "two"] == "3.00"
        and table.loc["rounding", "two"] == measured.NOT_AVAILABLE
    )
    runs = [
        SimpleNamespace(name="a", result={"ledger": whole.to_json()}),
        SimpleNamespace(name="b", result={"ledger": None}),
        SimpleNamespace(name="c", result={}),
    ]
    assert measured.driver_ledgers(runs) == {"a": whole}
