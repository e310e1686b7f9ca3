"""Every file that is given to `vramlab replay` ends in a result or in one error that names it, in
bounded time and memory.

The inputs: `BYTES` random damages to the bytes of recorded pickles, `VALUES` random damages to
their structure, pickled whole again, and the hostile files written out below.
"""

from __future__ import annotations

import copy
import os
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
from functools import cache
from itertools import count

import pytest

from slow_allocator import MIB, Full, SlowAllocator
from vramlab.allocator import initial_state as beginning
from vramlab.allocator.replay import Replay, replay_file
from vramlab.cli import main

BYTES, VALUES = 400, 500
SECONDS = 5  # of CPU for one small file; an idle machine needs some milliseconds
PRIME = (1 << 61) - 1  # Python's hash of an int is its rest from this


@cache
def _recorded(seed):
    """A short program of two streams, in one of four kinds of allocator; its recording may begin
    late."""
    chance = random.Random(seed)
    slow, live = (
        SlowAllocator(
            **chance.choice(
                [
                    {},
                    {"expandable": True},
                    {"max_split": 24 * MIB, "capacity": 150 * MIB},
                    {"places": "down"},
                ]
            )
        ),
        [],
    )
    for _ in range(25):
        if chance.random() < 0.6 or not live:
            try:
                live.append(
                    slow.malloc(
                        chance.choice([1000, MIB, 3 * MIB, 12 * MIB, 30 * MIB]),
                        chance.choice([0, 0, 7]),
                    )
                )
            except Full:
                live = []
        else:
            slow.free(live.pop(chance.randrange(len(live))))
    slow.empty()
    slow.malloc(30 * MIB if slow.capacity is None else 512)
    return slow.dump(chance.choice([0, 0, 10]))


def _ends_well(path):
    """The result, or what the error says. Anything else fails the test."""
    began = time.process_time()
    try:
        found = replay_file(path)
        assert isinstance(found, Replay) and found.error >= 0 and found.verdict()
    except ValueError as error:
        found = str(error)
        assert (
            found.startswith(f"{path}: ")
            and 10 < len(found) < len(str(path)) + 2_100
            and "\n" not in found
        )
    assert time.process_time() - began < SECONDS
    return found


def _damaged(data, chance):
    """One to three of: bytes changed, cut out, put in, doubled, brought from elsewhere."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data)), chance.choice([1, 1, 1, 2, 9, 40])
        other = chance.randrange(len(data))
        data[at : at + chance.choice([0, length])] = chance.choice(
            [
                b"",
                chance.randbytes(length),
                data[at : at + length] * 2,
                data[other : other + length],
                b"\xff" * length,
                bytes(
                    chance.choices(b"KMJGhjqr\x8a\x95\x8c\x8dX()}]aesu.N\x85\x86\x87\x94", k=length)
                ),
            ]
        )
        data = data or bytearray(b".")
    return bytes(data)


def test_damaged_bytes_end_in_a_result_or_an_error(tmp_path):
    chance, path, results = random.Random(0), tmp_path / "damaged.pickle", 0
    for number in range(BYTES):
        path.write_bytes(
            _damaged(
                pickle.dumps(_recorded(number % 20), protocol=chance.choice([2, 3, 4, 5])), chance
            )
        )
        results += isinstance(_ends_well(path), Replay)
    assert 20 < results < BYTES - 100  # some damages change nothing that counts, most do


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    512,
    MIB,
    1 << 44,
    1 << 63,
    (1 << 64) - 1,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "alloc",
    "inactive",
    "large",
    "x" * 5_000,
    "expandable_segments:True,max_split_size_mb:20",
    "roundup_power2_divisions:[>:9999999999999999]",
    [],
    {},
    (0, 0),
    (0, 1),
    [[]],
    [{}],
    {"size": 1},
]


def _places(thing, place=()):
    """(place,) of everything inside, at most three entries of a list."""
    items = (
        thing.items()
        if isinstance(thing, dict)
        else enumerate(thing)
        if isinstance(thing, list)
        else ()
    )
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _wrong(snapshot, chance):
    """The same structure with one to three values of another type or size, left out, doubled or
    moved."""
    snapshot = copy.deepcopy(snapshot)
    for _ in range(chance.randint(1, 3)):
        *within, key = chance.choice(
            [place for place in _places(snapshot) if "frames" not in place]
        )
        holder = snapshot
        for step in within:
            holder = holder[step]
        damage = chance.random()
        if damage < 0.6:
            holder[key] = chance.choice(JUNK)
        elif damage < 0.8:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(chance.randrange(len(holder) + 1), holder[key])
        else:
            holder[key] = chance.choice(list(holder.values()))
    return snapshot


def test_wrong_values_end_in_a_result_or_an_error(tmp_path):
    chance, path, results = random.Random(1), tmp_path / "wrong.pickle", 0
    for number in range(VALUES):
        path.write_bytes(pickle.dumps(_wrong(_recorded(number % 20), chance), protocol=4))
        results += isinstance(_ends_well(path), Replay)
    assert 50 < results < VALUES - 100


# written to do harm -------------------------------------------------------------------------------


def _dict_of(keys):
    """A pickle of a dict with these keys, each an instruction or several."""
    return b"\x80\x04}(" + b"".join(key + b"N" for key in keys) + b"u."


def _wide(number):
    return b"\x8a\x09" + number.to_bytes(9, "little")


def _colliding_pairs(length):
    """Pairs of whole numbers that have one hash: the second undoes what the first did to it, by
    CPython's own arithmetic."""
    five, two, one, bits = (
        2870177450012600261,
        14029467366897019727,
        11400714785074694791,
        (1 << 64) - 1,
    )

    def mixed(state, lane):
        state = (state + lane * two) & bits
        return (state << 31 | state >> 33) & bits

    pairs, back = [], pow(two, -1, 1 << 64)
    for first in count():
        state = mixed(five, first) * one & bits
        second = (12345 - state) * back & bits
        if second < PRIME:
            pairs.append((first, second))
        if len(pairs) == length:
            return pairs


