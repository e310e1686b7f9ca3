"""Replaying recorded snapshots: exact on what an independent allocator wrote, honest where it is
not, deaf to hostile files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slow_allocator import MIB, Full, SlowAllocator
from vramlab.allocator.replay import Divergence, Replay, replay_file
from vramlab.allocator.safe_pickle import _DataOnly
from vramlab.allocator.snapshot import read_snapshot
from vramlab.cli import main

BASE, RECORDED = 0x7F0000000000, Path(__file__).parent / "recorded" / "snapshots"
ROWS = {
    "native": {},
    "full": {"capacity": 300 * MIB},
    "max_split": {"max_split": 24 * MIB},
    "max_split_full": {"max_split": 24 * MIB, "capacity": 250 * MIB},
    "expandable": {"expandable": True},
    "expandable_full": {"expandable": True, "capacity": 300 * MIB},
    "divisions": {"divisions": 4},
    "large": {"large": 32 * MIB},
    "down": {"places": "down"},
    "both": {"places": "both", "capacity": 300 * MIB},
    "reuse": {"reuse": True, "capacity": 250 * MIB},
}


def _recorded(seed=0, events=250, **settings):
    """A program of several streams in the slow allocator; it keeps the trace."""
    chance, slow, live, waiting = random.Random(seed), SlowAllocator(**settings), [], []
    for _ in range(events):
        luck = chance.random()
        if luck < 0.5:
            size = chance.choice(
                [
                    chance.randrange(1, 3000),
                    chance.randrange(1, 2 * MIB),
                    chance.randrange(MIB, 12 * MIB),
                    chance.randrange(8 * MIB, 60 * MIB),
                    512,
                    MIB,
                    MIB + 1,
                    10 * MIB,
                    20 * MIB,
                ]
            )
            with contextlib.suppress(Full):
                live.append(slow.malloc(size, chance.choice([0, 0, 7])))
            waiting = [
                block[0]
                for segment in slow.segments
                for block in segment["blocks"]
                if block[2] == "waits"
            ]
        elif luck < 0.9 and live:
            address = live.pop(chance.randrange(len(live)))
            slow.request(address)
            if chance.random() < 0.2:
                waiting.append(address)
            else:
                slow.complete(address)
        elif luck < 0.96 and waiting:
            slow.complete(waiting.pop(chance.randrange(len(waiting))))
        elif luck > 0.97:
            slow.empty()
            waiting = []
    return slow


def _dumped(tmp_path, snapshot, protocol=4):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot, protocol=protocol))
    return path


def _peak(snapshot):
    """Reserved bytes at their highest, from the segment events of a trace recorded from the
    start."""
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    return max(
        np.cumsum(
            [
                signs.get(event["action"], 0) * event["size"]
                for event in snapshot["device_traces"][0]
            ]
        )
    )


# replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("row", ROWS)
def test_replay_is_exact_on_what_an_independent_allocator_recorded(tmp_path, row, seed):
    snapshot = _recorded(seed, **ROWS[row]).dump()
    found = replay_file(_dumped(tmp_path, snapshot))
    assert (found.max_error, found.first_divergence, found.events) == (
        0.0,
        None,
        len(snapshot["device_traces"][0]),
    )
    assert found.recorded_peak_bytes == found.simulated_peak_bytes == _peak(snapshot) > 0
    assert found.recorded_allocated_bytes == found.simulated_allocated_bytes and (
        found.missing_bytes,
        found.note,
    ) == (0, "")
    assert (
        found.verdict()
        == f"exact: recorded and simulated reserved bytes agree after each of {found.events:,}"
        " events"
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("row", ROWS)
def test_replay_is_exact_when_recording_began_late(tmp_path, row, seed):
    slow = _recorded(seed, **ROWS[row])
    last = max(at for at, event in enumerate(slow.trace) if event["action"] == "alloc")
    for first in (len(slow.trace) // 3, len(slow.trace) * 2 // 3, last):
        found = replay_file(_dumped(tmp_path, slow.dump(first)))
        assert (found.max_error, found.events) == (0.0, len(slow.trace) - first)
    assert found.recorded_peak_bytes >= slow.reserved


def test_equally_large_blocks_are_told_apart_by_the_recorded_addresses(tmp_path):
    """A public snapshot, reduced to numbers: 71 % of its large segments lie below the one
    before."""
    path = tmp_path / "equal_blocks.pickle"
    path.write_bytes(gzip.decompress((RECORDED / "equal_blocks.pickle.gz").read_bytes()))
    found = replay_file(path)
    assert (found.recorded_peak_bytes, found.simulated_peak_bytes) == (5_802_819_584, 5_802_819_584)
    assert (found.first_divergence, found.max_error, found.events) == (None, 0.0, 9_576)
    assert found.recorded_allocated_bytes == found.simulated_allocated_bytes == 215_105_536


def test_a_retry_does_not_look_at_what_it_has_just_completed(tmp_path):
    slow = SlowAllocator(capacity=60 * MIB)
    slow.free(slow.malloc(40 * MIB))
    _, awaited = slow.malloc(15 * MIB), slow.malloc(15 * MIB)  # and 10 MiB left in the same segment
    slow.request(awaited)
    slow.free(slow.malloc(12 * MIB))
    slow.malloc(
        18 * MIB
    )  # full: the awaited block is completed, 12 MiB returned, 18 asked for; though 25 are free by now
    assert (slow.reserved, slow.retries) == (58 * MIB, 1)
    assert replay_file(_dumped(tmp_path, slow.dump())).max_error == 0.0


def test_oversize_blocks_go_first_and_the_rest_after_what_was_awaited(tmp_path):
    slow = SlowAllocator(max_split=32 * MIB, capacity=100 * MIB)
    slow.free(slow.malloc(40 * MIB))
    _, awaited = slow.malloc(30 * MIB), slow.malloc(20 * MIB)
    slow.request(awaited)
    slow.malloc(
        70 * MIB
    )  # 40 MiB are not enough; the awaited block is completed, then its segment returned
    assert [event["action"] for event in slow.trace[-5:]] == [
        "segment_free",
        "free_completed",
        "segment_free",
        "segment_alloc",
        "alloc",
    ]
    assert replay_file(_dumped(tmp_path, slow.dump())).max_error == 0.0


def _tiled(*halves_mib):
    """Blocks that tile one segment of 40 MiB. Sizes: in halves of a MiB."""
    slow = SlowAllocator()
    slow.free(slow.malloc(40 * MIB))
    return slow, [slow.malloc(size * MIB // 2) for size in halves_mib]


def _rest_of_a_block_is_not_free():
    slow, (first, second, _) = _tiled(20, 20, 40)
    slow.free(first)
    first, begin = slow.malloc(19 * MIB // 2), len(slow.trace)  # 9.5 MiB in 10
    slow.free(second)
    slow.malloc(21 * MIB // 2)  # would fit in 10.5
    slow.free(first)
    return slow, begin


def _rest_before_a_free_block_shows_by_what_is_cut_from_it():
    slow, (first, second, _) = _tiled(20, 20, 40)
    slow.free(first)
    first = slow.malloc(19 * MIB // 2)
    slow.free(second)
    begin = len(slow.trace)
    slow.malloc(2 * MIB)
    slow.malloc(33 * MIB // 4)  # 8.25 would fit in 8.5
    slow.free(first)
    return slow, begin


def _what_is_cut_later_shows_nothing():
    slow, (first, second, _) = _tiled(20, 20, 40)
    slow.free(second)
    begin = len(slow.trace)
    slow.free(slow.malloc(10 * MIB))
    slow.free(first)
    slow.malloc(21 * MIB // 2)
    slow.malloc(2 * MIB)  # half a MiB behind where the first block ended
    return slow, begin


def _small_page_far_from_all_that_is_known():
    slow = SlowAllocator(expandable=True)
    small, large = slow.malloc(1000), slow.malloc(20 * MIB)
    slow.free(small)
    begin = len(slow.trace)
    slow.free(large)
    slow.empty()
    slow.malloc(20 * MIB)
    return slow, begin


@pytest.mark.parametrize(
    "program",
    [
        _rest_of_a_block_is_not_free,
        _rest_before_a_free_block_shows_by_what_is_cut_from_it,
        _what_is_cut_later_shows_nothing,
        _small_page_far_from_all_that_is_known,
    ],
)
def test_the_beginning_is_found_from_the_trace(tmp_path, program):
    slow, begin = program()
    assert replay_file(_dumped(tmp_path, slow.dump(begin))).first_divergence is None


def test_replay_reports_how_far_it_was_off_and_where_first(tmp_path):
    slow = SlowAllocator()
    first, _, third = slow.malloc(30 * MIB), slow.malloc(5 * MIB), slow.malloc(70 * MIB)
    slow.free(third)
    slow.free(first)
    snapshot = slow.dump()
    trace, big = (
        snapshot["device_traces"][0],
        next(s for s in snapshot["segments"] if s["total_size"] == 70 * MIB),
    )
    trace.insert(
        1, {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": []}
    )  # it moves nothing, but has a place
    trace[5]["size"] = big["total_size"] = big["blocks"][0]["size"] = (
        90 * MIB
    )  # as if 70 MiB had been served by 90
    found = replay_file(_dumped(tmp_path, snapshot))
    assert found.first_divergence == Divergence(6, "alloc", 140 * MIB, 120 * MIB)
    assert (found.recorded_peak_bytes, found.simulated_peak_bytes, found.max_error) == (
        140 * MIB,
        120 * MIB,
        20 / 140,
    )
    assert found.error == 20 / 140 and found.agrees(0.15) and not found.agrees(0.14)
    assert (
        found.verdict(0.15)
        == "within 15.00%: peak reserved and final allocated bytes are off by at most 14.29%;"
        " diverges at event 6 (alloc), 146,800,640 bytes reserved and 125,829,120 simulated,"
        " because the trace asked the device for more, where the simulator used a cached block"
        " or a smaller segment"
    )
    assert found.verdict().startswith("beyond 1.00%: ")


CAUSES = {
    ("alloc", 5): "the simulator had no cached block that fits",
    ("alloc", 3): "the trace asked the device for more",
    ("segment_free", 5): "the simulator could return less",
    ("segment_unmap", 3): "the simulator could return more",
}


@pytest.mark.parametrize(("action", "simulated"), CAUSES)
def test_a_divergence_has_a_cause_in_words(action, simulated):
    assert Divergence(0, action, 4, simulated).cause.startswith(CAUSES[action, simulated])


def test_a_verdict_says_what_was_not_checked():
    whole = Replay(0, 10, 100, 100, 50, 50, 0.0, None, 0, "")
    assert whole.agrees(0) and whole.verdict(0).endswith("after each of 10 events")
    assert replace(whole, note="but not why").verdict().endswith("each of 10 events; but not why")
    assert (
        replace(whole, missing_bytes=-512)
        .verdict()
        .startswith("cannot be judged: the segments at the end have -512 bytes")
    )
    assert not replace(whole, missing_bytes=-512).agrees(1)
    allocated = replace(whole, simulated_allocated_bytes=49)
    assert allocated.error == 0.02 and not allocated.agrees() and allocated.agrees(0.02)
    assert (
        allocated.verdict(0.02)
        == "within 2.00%: peak reserved and final allocated bytes are off by at most 2.00%;"
        " recorded and simulated reserved bytes agree after each of 10 events"
    )
    assert replace(whole, recorded_allocated_bytes=0).error == 1.0


def _skipping(*actions):
    slow = SlowAllocator(reuse=True)
    for _ in range(2):
        for size in (30 * MIB, 5 * MIB, 40 * MIB):
            slow.free(slow.malloc(size))
        slow.empty()
    slow.malloc(1000)
    snapshot = slow.dump()
    snapshot["device_traces"] = [
        [event for event in snapshot["device_traces"][0] if event["action"] not in actions]
    ]
    return snapshot


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        (
            ["segment_alloc"],
            (
                "belongs to two segments at once: the trace lacks segment_alloc entries; .* without"
                " skip_actions"
            ),
        ),
        (
            ["alloc"],
            (
                "none of the 21 entries of device 0 allocates memory, so there is nothing to"
                " replay: .* without skip_actions"
            ),
        ),
    ],
)
def test_a_trace_without_what_a_replay_needs_is_refused(tmp_path, actions, says):
    with pytest.raises(ValueError, match=f"snapshot.pickle: .*{says}"):
        replay_file(_dumped(tmp_path, _skipping(*actions)))


def test_a_trace_without_returned_segments_is_not_called_exact(tmp_path, capsys):
    path = _dumped(tmp_path, _skipping("segment_free"))
    assert main(["replay", str(path)]) == 1
    assert (
        "cannot be judged: the segments at the end have -146,800,640 bytes"
        in capsys.readouterr().out
    )


def test_a_trace_without_any_segment_entry_says_what_the_verdict_is_about(tmp_path):
    found = replay_file(_dumped(tmp_path, _skipping("segment_alloc", "segment_free")))
    assert (
        not found.agrees()
        and "skip_actions left segment_alloc out), so this is about cached memory alone"
        in found.verdict()
    )


def test_a_late_recording_says_what_was_reserved_before(tmp_path):
    slow = SlowAllocator()
    slow.malloc(30 * MIB)
    begin = len(slow.trace)
    slow.malloc(12 * MIB)
    found = replay_file(_dumped(tmp_path, slow.dump(begin)))
    assert (
        found.note
        == "31,457,280 bytes were reserved before the recording began, and their blocks are"
        " reconstructed"
    )
    assert (
        found.verdict()
        == "exact: recorded and simulated reserved bytes agree after each of 2 events;"
        f" {found.note}"
    )


def test_the_command_imports_neither_torch_nor_pandas(tmp_path):
    path = _dumped(tmp_path, _recorded().dump())
    code = (
        "import sys\nfrom vramlab.cli import main\n"
        "assert main(['replay', sys.argv[1]]) == 0\n"
        "print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "set()"


def test_a_trace_of_entries_that_move_nothing_is_refused(tmp_path):
    snapshot = {
        "segments": [],
        "device_traces": [[{"action": "snapshot", "addr": 0, "size": 0, "stream": 0}]],
    }
    with pytest.raises(
        ValueError, match="snapshot.pickle: none of the 0 entries of device 0 allocates memory"
    ):
        replay_file(_dumped(tmp_path, snapshot))


def test_the_command_fails_beyond_the_tolerance(tmp_path, capsys):
    slow = SlowAllocator()
    slow.malloc(30 * MIB)
    snapshot = slow.dump()
    snapshot["device_traces"][0][0]["size"] = snapshot["segments"][0]["total_size"] = 32 * MIB
    snapshot["segments"][0]["blocks"][0]["size"] = 32 * MIB
    path = _dumped(tmp_path, snapshot)
    assert [main(["replay", str(path), "--tolerance", text]) for text in ("0.0625", "0.0624")] == [
        0,
        1,
    ]
    printed = capsys.readouterr().out
    assert (
        "within 6.25%: " in printed
        and "beyond 6.24%: " in printed
        and "diverges at event 1 (alloc)" in printed
    )


def test_old_snapshots_without_later_fields_replay_the_same(tmp_path):
    snapshot = _recorded(3, **ROWS["full"]).dump(100)
    for event in snapshot["device_traces"][0]:
        for key in ("time_us", "user_metadata", "compile_context"):
            del event[key]
    for segment in snapshot["segments"]:
        for key in ("segment_pool_id", "is_expandable", "device", "requested_size"):
            del segment[key]
        for block in segment["blocks"]:
            del block["address"], block["requested_size"]
            block["state"] = block["state"].replace("awaiting", "pending")
    del snapshot["external_annotations"], snapshot["allocator_settings"]
    assert replay_file(_dumped(tmp_path, snapshot, protocol=2)).max_error == 0.0


@pytest.mark.parametrize("skipped", ["free_requested", "free_completed"])
def test_traces_that_skip_an_action_replay(tmp_path, skipped):
    slow = SlowAllocator()
    for size in (30 * MIB, 5 * MIB, 30 * MIB, 1000, 30 * MIB):
        slow.free(slow.malloc(size))
    snapshot = slow.dump()
    snapshot["device_traces"] = [
        [event for event in snapshot["device_traces"][0] if event["action"] != skipped]
    ]
    assert replay_file(_dumped(tmp_path, snapshot)).max_error == 0.0


def test_private_pools_do_not_share_blocks(tmp_path):
    slow = SlowAllocator()
    slow.free(slow.malloc(20 * MIB, stream=0))
    slow.malloc(20 * MIB, stream=5)  # in a pool of its own, below: it finds nothing cached
    snapshot = slow.dump()
    for item in [*snapshot["device_traces"][0], *snapshot["segments"]]:
        name = "pool_id" if "action" in item else "segment_pool_id"
        item[name] = (0, 1) if item["stream"] == 5 else (0, 0)
        item["stream"] = 0
    found = replay_file(_dumped(tmp_path, snapshot))
    assert (found.max_error, found.simulated_peak_bytes) == (0.0, 40 * MIB)


def test_each_device_is_replayed_by_itself(tmp_path):
    one, two = _recorded(1).dump(), _recorded(2, expandable=True).dump(device=2)
    both = {
        "segments": [*one["segments"], *two["segments"]],
        "device_traces": [one["device_traces"][0], *two["device_traces"][1:]],
    }
    path = _dumped(tmp_path, both)
    with pytest.raises(
        ValueError, match="several devices have events: choose with --device, one of 0, 2"
    ):
        replay_file(path)
    with pytest.raises(
        ValueError, match="device 1 has no events: choose with --device, one of 0, 2"
    ):
        replay_file(path, 1)
    assert [replay_file(path, device).max_error for device in (0, 2)] == [0.0, 0.0]
    assert replay_file(path, 2).events == len(two["device_traces"][2])
    assert replay_file(_dumped(tmp_path, two)).device == 2


def test_the_command_prints_what_was_found(tmp_path, capsys):
    snapshot = _recorded(4).dump()
    path = _dumped(tmp_path, snapshot)
    assert main(["replay", str(path), "--json"]) == 0
    peak = int(_peak(snapshot))
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "verdict": replay_file(path).verdict(),
        "agrees": True,
        "tolerance": 0.01,
        "error": 0.0,
        "allocated_end_bytes": dict.fromkeys(
            ("recorded", "simulated"), replay_file(path).recorded_allocated_bytes
        ),
        "device": 0,
        "events": len(snapshot["device_traces"][0]),
        "reserved_peak_bytes": {"recorded": peak, "simulated": peak},
        "max_error": 0.0,
        "first_divergence": None,
    }
    assert main(["replay", str(path), "--device", "0"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("exact: ")
        and f'reserved_peak_bytes: {{"recorded": {peak}, "simulated": {peak}}}\n' in printed
    )
    assert [
        main(["replay", str(path), "--tolerance", text]) for text in ("0", "nan", "-1", "inf")
    ] == [0, 2, 2, 2]
    assert (
        "vramlab replay: tolerance is nan: it must be a number from 0 on" in capsys.readouterr().err
    )
    assert main(["replay", str(tmp_path / "none.pickle")]) == 2
    assert "vramlab replay: no snapshot" in capsys.readouterr().err


# files that are no snapshots ----------------------------------------------------------------------


class _Runs:
    """What a hostile pickle does: anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused_and_not_run(tmp_path, protocol):
    path = _dumped(
        tmp_path, {"segments": [], "device_traces": [[_Runs(tmp_path / "ran")]]}, protocol
    )
    with pytest.raises(
        ValueError, match="snapshot.pickle: byte .* which no snapshot has.*record one with"
    ):
        replay_file(path)
    with pytest.raises(pickle.UnpicklingError, match="it names .*system"):
        _DataOnly(io.BytesIO(path.read_bytes())).load()  # even if the first check let it through
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.int64(5),
        np.zeros(3),
        {1, 2},
        frozenset([1]),
        b"bytes",
        bytearray(3),
        (1, 2, 3),
        ((1, 2), 3),
        2**200,
        complex(1, 2),
        print,
    ],
    ids=str,
)
def test_values_that_no_snapshot_has_are_refused(tmp_path, value):
    with pytest.raises(
        ValueError, match="which no snapshot has: this is not what _dump_snapshot writes"
    ):
        read_snapshot(_dumped(tmp_path, {"segments": [], "device_traces": [[{"size": value}]]}))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    data = pickle.dumps(_recorded(0, 30).dump(), protocol=4)
    path = tmp_path / "cut.pickle"
    for end in range(1, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="cut.pickle: the file ends in the middle"):
            read_snapshot(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty: its dump did not finish"),
        (gzip.compress(b"any"), "this is gzip: gunzip it first"),
        (b'{"segments": []}', "this is JSON, not a pickle: record one with"),
        (b" [1]", "this is JSON, not a pickle: record one with"),
        (b"zip", "byte 0 is 0x7a, which no snapshot has"),
        (pickle.dumps({}) + b"more", "byte .* is 0x2e"),
        (b"\x80\x04.", r"the pickle is damaged \(UnpicklingError"),
        (b"\x80\x04}]K\x05s.", r"the pickle is damaged \(TypeError"),  # a list as a key
        (b"\x80\x04h\x07.", r"the pickle is damaged"),  # names what was never put
    ],
    ids=["empty", "gzip", "json", "list", "text", "trailing", "bare", "unhashable", "memo"],
)
def test_files_that_are_no_pickle_say_so(tmp_path, data, says):
    path = tmp_path / "wrong.pickle"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"wrong.pickle: {says}"):
        read_snapshot(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]r" + struct.pack("<I", 0xFFFFFFF0) + b".",  # a memo of 4 billion entries
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",  # a string of a tebibyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",  # bytes
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # bytearray
        b"\x80\x04)"
        + b"\x94h\x00\x86" * 60
        + b".",  # a tuple of two of a tuple of two of ...: its hash never ends
        b"\x80\x04)" + b"2\x86" * 60 + b".",
    ],
    ids=["memo", "string", "bytes", "bytearray", "tuples", "duplicates"],
)
def test_bombs_are_refused_before_they_go_off(tmp_path, data):
    path = tmp_path / "bomb.pickle"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(ValueError, match="bomb.pickle: "):
        read_snapshot(path)
    assert time.process_time() - began < 1


