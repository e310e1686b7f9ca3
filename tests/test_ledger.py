"""The ledger by value: what nobody measured counts as nothing, every part is the difference of two
figures, nothing is rounded."""

from __future__ import annotations

import pandas as pd
import pytest

from vramlab.timeline.byte_ledger import Ledger, ledger, sample_at

KNOWN = {"rounding": 7, "cached": 64, "context": 500, "other_processes": 1000}


@pytest.mark.parametrize(
    "unknown", [(), ("rounding",), ("cached",), ("context",), ("other_processes",), tuple(KNOWN)]
)
def test_the_rest_is_what_is_used_less_exactly_the_known_parts(unknown):
    parts = {**KNOWN, **dict.fromkeys(unknown)}
    counted = sum(size for size in parts.values() if size is not None)
    found = Ledger({"weights": 300, "gradients": 0}, **parts, used=5000)
    assert found.rest == 5000 - 300 - counted
    assert found.missing == [name.replace("_", " ") for name in unknown]
    assert found.rest_name == "the rest" + (
        f", with {', '.join(found.missing)} in it" if unknown else ""
    )
    assert sum(size or 0 for _, size in found.rows()[:-1]) == 5000 == found.rows()[-1][1]


def test_without_the_drivers_figure_there_is_no_rest():
    found = Ledger({"weights": 300}, **{**KNOWN, "context": None}, used=None)
    assert found.rest is None and found.rest_name == "the rest"
    assert [name for name, size in found.rows() if size is None] == [
        "context",
        "the rest",
        "used (driver)",
    ]


def test_parts_that_overlap_leave_a_negative_rest():
    assert Ledger({"weights": 300}, 0, 0, 0, 0, used=299).rest == -1


def _timeline(**columns) -> pd.DataFrame:
    """40 bytes of weights, 100 of activations, then 60 go: the peak, 140, lies at event 1."""
    frame = pd.DataFrame(
        {
            "event": ["alloc", "alloc", "free"],
            "bytes": [40, 100, 100],
            "storage": [0, 1, 1],
            "step": 0,
            "category": ["weights", "activations", "activations"],
            "module": "",
            "op": "",
            "phase": "forward",
            "live_bytes": [40, 140, 40],
        }
    )
    return frame.assign(**columns)


@pytest.mark.parametrize(
    ("event", "parts"),
    [
        (None, {"activations": 100, "weights": 40, "rounding": 60, "cached": 300}),
        (1, {"activations": 100, "weights": 40, "rounding": 60, "cached": 300}),
        (0, {"weights": 40, "rounding": 10, "cached": 50}),
        (2, {"weights": 40, "rounding": 11, "cached": 449}),
    ],
)
def test_a_timelines_columns_are_taken_apart_at_the_event_asked_for(event, parts):
    frame = _timeline(allocated_bytes=[50, 200, 51], reserved_bytes=[100, 500, 500])
    found = ledger(
        frame, event, sample={"used_bytes": 2000, "process_bytes": 1500}, context_bytes=400
    )
    assert found.parts == {**parts, "context": 400, "other processes": 500}
    assert found.rest == 2000 - 500 - 400 - sum(parts.values())


@pytest.mark.parametrize(
    ("columns", "sample", "rounding", "cached", "others"),
    [
        ({}, None, None, None, None),
        ({"allocated_bytes": 200}, {"used_bytes": 9}, 60, None, None),
        (
            {"allocated_bytes": 200, "reserved_bytes": None},
            {"used_bytes": 9, "process_bytes": None},
            60,
            None,
            None,
        ),
        ({"allocated_bytes": None, "reserved_bytes": 500}, {"process_bytes": 4}, None, None, None),
        (
            {"allocated_bytes": 140, "reserved_bytes": 140},
            {"used_bytes": 9, "process_bytes": 9},
            0,
            0,
            0,
        ),
    ],
)
def test_what_a_column_or_a_sample_lacks_is_missing_and_zero_is_not(
    columns, sample, rounding, cached, others
):
    found = ledger(_timeline(**columns), sample=sample)
    assert (found.rounding, found.cached, found.other_processes) == (rounding, cached, others)


@pytest.mark.parametrize(
    ("t_s", "at"), [(0.0, 0), (1.0, 0), (1.001, 1), (2.0, 1), (2.5, 2), (4.0, 2), (9.0, 2)]
)
def test_a_moments_sample_is_the_first_at_or_after_it_and_else_the_last(t_s, at):
    samples = pd.DataFrame({"t_s": [1.0, 2.0, 4.0], "used_bytes": [10, 20, 30]})
    assert sample_at(samples, t_s)["used_bytes"] == [10, 20, 30][at]
    assert sample_at(samples.iloc[:0], t_s) is None
