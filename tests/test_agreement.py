"""A forecast beside a measurement: what is matched, where they part, and what the errors over many
runs are."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from simulated_history import recorded
from vramlab.allocator.settings import Settings
from vramlab.capture.meter import COLUMNS
from vramlab.capture.simulated_recording import as_recorded
from vramlab.regimes.regime import read_regimes
from vramlab.timeline.accuracy import peak_error, summary
from vramlab.timeline.agreement import compare
from vramlab.timeline.align import align, joined
from vramlab.timeline.byte_ledger import ledger, sample_at
from vramlab.timeline.reserved import through_allocator

REGIMES = read_regimes()
LISTS = st.lists(st.integers(0, 3), max_size=14)


def _longest(ours, theirs):
    """The length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, one in enumerate(ours, 1):
        for j, other in enumerate(theirs, 1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
            )
    return table[-1][-1]


@tries(max_examples=300, deadline=None)
@given(LISTS, LISTS)
def test_what_is_matched_is_equal_in_order_and_as_much_as_can_be(ours, theirs):
    pairs, exact = align(ours, theirs)
    assert exact and all(ours[i] == theirs[j] for i, j in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in zip(pairs, pairs[1:], strict=False))
    assert len(pairs) == _longest(ours, theirs)


@tries(max_examples=100, deadline=None)
@given(LISTS, LISTS)
def test_beyond_so_many_differences_matches_are_still_equal_and_in_order(ours, theirs):
    pairs, exact = align(ours, theirs, most=0)
    assert all(ours[i] == theirs[j] for i, j in pairs) and (
        exact or len(pairs) <= _longest(ours, theirs)
    )
    assert all(a < c and b < d for (a, b), (c, d) in zip(pairs, pairs[1:], strict=False))
    assert pairs or not set(ours) & set(theirs)


@pytest.mark.parametrize("name", ["full", "checkpoint", "lora", "lomo"])
def test_backward_gets_its_names_from_the_same_steps_seen_from_inside(name):
    metered, recorder, _ = recorded(REGIMES[name])
    frame = recorder.frame()
    found = joined(frame, metered)
    assert (found.share, found.bytes_share) == (1.0, 1.0)
    wanted = metered[(metered["category"] != "host") & (metered["bytes"] > 0)].reset_index(
        drop=True
    )
    assert not (frame["module"] == wanted["module"]).all()
    assert (found.frame["op"] == wanted["op"]).all() and (
        found.frame["module"] == wanted["module"]
    ).all()


def _frame(*rows, step=0):
    """Rows of (event, storage, bytes, phase[, op])."""
    live, out = 0, []
    for at, (event, storage, size, phase, *op) in enumerate(rows):
        live += size if event == "alloc" else -size
        out.append(
            (
                float(at),
                step,
                event,
                storage,
                0,
                size,
                live,
                "temporaries",
                phase,
                "",
                op[0] if op else "",
                "meter",
            )
        )
    return pd.DataFrame(out, columns=COLUMNS)


FORECAST = [
    ("alloc", 1, 100, "forward", "aten.mm"),
    ("alloc", 2, 50, "forward", "aten.silu"),
    ("alloc", 3, 70, "backward", "aten.mm"),
    ("free", 2, 50, "backward"),
    ("alloc", 4, 10, "backward", "aten.add"),
]


def test_equal_runs_agree_to_the_byte():
    found = compare(_frame(*FORECAST), _frame(*FORECAST))
    assert (found.peak_error, found.worst_error, found.divergences, found.joined.share) == (
        0.0,
        0.0,
        (),
        1.0,
    )


def test_a_storage_that_changes_its_size_is_joined():
    rows = [
        ("alloc", 1, 100, "forward", "aten.mm"),
        ("free", 1, 100, "forward"),
        ("alloc", 1, 50, "forward", "aten.silu"),
    ]
    found = compare(_frame(*rows), _frame(*rows))
    assert (found.joined.share, found.divergences) == (1.0, ())


def test_the_first_divergence_is_named_with_operation_and_bytes():
    measured = [
        *FORECAST[:2],
        ("alloc", 9, 400, "backward"),
        *FORECAST[2:4],
        ("free", 9, 400, "backward"),
        FORECAST[4],
    ]
    found = compare(_frame(*measured), _frame(*FORECAST))
    assert (found.measured_peak_bytes, found.predicted_peak_bytes) == (620, 220)
    first = found.first()
    assert (first.at, first.what, first.phase, first.bytes) == (2, "not predicted", "backward", 400)
    assert found.curve["error_bytes"].tolist() == [0, 0, -400, 0] and found.worst_error == 400 / 620
    other = compare(_frame(*FORECAST), _frame(*measured))
    assert (other.first().what, other.first().bytes) == (
        "only predicted",
        400,
    ) and other.peak_error == pytest.approx(620 / 220 - 1)
    assert (
        other.to_json()["first_divergence"]["bytes"]
        == other.to_json()["largest_divergence"]["bytes"]
        == 400
    )


