"""Reading what `torch.cuda.memory._dump_snapshot` wrote, without trusting the file.

A pickle is a program. Before it runs, its bytes are walked once: only the instructions that build a
snapshot's plain data (dicts, lists, strings, numbers, pairs of numbers) are let through, no length
or memo index may point beyond the file, and numbers are no wider than they must be: among wider
ones, and pairs of wide ones, are so many with the same hash that a dict of them takes quadratic
time. What then runs can name no global, and its memory is bounded by a small multiple of the file's
size.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import reprlib
import sys
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 1 << 30
GROWS, SHRINKS = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
ACTIONS = (*GROWS, *SHRINKS, "alloc", "free_requested", "free_completed", "oom")
STATES = ("active_allocated", "active_awaiting_free", "active_pending_free", "inactive")
ADDRESSES, SIZES_BYTES = (
    range(1 << 64),
    range(1, 1 << 44),
)  # no block or segment is larger than any device
ENTRY_BYTES = (
    16  # an event or a block takes at least so many bytes of a file: four fields of at least four
)
CONTAINER_BYTES = 8  # and so many bytes are written, on average, for each list or dict
DUMP = (
    "torch.cuda.memory._record_memory_history(max_entries=200_000, stacks='python') and"
    " torch.cuda.memory._dump_snapshot"
)

_SHORT = rb"K.|M..|J.{4}"
_WHOLE = (
    _SHORT
    + rb"|\x8a(?:\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{8}\0)"
)  # below 2**64
# one instruction of fixed length, or a pair of short numbers; longer tuples would be keys whose
# hash takes forever
_PLAIN = re.compile(
    rb"(?s:(?:"
    + _SHORT
    + rb"){2}\x86|h.|\x94|j.{4}|"
    + _WHOLE
    + rb"|[N()}\]aesu\x88\x89]|q.|G.{8}|\x95.{8})*+"
)
_STRINGS = {0x8C: 1, 0x58: 4, 0x8D: 8}  # instruction -> width of the length before its bytes
_LONG_PUT, _STOP, _PROTOCOL = 0x72, 0x2E, 0x80
_PADDING = (
    b"",
    b"\0",
    b"\0\0",
    b"\0\0\0",
)  # behind a pickle that was cut out of a page of memory_viz
_OTHERS = {  # how files begin that are mistaken for snapshots
    "this is gzip: gunzip it first": b"\x1f\x8b",
    "this is a Git LFS pointer, a note in place of the snapshot: fetch the file with"
    " git lfs pull": b"version https://git-lfs",
    "this is a web page, as memory_viz writes with a snapshot inside: replay the .pickle that the"
    " page was made from": b"<",
    "this is a zip archive, as torch.save writes: torch.load it and write it again with"
    " pickle.dump": b"PK",
    f"this is JSON, not a pickle: record one with {DUMP}": (b"{", b"["),
}
_LONGER, _LONGEST = (
    b"KMJGhjqr\x8a\x95",
    10,
)  # instructions that a file can end in the middle of, and the bytes of the longest
_PICKLE_RAISES = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a trace. `bytes` of a block is what was requested, before rounding."""

    number: int
    """Its place in the trace, which also has entries that move no memory."""
    action: str
    address: int
    bytes: int
    stream: int
    pool_id: tuple[int, int] | None
    """None where the snapshot is too old to say."""
    time_us: int | None = None
    """Since the epoch; None where the snapshot is too old to say."""
    metadata: str = ""
    """What `torch.cuda.memory._set_memory_metadata` had been told last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a segment. `state` as PyTorch writes it, one of `STATES`."""

    address: int
    bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class Segment:
    address: int
    bytes: int
    stream: int
    small: bool
    expandable: bool
    pool_id: tuple[int, int]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Snapshot:
    """One device: its trace and its segments at the end of it. `settings`: the text of
    PYTORCH_ALLOC_CONF, "" if unsaid."""

    device: int
    events: tuple[Event, ...]
    segments: tuple[Segment, ...]
    settings: str