def _named_often(field, entry, times):
    """A snapshot with one entry in its list `field`, named over and over by the two bytes of its
    place in the memo."""

    def pickled(value):
        return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]

    named = pickled(entry) + b"q\x00" + b"h\x00" * times
    segments, events = (b"", named) if field == "device_traces" else (named, pickled(EVENT))
    return (
        b"\x80\x04}("
        + pickled("segments")
        + b"]("
        + segments
        + b"e"
        + pickled("device_traces")
        + b"](]("
        + events
        + b"ee"
        + b"u."
    )


EVENT = {"action": "alloc", "addr": 1 << 40, "size": 512, "stream": 0}
HOSTILE = {
    "huge length": (b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.", "the file ends in the middle"),
    "huge frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "the pickle is damaged"),
    "huge memo": (b"\x80\x04]r" + struct.pack("<I", 1 << 31) + b"N" * 20 + b".", "byte 3 is 0x72"),
    "ints of one hash": (
        _dict_of(_wide(number * PRIME) for number in range(1, 2_000)),
        "byte .* is 0x8a, which no snapshot has",
    ),
    "pairs of one hash": (
        _dict_of(pickle.dumps(pair, protocol=2)[2:-3] for pair in _colliding_pairs(5_000)),
        "byte .* is 0x86",
    ),
    "one event often": (
        _named_often("device_traces", EVENT, 300_000),
        "300001 events, segments and blocks in .* fewer than 16",
    ),
    "one segment often": (
        _named_often("segments", {"blocks": []}, 300_000),
        "300002 events, segments and .* fewer than 16",
    ),
    "empty dicts": (
        b"\x80\x04](" + b"}" * 500_000 + b"e.",
        "more lists and dicts than 500006 bytes",
    ),
    "nested lists": (
        b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "more lists and dicts than",
    ),
    "marks": (b"\x80\x04" + b"(" * 500_000 + b".", "the pickle is damaged"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer.*: fetch .* git lfs pull",
    ),
    "memory_viz page": (
        b"\n<!DOCTYPE html>\n<html>\n<head>\n",
        "a web page, as memory_viz writes .*: replay the .pickle",
    ),
    "torch.save": (b"PK\x03\x04\x00\x00", "a zip archive, as torch.save writes: torch.load it"),
    "list of segments": (
        pickle.dumps([{"address": 1}]),
        r"a list of segments without a history, as .*memory_snapshot\(\)",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_little_time_and_memory(tmp_path, name):
    data, says = HOSTILE[name]
    path = tmp_path / "hostile.pickle"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{path}: .*({says})"):
            replay_file(path)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(data) + MIB
    finally:
        tracemalloc.stop()
    assert _ends_well(path)


def test_the_pairs_of_one_hash_have_one_hash():
    assert (
        len({hash(pair) for pair in _colliding_pairs(100)}) == 1
        and len(set(_colliding_pairs(100))) == 100
    )


def test_a_pickle_cut_from_a_page_of_memory_viz_is_read(tmp_path):
    """The page pads it with one to three zero bytes."""
    path, whole = tmp_path / "cut.pickle", pickle.dumps(_recorded(3), protocol=4)
    found = []
    for padding in range(5):
        path.write_bytes(whole + b"\0" * padding)
        found.append(_ends_well(path))
    assert (
        found[0] == found[1] == found[2] == found[3]
        and isinstance(found[0], Replay)
        and "is 0x2e" in found[4]
    )


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null", "/dev/zero"):
        assert main(["replay", str(path)]) == 2
        assert (
            f"vramlab replay: {path}: not a file but a folder, a pipe or a device"
            in capsys.readouterr().err
        )
    assert (
        main(["replay", str(tmp_path / ("x" * 300))]) == 2
        and main(["replay", str(tmp_path / "none")]) == 2
    )


def _costly(entries):
    """Each entry that returns memory makes the simulator look through all that is free, and it can
    return nothing."""
    base, step = 1 << 40, 2 * MIB
    states = ("active_allocated", "inactive", "active_allocated", "inactive")
    segments = [
        {
            "address": base + at * step,
            "total_size": step,
            "stream": 0,
            "segment_type": "small",
            "blocks": [{"size": MIB // 2, "state": state} for state in states],
        }
        for at in range(entries)
    ]
    trace = []
    for at in range(entries):
        trace += [
            {"action": "segment_free", "addr": (1 << 44) + at * step, "size": step, "stream": 0},
            {"action": "alloc", "addr": (1 << 45) + at * step, "size": 512, "stream": 0},
        ]
    return {"segments": segments, "device_traces": [trace]}


def test_a_replay_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(beginning, "LEAST_S", 0.3)
    monkeypatch.setattr(beginning, "EVENT_S", 0.0)
    path = tmp_path / "costly.pickle"
    path.write_bytes(pickle.dumps(_costly(2_000), protocol=4))
    began = time.process_time()
    with pytest.raises(
        ValueError, match=f"{path}: replaying .* of 4000 entries took over 0 s of CPU"
    ):
        replay_file(path)
    assert time.process_time() - began < SECONDS
    monkeypatch.undo()
    path.write_bytes(pickle.dumps(_costly(20), protocol=4))
    assert isinstance(_ends_well(path), Replay)