def test_the_same_allocation_freed_later_is_a_divergence_too():
    measured = [FORECAST[0], FORECAST[1], FORECAST[2], FORECAST[4], ("free", 2, 50, "backward")]
    first = compare(_frame(*measured), _frame(*FORECAST)).first()
    assert (first.what, first.op, first.bytes, first.at) == (
        "freed later than predicted",
        "aten.silu",
        50,
        3,
    )
    assert (
        compare(_frame(*FORECAST), _frame(*measured)).first().what == "freed earlier than predicted"
    )
    assert compare(_frame(*measured), _frame(*FORECAST)).first(least_bytes=51) is None


def test_what_one_side_held_before_the_step_is_named_first():
    forecast, measured = (
        pd.concat(
            [_frame(("alloc", 90, 64, "init"), *more), _frame(*FORECAST, step=1)], ignore_index=True
        )
        for more in ([("alloc", 91, 512, "update", "aten.mm")], [("alloc", 92, 9, "init")])
    )
    found = compare(measured, forecast)
    assert [(one.at, one.what, one.bytes, one.op) for one in found.divergences] == [
        (0, "held before, only predicted", 512, "aten.mm"),
        (0, "held before, not predicted", 9, ""),
    ]


def test_steps_that_are_not_there_are_asked_for():
    with pytest.raises(
        ValueError, match=r"no step in common: \[0\] were measured, \[3\] predicted; say which"
    ):
        compare(_frame(*FORECAST), _frame(*FORECAST, step=3))
    assert compare(_frame(*FORECAST), _frame(*FORECAST, step=3), steps={0: 3}).peak_error == 0.0


@pytest.mark.parametrize("expandable", [False, True])
def test_what_an_allocator_makes_of_both_is_compared_too(expandable):
    settings = Settings(expandable_segments=expandable)
    metered, recorder, _ = recorded(REGIMES["full"], settings=settings)
    frame, predicted = recorder.frame(), through_allocator(metered, settings)
    found = compare(frame, predicted)
    for name in ("allocated", "reserved"):
        assert (
            found.peaks[name][0] == found.peaks[name][1] == recorder.peaks[-1][f"{name}_peak_bytes"]
        )
        assert (
            found.curve[f"measured_{name}_bytes"] == found.curve[f"predicted_{name}_bytes"]
        ).all()
    other = through_allocator(
        metered, Settings(expandable_segments=expandable, large_segment_size_mb=32)
    )
    assert compare(frame, other).to_json()["peaks"]["allocated"]["error"] == 0.0
    assert through_allocator(metered.iloc[:0]).columns.tolist() == predicted.columns.tolist()
    assert ledger(predicted).rounding > 0 and compare(frame, metered).peaks == {}


def test_a_regime_against_another_is_off_by_what_it_saves():
    _, full, _ = recorded(REGIMES["full"])
    _, saving, _ = recorded(REGIMES["checkpoint"])
    found = compare(full.frame(), saving.frame())
    # all that full does the other does too, and forms the blocks' activations again
    assert found.peak_error < -0.05 and found.joined.share == 1.0
    again = [one for one in found.divergences if one.what == "only predicted"]
    assert {one.phase for one in again} == {
        "recompute"
    } and found.first().what == "freed later than predicted"