def test_lists_that_are_named_over_and_over_are_refused(tmp_path):
    blocks = [{"size": 512, "state": "inactive"}] * 20_000
    segment = {
        "address": BASE,
        "total_size": 512 * 20_000,
        "stream": 0,
        "segment_type": "small",
        "blocks": blocks,
    }
    path = _dumped(
        tmp_path, {"segments": [segment] * 20_000, "device_traces": [[{"action": "alloc"}]]}
    )
    assert path.stat().st_size < 200_000
    with pytest.raises(
        ValueError, match="events, segments and blocks in .* bytes, fewer than 16 each"
    ):
        read_snapshot(path)


def test_a_file_above_the_limit_is_not_read_and_the_limit_can_be_raised(tmp_path, capsys):
    path = _dumped(tmp_path, _recorded(0, 40).dump())
    with path.open("r+b") as file:
        file.truncate(2 * MIB + 1)  # a hole: no disk is used
    assert main(["replay", str(path), "--max-mib", "2"]) == 2
    said = capsys.readouterr().err
    assert (
        f"{path}: 2097153 bytes, more than the 2097152" in said
        and "max_entries" in said
        and "--max-mib" in said
    )
    assert main(["replay", str(path), "--max-mib", "3"]) == 2
    assert "more than" not in capsys.readouterr().err


