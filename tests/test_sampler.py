"""Samples beside a run: on its clock, bounded, and nothing that ends them ends the run. Energy is
within its own bound."""

from __future__ import annotations

import threading
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_nvml
from fake_nvml import GIB, Card, install
from vramlab.capture import nvml_sampler as sampler_module
from vramlab.capture.energy import energy, per_tokens
from vramlab.capture.nvml import COLUMNS, Reader, find
from vramlab.capture.nvml_sampler import Sampler


class Scripted(Reader):
    """A card whose n-th sample is what `script` makes of n."""

    card = "scripted"

    def __init__(self, script):
        super().__init__()
        self.script, self.count = script, 0

    def sample(self) -> dict:
        self.count += 1
        return {**dict.fromkeys(COLUMNS), **self.script(self.count)}


def until(true, timeout_s: float = 5.0) -> None:
    due = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < due
        time.sleep(0.002)


def test_samples_lie_on_the_clock_of_the_steps_and_carry_whole_bytes(monkeypatch):
    install(monkeypatch, Card("Pascal", others=3 * GIB + 1))
    began = time.perf_counter()
    with Sampler(find("cuda:0"), period_s=0.005) as beside:
        until(lambda: len(beside.frame()) >= 10)
    frame = beside.frame()
    assert list(frame) == ["t_s", *COLUMNS] and frame["t_s"].is_monotonic_increasing
    assert began < frame["t_s"].min() and frame["t_s"].max() < time.perf_counter()
    assert frame["t_s"].diff().median() > 0.004  # slower on a busy machine, never faster
    assert set(frame["used_bytes"]) == {3 * GIB + 1} and str(frame["used_bytes"].dtype) == "Int64"
    assert (
        frame["energy_j"].isna().all()
        and frame["process_bytes"].isna().all()
        and (frame["power_w"] == 300).all()
    )


def test_without_a_card_no_thread_runs_and_energy_says_why():
    with Sampler(Reader("NVML: N/A: no card")) as beside:
        assert "nvml" not in {thread.name for thread in threading.enumerate()}
    assert beside.frame().empty and beside.notes == ["NVML: N/A: no card"]
    assert beside.energy_j(0, 3).j is None and "cannot be read" in beside.energy_j(0, 3).how


def test_a_lost_card_ends_the_sampling_and_keeps_what_was_seen(monkeypatch):
    card = Card(others=GIB)
    install(monkeypatch, card)
    with Sampler(find("cuda:0"), period_s=0.002) as beside:
        until(lambda: len(beside.frame()) >= 5)
        card.error = fake_nvml.LOST
        until(lambda: not beside._thread.is_alive())
    assert beside.frame()["used_bytes"].notna().sum() >= 5 and "lost" in beside.notes[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("ending", "words"),
    [(ValueError("odd bytes"), "ValueError: odd bytes"), (SystemExit(), "its thread was ended")],
)
def test_a_thread_that_dies_leaves_its_samples_and_says_so(ending, words):
    def script(n):
        if n > 7:
            raise ending
        return {"used_bytes": n}

    with Sampler(Scripted(script), period_s=0.001) as beside:
        until(lambda: not beside._thread.is_alive())
    assert list(beside.frame()["used_bytes"]) == [1, 2, 3, 4, 5, 6, 7]
    assert beside.notes == [f"sampling stopped after 7 samples: {words}"]


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(sampler_module, "PATIENCE_S", 0.05)
    answer = threading.Event()
    beside = Sampler(
        Scripted(lambda n: {"used_bytes": n} if n < 4 or answer.wait(20) else {}), period_s=0.001
    )
    began = time.monotonic()
    with beside:
        until(lambda: beside.reader.count == 4)
    assert (
        time.monotonic() - began < 5
        and len(beside.frame()) == 3
        and "does not answer" in beside.notes[0]
    )
    answer.set()


def test_rows_are_bounded_and_the_peak_stays():
    def script(n):
        if n == 5000:
            raise EOFError("over")
        return {"used_bytes": 10**9 if n == 1234 else n}

    with Sampler(Scripted(script), period_s=0.0, most_rows=64) as beside:
        until(lambda: beside.reader.count >= 1300, 20)
    frame = beside.frame()
    assert (
        16 < len(frame) < 64
        and frame["used_bytes"].max() == 10**9
        and frame["t_s"].is_monotonic_increasing
    )