def test_curves_peaks_and_shares_of_two_runs_by_hand():
    measured = [
        *FORECAST[:2],
        ("alloc", 9, 400, "backward"),
        ("alloc", 8, 500, "backward"),
        *FORECAST[2:],
    ]
    told, forecast = (_frame(*rows) for rows in (measured, FORECAST))
    for frame, size in ((told, 1000), (forecast, 900)):
        frame["allocated_bytes"], frame["reserved_bytes"] = frame["live_bytes"] + size, 2 * size
    found = compare(told, forecast)
    assert found.to_json() == {
        "measured_peak_bytes": 1120,
        "predicted_peak_bytes": 220,
        "peak_error": 220 / 1120 - 1,
        "worst_error": 900 / 1120,
        "peaks": {
            "allocated": {
                "measured_bytes": 2120,
                "predicted_bytes": 1120,
                "error": 1120 / 2120 - 1,
            },
            "reserved": {"measured_bytes": 2000, "predicted_bytes": 1800, "error": 1800 / 2000 - 1},
        },
        "matched_share": 4 / 6,
        "matched_bytes_share": 230 / 1130,
        "matched": "in order, by phase and size",
        "divergences": 2,
        "first_divergence": {
            "at": 2,
            "what": "not predicted",
            "phase": "backward",
            "op": "",
            "module": "",
            "category": "temporaries",
            "bytes": 400,
        },
        "largest_divergence": {
            "at": 2,
            "what": "not predicted",
            "phase": "backward",
            "op": "",
            "module": "",
            "category": "temporaries",
            "bytes": 500,
        },
    }
    curve = found.curve
    assert curve["at"].tolist() == [0, 1, 2, 3] and curve["t_s"].tolist() == [0.0, 1.0, 4.0, 6.0]
    assert curve["measured_bytes"].tolist() == [100, 150, 1120, 1080] and curve[
        "predicted_bytes"
    ].tolist() == [100, 150, 220, 180]
    assert curve["phase"].tolist() == ["forward"] * 2 + ["backward"] * 2
    assert curve["measured_allocated_bytes"].tolist() == [1100, 1150, 2120, 2080]
    assert curve["predicted_allocated_bytes"].tolist() == [1000, 1050, 1120, 1080]
    assert (
        found.first(400).bytes == 400 and found.first(401).bytes == 500 and found.first(501) is None
    )
    told["reserved_bytes"] = told["reserved_bytes"].where(told.index > 0).astype("Int64")
    assert set(compare(told, forecast).peaks) == {"allocated"}, "a row without a figure"


def test_the_last_common_step_is_compared_and_peaks_are_of_it_alone():
    steps = [
        pd.concat(
            [
                _frame(("alloc", 1, size, "forward"), ("free", 1, size, "forward"), step=step)
                for step, size in enumerate(sizes)
            ],
            ignore_index=True,
        )
        for sizes in ((900, 50, 30), (800, 40))
    ]
    for frame in steps:
        frame["allocated_bytes"] = frame["bytes"]
    found = compare(*steps)
    assert (found.measured_peak_bytes, found.predicted_peak_bytes, found.peaks["allocated"]) == (
        50,
        40,
        (50, 40),
    )
    both = compare(*steps, steps={1: 0, 2: 1})
    assert (both.measured_peak_bytes, both.predicted_peak_bytes, both.peaks["allocated"]) == (
        50,
        800,
        (50, 800),
    )


def test_what_only_one_side_holds_before_the_step_is_counted_by_size_largest_first():
    def held(*rows):
        return pd.concat([_frame(*rows), _frame(*FORECAST, step=1)], ignore_index=True)

    inputs = held(
        ("alloc", 90, 64, "init"),
        ("alloc", 91, 8, "init"),
        ("alloc", 92, 8, "init"),
        ("alloc", 93, 999, "init"),
        ("alloc", 94, 77, "init"),
        ("free", 94, 77, "init"),
        ("alloc", 95, 0, "init"),
        ("alloc", 96, 3, "init"),
        ("alloc", 97, 555, "init"),
    )
    inputs.loc[3, "category"], inputs.loc[8, "category"] = "inputs", "host"
    found = compare(
        inputs, held(("alloc", 80, 8, "init"), ("alloc", 81, 3, "init"), ("alloc", 82, 5, "init"))
    )
    assert [(one.bytes, one.what) for one in found.divergences] == [
        (64, "held before, not predicted"),
        (8, "held before, not predicted"),
        (5, "held before, only predicted"),
    ]


def test_host_memory_and_nothing_are_no_divergence():
    more = _frame(
        *FORECAST,
        ("alloc", 7, 0, "backward"),
        ("alloc", 8, 9, "backward"),
        ("alloc", 9, 6, "backward"),
    )
    more.loc[6, "category"] = "host"
    assert [
        (one.bytes, one.at, one.what) for one in compare(more, _frame(*FORECAST)).divergences
    ] == [(6, 4, "not predicted")]


def test_a_share_of_nothing_is_no_error_and_a_small_one_is_within_tolerance():
    nothing = [
        {"predicted_allocated_bytes": 5, "measured_allocated_bytes": 0},
        {"predicted_reserved_bytes": 0, "measured_reserved_bytes": 8},
    ]
    found = summary(nothing)
    assert (found["allocated"]["n"], found["reserved"]["n"]) == (0, 1)
    assert (found["reserved"]["worst_error"], found["reserved"]["under_rate"]) == (1.0, 1.0)
    assert math.isnan(peak_error(nothing[0], "allocated"))
    assert peak_error(nothing[1], "reserved") == -1
    sizes = [(1000, 1000), (995.5, 1000), (994, 1000), (1010, 1000)]
    rows = [
        {"predicted_nvml_bytes": predicted, "measured_nvml_bytes": measured}
        for predicted, measured in sizes
    ]
    found = summary(rows)["nvml"]
    assert (found["n"], found["under_rate"], found["worst_error"]) == (4, 0.5, pytest.approx(0.01))
    assert (
        found["median_error"] == pytest.approx((0.0045 + 0.006) / 2)
        and found["under_rate_beyond"] == 0.25
    )
    half = {**rows[0], "predicted_fits": True, "measured_fits": None}
    assert summary([half, {"predicted_fits": None, "measured_fits": True}])["fits"]["n"] == 0