EVENT = {"action": "alloc", "addr": BASE, "size": 512, "stream": 0}
SEGMENT = {
    "address": BASE,
    "total_size": 512,
    "stream": 0,
    "segment_type": "small",
    "blocks": [{"size": 512, "state": "inactive"}],
}


@pytest.mark.parametrize(
    ("snapshot", "says"),
    [
        (
            [SEGMENT],
            (
                r"this is a list of segments without a history, as torch.cuda.memory_snapshot\(\)"
                r" returns it"
            ),
        ),
        ("text", "the snapshot has no fields"),
        (
            {"segments": []},
            "the snapshot has device_traces None, and needs device_traces as list: this",
        ),
        (
            {"segments": {}, "device_traces": [[EVENT]]},
            "the snapshot has segments {}, and needs segments as list",
        ),
        (
            {"segments": [], "device_traces": []},
            "no device has events: history was not recorded; record it with",
        ),
        ({"segments": [], "device_traces": [[], []]}, "no device has events"),
        ({"segments": [], "device_traces": [5]}, "device_traces must be one list a device"),
        ({"segments": [], "device_traces": [["alloc"]]}, "event 0 has no fields"),
        (
            {"segments": [], "device_traces": [[EVENT, {**EVENT, "size": "512"}]]},
            "event 1 has size '512', and needs size as int",
        ),
        (
            {"segments": [], "device_traces": [[{**EVENT, "size": True}]]},
            "event 0 has size True, and needs size as int",
        ),
        (
            {"segments": [], "device_traces": [[{**EVENT, "action": "segment_free", "size": 0}]]},
            "event 0 has size 0, and needs size as int in range.1,",
        ),
        ({"segments": [], "device_traces": [[{**EVENT, "addr": -1}]]}, "event 0 has addr -1"),
        (
            {"segments": [], "device_traces": [[{**EVENT, "size": (1 << 44) + 1}]]},
            "event 0 has size 17592186044417, and needs",
        ),
        (
            {"segments": [], "device_traces": [[{**EVENT, "size": 1 << 64}]]},
            "byte .* is 0x8a, which no snapshot has",
        ),
        (
            {"segments": [{**SEGMENT, "segment_type": "huge"}], "device_traces": [[EVENT]]},
            "segment 0 has segment_type 'huge', and needs segment_type as str in .'small'",
        ),
        (
            {"segments": [{**SEGMENT, "device": "0"}], "device_traces": [[EVENT]]},
            "segment 0 has device '0', and needs device as int",
        ),
        (
            {
                "segments": [{**SEGMENT, "blocks": [{"size": 512, "state": "free"}]}],
                "device_traces": [[EVENT]],
            },
            "a block of segment 0 has state 'free', and needs state as str in .'active_allocated'",
        ),
        (
            {"segments": [SEGMENT, SEGMENT], "device_traces": [[EVENT]]},
            "0x7f0000000000 belongs to two segments at once",
        ),
        (
            {"segments": [SEGMENT], "device_traces": [[EVENT]], "allocator_settings": []},
            "the snapshot has allocator_settings .., and needs",
        ),
        (
            {
                "segments": [SEGMENT],
                "device_traces": [[EVENT]],
                "allocator_settings": {"PYTORCH_ALLOC_CONF": 5},
            },
            "allocator_settings has PYTORCH_ALLOC_CONF 5, and needs PYTORCH_ALLOC_CONF as str",
        ),
        (
            {"segments": [{**SEGMENT, "blocks": [7]}], "device_traces": [[EVENT]]},
            "a block of segment 0 has no fields",
        ),
        (
            {"segments": [{**SEGMENT, "total_size": 1024}], "device_traces": [[EVENT]]},
            "segment 0 has 1024 bytes and its blocks 512",
        ),
        (
            {
                "segments": [SEGMENT],
                "device_traces": [[EVENT]],
                "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "what:1"},
            },
            "what:1 is not simulated",
        ),
    ],
)
def test_a_wrong_schema_names_the_file_and_what_is_wrong(tmp_path, snapshot, says):
    with pytest.raises(ValueError, match=f"snapshot.pickle: .*{says}"):
        replay_file(_dumped(tmp_path, snapshot))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_snapshots_are_replayed_or_refused_but_never_crash(tmp_path, seed):
    chance = random.Random(seed)
    snapshot = _recorded(seed, 60, **ROWS[chance.choice(list(ROWS))]).dump(chance.randrange(40))
    things = [*snapshot["device_traces"][0], *snapshot["segments"]]
    for _ in range(8):
        thing, other = chance.choice(things), chance.choice(things)
        key = chance.choice(["addr", "size", "stream", "address", "action"])
        if key in thing and key in other:
            thing[key] = other[key]
    chance.shuffle(snapshot["segments"])
    del snapshot["device_traces"][0][10:20]
    try:
        found = replay_file(_dumped(tmp_path, snapshot))
    except ValueError as error:
        assert "snapshot.pickle: " in str(error)
    else:
        assert found.max_error >= 0 and found.simulated_peak_bytes >= 0
