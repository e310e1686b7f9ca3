"""What a timeline says, by value: one of six events, with the host's beside the device's."""

from __future__ import annotations

import pandas as pd
import pytest

from vramlab.timeline import events as timeline

ROWS = [
    ("alloc", 40, 0, 0, "weights", "layers.10.mlp", "init"),
    ("alloc", 500, 1, 0, "host", "", "init"),
    ("alloc", 100, 2, 0, "activations", "layers.2.mlp", "forward"),
    ("free", 100, 2, 1, "activations", "layers.2.mlp", "backward"),
    ("alloc", 100, 3, 1, "gradients", "layers.3.mlp", "backward"),
    ("alloc", 0, 4, 1, "temporaries", "", "update"),
]


def frame() -> pd.DataFrame:
    made = pd.DataFrame(
        ROWS, columns=["event", "bytes", "storage", "step", "category", "module", "phase"]
    ).assign(op="o")
    return made.assign(live_bytes=timeline.live_bytes(made))


def test_live_bytes_and_peaks_are_the_devices():
    assert (
        frame()["live_bytes"].tolist() == [40, 40, 140, 40, 140, 140]
        and timeline.host_peak_bytes(frame()) == 500
    )
    assert (
        timeline.host_peak_bytes(frame().iloc[:0])
        == 0
        == timeline.host_peak_bytes(frame().iloc[:1])
    )
    assert [timeline.peak_event(frame(), step) for step in (None, 0, 1)] == [2, 2, 4]
    found = timeline.peak(frame(), 1)
    assert (found["peak_bytes"], found["phase"], found["step"]) == (140, "backward", 1)
    assert list(found["categories"].items()) == [("gradients", 100), ("weights", 40)]
    assert dict(timeline.alive_after(frame(), 5)) == dict(found["alive"]), (
        "what has no bytes has no owner"
    )


def test_blocks_are_one_owner_and_the_largest_come_first():
    alive = timeline.peak(frame())["alive"] | {
        ("layers.7.mlp", "weights", "p"): 30,
        ("head", "weights", "o"): 60,
    }
    assert timeline.largest_owners(alive, 2) == [
        ("activations", "layers.*.mlp", 100),
        ("weights", "layers.*.mlp", 70),
    ]
    many = pd.concat([frame()] * 3).assign(
        event="alloc", storage=range(18), module=list("abcdefghijklmnopqr"), category="weights"
    )
    owners = timeline.peak_owners(many.assign(live_bytes=timeline.live_bytes(many)))["owners"]
    assert [owner["bytes"] for owner in owners] == [500] * 3 + [100] * 5


@pytest.mark.parametrize(
    ("phase", "survived", "category"),
    [
        ("forward", True, "activations"),
        ("recompute", True, "activations"),
        ("forward", False, "temporaries"),
        ("backward", True, "temporaries"),
        ("update", False, "temporaries"),
    ],
)
def test_the_category_by_lifetime(phase, survived, category):
    assert timeline.by_lifetime(phase, survived) == category