def test_errors_over_runs_are_of_what_was_measured_only():
    rows = [
        {
            "regime": "a",
            "predicted_allocated_bytes": 101,
            "measured_allocated_bytes": 100,
            "predicted_fits": True,
            "measured_fits": True,
        },
        {
            "regime": "b",
            "predicted_allocated_bytes": 990,
            "measured_allocated_bytes": 1000,
            "predicted_reserved_bytes": 999,
            "measured_reserved_bytes": 1000,
            "predicted_fits": False,
            "measured_fits": True,
        },
        {
            "regime": "c",
            "predicted_allocated_bytes": 7,
            "measured_allocated_bytes": None,
            "predicted_fits": True,
            "measured_fits": False,
        },
    ]
    found = summary(rows)
    assert found["allocated"] == pytest.approx(
        {
            "n": 2,
            "median_error": 0.01,
            "worst_error": 0.01,
            "under_rate": 0.5,
            "under_rate_beyond": 0.5,
        }
    )
    assert found["reserved"]["under_rate"] == 1.0 and found["reserved"]["under_rate_beyond"] == 0.0
    assert found["nvml"] == {
        "n": 0,
        "median_error": None,
        "worst_error": None,
        "under_rate": None,
        "under_rate_beyond": None,
    }
    assert found["fits"] == {"n": 3, "false_refusal_rate": 0.5, "false_promise_rate": 1.0}
    assert summary([])["fits"] == {"n": 0, "false_refusal_rate": None, "false_promise_rate": None}


# the ledger ---------------------------------------------------------------------------------------


def test_the_ledger_closes_and_prints_the_rest():
    _, recorder, _ = recorded(REGIMES["full"])
    frame = recorder.frame()
    at = int(frame["live_bytes"].idxmax())
    reserved = int(frame["reserved_bytes"][at])
    sample = {"used_bytes": reserved + 900, "process_bytes": reserved + 500, "t_s": 0.0}
    found = ledger(
        frame, sample=sample, context_bytes=450, context_source="measured before the first tensor"
    )
    assert dict(found.categories) == recorder.peak()["categories"]
    assert found.rounding == frame["allocated_bytes"][at] - frame["live_bytes"][at] > 0
    assert (found.other_processes, found.rest, found.rest_name, found.missing) == (
        400,
        50,
        "the rest",
        [],
    )
    assert sum(found.parts.values()) + found.rest == found.used == found.rows()[-1][1]
    assert found.context_source == "measured before the first tensor"


def test_what_was_not_measured_is_not_nothing():
    metered, _, _ = recorded(REGIMES["full"], steps=1)
    found = ledger(metered)
    assert (
        found.rounding,
        found.cached,
        found.context,
        found.other_processes,
        found.used,
        found.rest,
    ) == (None,) * 6
    assert sum(size is None for _, size in found.rows()) == 6 and found.rest_name == "the rest"
    told = ledger(metered, sample={"used_bytes": 10**9, "process_bytes": float("nan")})
    assert told.rest_name == "the rest, with rounding, cached, context, other processes in it"
    assert told.rest == 10**9 - sum(told.categories.values())


def test_a_sample_is_the_next_after_a_moment():
    samples = pd.DataFrame({"t_s": [1.0, 2.0, 3.0], "used_bytes": [10, 20, 30]})
    assert [sample_at(samples, t_s)["used_bytes"] for t_s in (0.5, 2.0, 2.1, 9.0)] == [
        10,
        20,
        30,
        30,
    ]
    assert sample_at(samples.iloc[:0], 1.0) is None


# recordings made of forecasts ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "checkpoint", "lomo", "lora", "galore"])
def test_a_timeline_as_the_recorder_would_have_brought_it_home(name):
    metered, _, _ = recorded(REGIMES[name], steps=2)
    frame, wanted = (
        as_recorded(metered)[0].frame(),
        metered[metered["bytes"] > 0].reset_index(drop=True),
    )
    same = ["step", "event", "bytes", "live_bytes", "category", "phase"]
    assert (frame[same] == wanted[same]).all(axis=None) and set(frame["source"]) == {"simulated"}
    assert compare(frame, metered).divergences == ()
    timeless = as_recorded(metered.drop(columns="t_s"))[0].frame()  # as forecasts are kept
    pd.testing.assert_frame_equal(timeless.drop(columns="t_s"), frame.drop(columns="t_s"))