def read_snapshot(
    path: Path | str, device: int | None = None, max_bytes: int = MAX_BYTES
) -> Snapshot:
    """One device of a snapshot; by default the only one with events. Raises: FileNotFoundError;
    ValueError, naming the file, what is wrong with it and the way out."""
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no snapshot {path}: record one with {DUMP}")
    try:
        data = _bytes(path, max_bytes)
        return _snapshot(_load(data), device, len(data))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error!s:.2000}") from None


def parse_snapshot(raw: dict, device: int) -> Snapshot:
    """One device of what `torch.cuda.memory._snapshot` returned in this process. No event at all is
    no error here: a device may not have been asked for anything. Raises: ValueError."""
    traces = _get(raw, "device_traces", list, "the snapshot")
    if device >= len(traces) or not traces[device]:
        return Snapshot(
            device,
            (),
            _segments(_get(raw, "segments", list, "the snapshot"), device),
            _settings(raw),
        )
    return _snapshot(raw, device, sys.maxsize)


def _bytes(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise ValueError(
            "not a file but a folder, a pipe or a device: name the file that _dump_snapshot wrote"
        )
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(
            f"{size} bytes, more than the {max_bytes} that are read: record fewer entries"
            " (max_entries) with shorter stacks (stacks='python'), or allow more with --max-mib"
        )
    data = path.read_bytes()
    wrong = {
        f"the file is empty: its dump did not finish; record it again with {DUMP}": not data,
        f"more lists and dicts than {len(data)} bytes of a snapshot have: this is not what"
        f" _dump_snapshot writes; record one with {DUMP}": (
            data.count(b"]") + data.count(b"}") > 100 + len(data) // CONTAINER_BYTES
        ),
        **{words: data[:64].lstrip().startswith(start) for words, start in _OTHERS.items()},
    }
    if any(wrong.values()):
        raise ValueError(next(words for words, applies in wrong.items() if applies))
    return data


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _load(data: bytes):
    _check(data)
    try:
        return _DataOnly(io.BytesIO(data)).load()
    except _PICKLE_RAISES as error:
        raise ValueError(
            f"the pickle is damaged ({type(error).__name__}: {error}): record it again with {DUMP}"
        ) from None


def _check(data: bytes) -> None:
    """Walk the instructions without running them. Raises: ValueError."""
    at = 2 if data[0] == _PROTOCOL else 0
    while True:
        at = _PLAIN.match(data, min(at, len(data))).end()
        op = data[at] if at < len(data) else None
        if op in _STRINGS:
            width = _STRINGS[op]
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif op == _LONG_PUT and int.from_bytes(data[at + 1 : at + 5], "little") < len(data):
            at += 5
        elif op == _STOP and data[at + 1 :] in _PADDING:
            return
        else:
            raise ValueError(_why_not(data, at, op))


def _why_not(data: bytes, at: int, op: int | None) -> str:
    if at >= len(data) or (op in _LONGER and len(data) - at <= _LONGEST):
        return (
            "the file ends in the middle: its dump or its copy did not finish; record it again"
            f" with {DUMP}"
        )
    return (
        f"byte {at} is {op:#04x}, which no snapshot has: this is not what _dump_snapshot writes,"
        f" and it was not run; record one with {DUMP}"
    )


# from plain data to a snapshot --------------------------------------------------------------------


def _snapshot(raw, device: int | None, file_bytes: int) -> Snapshot:
    if isinstance(raw, list):
        raise ValueError(
            "this is a list of segments without a history, as torch.cuda.memory_snapshot() returns"
            f" it: record a history with {DUMP}"
        )
    traces, segments = (
        _get(raw, "device_traces", list, "the snapshot"),
        _get(raw, "segments", list, "the snapshot"),
    )
    device = _device(traces, device)
    # an entry may be named many times in a few bytes
    entries = len(traces[device]) + sum(
        1 + len(_get(s, "blocks", list, "a segment")) for s in segments
    )
    if entries * ENTRY_BYTES > file_bytes:
        raise ValueError(
            f"{entries} events, segments and blocks in {file_bytes} bytes, fewer than {ENTRY_BYTES}"
            f" each: this is not what _dump_snapshot writes; record one with {DUMP}"
        )
    events = (_event(entry, number) for number, entry in enumerate(traces[device]))
    return Snapshot(
        device,
        tuple(event for event in events if event is not None),
        _segments(segments, device),
        _settings(raw),
    )


def _device(traces: list, device: int | None) -> int:
    """The device asked for, or the only one with events."""
    if not all(isinstance(trace, list) for trace in traces):
        raise ValueError(f"device_traces must be one list a device; record it again with {DUMP}")
    able = [number for number, trace in enumerate(traces) if trace]
    if not able:
        raise ValueError(f"no device has events: history was not recorded; record it with {DUMP}")
    if device is None and len(able) == 1:
        return able[0]
    if device not in able:
        said = "several devices have events" if device is None else f"device {device} has no events"
        raise ValueError(f"{said}: choose with --device, one of {', '.join(map(str, able))}")
    return device


def _event(entry, number: int) -> Event | None:
    """None for what moves no memory: snapshots, annotations, actions of later versions."""
    what = f"event {number}"
    action = _get(entry, "action", str, what)
    if action not in ACTIONS:
        return None
    time_us, metadata = entry.get("time_us"), entry.get("user_metadata")
    address = 0 if action == "oom" else _get(entry, "addr", int, what, ADDRESSES)
    size = _get(
        entry,
        "size",
        int,
        what,
        SIZES_BYTES if action in (*GROWS, *SHRINKS) else range(SIZES_BYTES.stop),
    )
    return Event(
        number,
        action,
        address,
        size,
        _get(entry, "stream", int, what, ADDRESSES),
        _pool_id(entry.get("pool_id")),
        time_us if isinstance(time_us, int) else None,
        metadata if isinstance(metadata, str) else "",
    )


def _segments(entries: list, device: int) -> tuple[Segment, ...]:
    """Those of one device; old snapshots do not name it."""
    return tuple(
        _segment(entry, number)
        for number, entry in enumerate(entries)
        if "device" not in entry
        or _get(entry, "device", int, f"segment {number}", ADDRESSES) == device
    )


def _segment(entry: dict, number: int) -> Segment:
    what = f"segment {number}"
    address, pieces = _get(entry, "address", int, what, ADDRESSES), []
    end = address
    for block in _get(
        entry, "blocks", list, what
    ):  # old snapshots leave out a block's address: blocks tile their segment
        size = _get(block, "size", int, f"a block of {what}", SIZES_BYTES)
        pieces.append(Piece(end, size, _get(block, "state", str, f"a block of {what}", STATES)))
        end += size
    if end - address != (size := _get(entry, "total_size", int, what, ADDRESSES)):
        raise ValueError(
            f"{what} has {size} bytes and its blocks {end - address}; record it again with {DUMP}"
        )
    kind = _get(entry, "segment_type", str, what, ("small", "large"))
    return Segment(
        address,
        size,
        _get(entry, "stream", int, what, ADDRESSES),
        kind == "small",
        entry.get("is_expandable", False) is True,
        _pool_id(entry.get("segment_pool_id")) or (0, 0),
        tuple(pieces),
    )


def _settings(raw: dict) -> str:
    """In the syntax of PYTORCH_ALLOC_CONF; snapshots keep it under the old name, and old snapshots
    not at all."""
    settings = (
        _get(raw, "allocator_settings", dict, "the snapshot") if "allocator_settings" in raw else {}
    )
    names = [name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in settings]
    return _get(settings, names[0], str, "allocator_settings") if names else ""


def _get(entry, key: str, kind: type, what: str, allowed: Container | None = None):
    """`entry[key]`. Raises: ValueError, for another type (True is no number) and for what is not
    `allowed`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind or not (allowed is None or value in allowed):
        has = f"{key} {reprlib.repr(value)}" if isinstance(entry, dict) else "no fields"
        must = f"{kind.__name__}" + ("" if allowed is None else f" in {allowed}")
        raise ValueError(
            f"{what} has {has}, and needs {key} as {must}: this is not what _dump_snapshot writes;"
            f" record one with {DUMP}"
        )
    return value


def _pool_id(told) -> tuple[int, int] | None:
    return told if isinstance(told, tuple) and len(told) == 2 else None