def recorded(
    watts,
    seconds: float = 12.0,
    period_s: float = 0.03,
    tick_s: float = 0.1,
    phase_s: float = 0.0,
    **columns,
):
    """What a sampler sees of a card that draws `watts(t)`: a counter that moves every `tick_s`,
    power of the moment."""
    fine = np.arange(0, seconds, 1e-3)
    joules = np.concatenate([[0], np.cumsum(watts(fine) * 1e-3)])
    t = np.arange(phase_s, seconds - 1e-3, period_s)
    counted = joules[(np.floor(t / tick_s) * tick_s / 1e-3).round().astype(int)]
    frame = pd.DataFrame({"t_s": t, "energy_j": counted + 5e6, "power_w": watts(t), **columns})
    return frame, lambda t0, t1: float(joules[round(t1 / 1e-3)] - joules[round(t0 / 1e-3)])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(30, 700), min_size=12, max_size=12),
    st.floats(0.5, 3),
    st.floats(2.01, 8),
    st.floats(0.0, 0.03),
)
def test_the_counter_is_right_to_within_its_own_bound(levels, t0, length, phase):
    frame, true = recorded(
        lambda t: np.asarray(levels)[np.minimum(t.astype(int), 11)], phase_s=phase
    )
    found = energy(frame, t0, t0 + length)
    assert (
        found.how == "the card's counter"
        and abs(found.j - true(t0, t0 + length)) <= found.error_j + 1
    )
    assert found.error_j <= 4 * 0.14 * max(levels) + 1


def test_a_steady_card_is_told_to_two_parts_in_a_hundred():
    frame, true = recorded(lambda t: np.full(len(t), 400.0))
    found = energy(frame, 1.234, 6.789)
    assert true(1.234, 6.789) == pytest.approx(2222, rel=1e-3) and found.j == pytest.approx(
        2222, rel=0.02
    )


def test_without_a_counter_power_is_integrated():
    frame, true = recorded(lambda t: 200 + 100 * np.sin(t))
    frame["energy_j"] = np.nan
    found = energy(frame, 1.0, 9.0)
    assert found.how == "power, integrated" and found.j == pytest.approx(true(1.0, 9.0), rel=0.002)
    assert found.error_j == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize(
    ("spoil", "window", "words"),
    [
        (lambda f: f, (1.0, 2.9), "1.90 s"),
        (lambda f: f[f.t_s > 4], (2.0, 8.0), "do not span"),
        (lambda f: f[f.t_s < 7], (2.0, 8.0), "do not span"),
        (lambda f: f[(f.t_s < 2.5) | (f.t_s > 3.3)], (3.0, 8.0), "s apart"),
        (
            lambda f: f.assign(energy_j=f.energy_j.where(f.t_s < 5, 7.0), power_w=np.nan),
            (2.0, 8.0),
            "set back",
        ),
        (lambda f: f.assign(energy_j=np.nan, power_w=np.nan), (2.0, 8.0), "cannot be read"),
    ],
)
def test_a_window_that_cannot_be_told_is_na_with_the_reason(spoil, window, words):
    found = energy(spoil(recorded(lambda t: np.full(len(t), 300.0))[0]), *window)
    assert found.j is None and found.error_j is None and words in found.how


def test_a_gap_in_the_middle_costs_the_counter_nothing():
    frame, true = recorded(lambda t: np.full(len(t), 300.0))
    found = energy(frame[(frame.t_s < 4) | (frame.t_s > 6)], 2.0, 9.0)
    assert found.how == "the card's counter" and found.j == pytest.approx(true(2.0, 9.0), rel=0.02)


def test_joules_for_a_thousand_tokens_are_over_whole_steps_with_the_spread_of_windows():
    frame, _ = recorded(lambda t: np.where(t < 6, 200.0, 400.0))
    frame["temperature_c"] = 30 + frame["t_s"]
    steps = pd.DataFrame({"t_s": np.arange(1, 11, 0.5), "step_s": 0.45, "tokens": 500})
    found = per_tokens(steps, frame)
    # 5 s at 200 W and 4.95 s at 400 W, 20 steps of 500 tokens
    assert found["j_per_1000_tokens"] == pytest.approx((5 * 200 + 4.95 * 400) / 10, rel=0.02)
    assert found["windows"] == 4 and 195 < found["q25"] < found["q75"] < 410
    assert found["start_temperature_c"] == pytest.approx(31, abs=0.03)
    short = per_tokens(steps.head(3), frame)
    assert short["j_per_1000_tokens"] is None and short["windows"] == 0 and "1.45 s" in short["how"]
