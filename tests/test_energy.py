"""Joules by value, on readings simple enough to be added up by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vramlab.capture.energy import energy, per_tokens


def readings(
    seconds: float = 10.0, period_s: float = 0.25, watts: float = 100.0, **columns
) -> pd.DataFrame:
    """A counter that moves at every reading, by what `watts` amount to since the last."""
    t = np.arange(0, seconds + period_s / 2, period_s)
    return pd.DataFrame(
        {
            "t_s": t,
            "energy_j": 1000 + watts * t,
            "power_w": watts,
            "temperature_c": 40 + t,
            **columns,
        }
    )


def test_the_counter_between_two_moves_is_a_straight_line_and_its_edges_are_two_moves_wide():
    found = energy(readings(), 2.1, 5.6)
    assert (found.j, found.how) == (pytest.approx(350), "the card's counter")
    assert found.error_j == pytest.approx(2 * 2 * 25), (
        "at either edge from the move before to the second after"
    )


def test_the_error_at_the_end_of_the_readings_has_one_move_less_to_lean_on():
    assert energy(readings(), 2.1, 10.0).error_j == pytest.approx(50 + 25)


def test_the_error_at_the_first_move_has_one_less_before_it_to_lean_on():
    assert energy(readings(), 0.25, 5.6).error_j == pytest.approx(25 + 50)


def test_the_first_reading_is_no_move_and_the_smallest_move_is_one():
    assert energy(readings(), 0.1, 5.6).how == "power, integrated", (
        "the counter is first seen to move at .25 s"
    )
    found = energy(readings(watts=2.0), 2.1, 5.6)
    assert (found.j, found.how) == (pytest.approx(7), "the card's counter")


def test_a_gap_behind_the_first_reading_counts():
    frame = readings()
    assert energy(frame[~frame["t_s"].isin([0.25, 0.5])], 0.0, 5.6).j is None


def test_power_is_added_up_by_trapezium():
    frame = readings(energy_j=np.nan)
    frame["power_w"] = 100 + 20 * frame["t_s"]
    found = energy(frame, 2.1, 5.6)
    assert found.how == "power, integrated"
    assert found.j == pytest.approx(
        100 * 3.5 + 10 * (5.6**2 - 2.1**2)
    ) and found.error_j == pytest.approx(2 * 20 * 3.5)
    jump = pd.DataFrame(
        {
            "t_s": [0.0, 0.5, 1.0, 1.5, 2.0],
            "power_w": [100.0, 100, 300, 100, 100],
            "energy_j": np.nan,
        }
    )
    assert energy(jump, 0.0, 2.0).j == pytest.approx(4 * 0.5 * 100 + 2 * 0.5 * 0.5 * 200)


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ((1.0, 2.999), "2.00 s, and 2 s are the shortest"),
        ((1.0, 3.0), ""),
        ((-0.001, 5.0), "do not span"),
        ((0.25, 5.0), ""),
        ((5.0, 10.001), "do not span"),
        ((5.0, 10.0), ""),
    ],
)
def test_a_window_is_told_up_to_its_limits_and_not_beyond(window, words):
    found = energy(readings(), *window)
    assert (found.j is None) == bool(words) and words in found.how


@pytest.mark.parametrize(
    ("missing", "by_counter", "by_power"),
    [
        ((), True, True),
        (
            (4.0, 4.25),
            True,
            False,
        ),  # a gap of .75 s inside the window: an integral leans on it, a counter does not
        ((4.25,), True, True),  # .50 s is the longest that is allowed
        ((2.0, 2.25), False, False),
        ((1.75, 2.0), False, False),  # the first edge, at 2.1, lies in the gap
        ((1.25, 1.5), True, True),  # wholly before it
        ((5.75, 6.0), False, False),
        ((5.5, 5.75), False, False),
        ((6.0, 6.25), True, True),
    ],
)
def test_gaps_count_where_the_window_leans_on_them(missing, by_counter, by_power):
    frame = readings()
    frame = frame[~frame["t_s"].isin(missing)]
    for column, told in (("power_w", by_counter), ("energy_j", by_power)):
        assert (energy(frame.assign(**{column: np.nan}), 2.1, 5.6).j is not None) == told, column
    if not by_counter:
        assert energy(frame, 2.1, 5.6).how.count("0.75 s apart") == 2


def test_a_counter_that_stands_is_used_where_it_moves():
    frame = readings()
    frame["energy_j"] = frame["energy_j"] // 50 * 50  # every second reading shows no move
    assert energy(frame, 2.1, 5.6).j == pytest.approx(350)
    assert energy(frame, 2.1, 5.6).error_j == pytest.approx(4 * 50)


def test_joules_for_a_thousand_tokens_by_hand():
    steps = pd.DataFrame(
        {"t_s": [1.0, 2.0, 3.0, 4.0, 5.0], "step_s": 1.0, "tokens": [100, 100, 300, 300, 200]}
    )
    found = per_tokens(steps, readings())
    assert found["j_per_1000_tokens"] == pytest.approx(500) and found[
        "error_j_per_1000_tokens"
    ] == pytest.approx(100)
    # windows of just 2 s: 200 J for 200 tokens, then 200 J for 600; the last second is too short
    # for a third
    assert found["windows"] == 2 and found["q25"] == pytest.approx(1000 - (1000 - 1000 / 3) * 3 / 4)
    assert (
        found["q75"] == pytest.approx(1000 - (1000 - 1000 / 3) / 4)
        and found["start_temperature_c"] == 41.0
    )
    twice = per_tokens(steps.assign(tokens=2 * steps["tokens"]), readings())
    assert twice["j_per_1000_tokens"] == pytest.approx(250) and twice[
        "error_j_per_1000_tokens"
    ] == pytest.approx(50)
    late = per_tokens(steps.assign(t_s=steps["t_s"] - 1.5), readings())
    assert (
        late["j_per_1000_tokens"] is None
        and late["start_temperature_c"] is None
        and "do not span" in late["how"]
    )
    assert late["windows"] == 0
