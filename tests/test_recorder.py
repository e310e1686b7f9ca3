"""The recorder reads from an allocator's history the timeline that the meter sees from inside. The history is our own simulator's,
live under a training CPU: none of this was run on a GPU."""

from __future__ import annotations

import pytest

from simulated_history import recorded
from vramlab.memory.recording import COLUMNS
from vramlab.regime import read_regimes

REGIMES = read_regimes()
SAME = ["step", "event", "bytes", "live_bytes", "category", "phase"]


def _device(frame):
    return frame[(frame["category"] != "host") & (frame["bytes"] > 0)].reset_index(drop=True)


@pytest.mark.parametrize("name", REGIMES)
def test_the_history_says_what_the_meter_saw(name):
    metered, recorder, _ = recorded(REGIMES[name])
    frame, wanted = recorder.frame(), _device(metered)
    assert tuple(frame.columns) == COLUMNS and frame["t_s"].is_monotonic_increasing
    different = (frame[SAME] != wanted[SAME]).any(axis=1)
    assert not different.any(), (frame[different].head(), wanted[different].head(), different.sum(), len(frame))
    forward = frame["phase"].isin(("init", "forward", "update"))
    assert (frame["module"] == wanted["module"])[forward].all()
    assert recorder.said == []
