"""Reading what `torch.cuda.memory._dump_snapshot` wrote, without trusting the file.

A pickle is a program. Before it runs, its bytes are walked once: only the instructions that build a snapshot's plain data
(dicts, lists, strings, numbers, pairs of numbers) are let through, and no length or memo index may point beyond the file.
What then runs can name no global, and its memory is bounded by a multiple of the file's size.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 1 << 30
GROWS, SHRINKS = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
ACTIONS = (*GROWS, *SHRINKS, "alloc", "free_requested", "free_completed", "oom")
DUMP = "torch.cuda.memory._record_memory_history(max_entries=200_000, stacks='python') and torch.cuda.memory._dump_snapshot"

_WHOLE = rb"K.|M..|J.{4}|\x8a(?:\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9})"
# one instruction of fixed length, or a pair of numbers; longer tuples would be keys whose hash takes forever
_PLAIN = re.compile(rb"(?s:(?:" + _WHOLE + rb"){2}\x86|h.|\x94|j.{4}|" + _WHOLE + rb"|[N()}\]aesu\x88\x89]|q.|G.{8}|\x95.{8})*+")
_STRINGS = {0x8c: 1, 0x58: 4, 0x8d: 8}  # instruction -> width of the length before its bytes
_LONG_PUT, _STOP, _PROTOCOL = 0x72, 0x2e, 0x80
_LONGER, _LONGEST = b"KMJGhjqr\x8a\x95", 10  # instructions that a file can end in the middle of, and the bytes of the longest
_PICKLE_RAISES = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
                  MemoryError, RecursionError)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Piece:
    """A block of a segment. `state` as PyTorch writes it: active_allocated, active_awaiting_free, inactive."""

    address: int
    bytes: int
    state: str


@dataclass(frozen=True)
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
    """One device: its trace and its segments at the end of it. `settings`: the text of PYTORCH_ALLOC_CONF, "" if unsaid."""

    device: int
    events: tuple[Event, ...]
    segments: tuple[Segment, ...]
    settings: str


def read_snapshot(path: Path | str, device: int | None = None, max_bytes: int = MAX_BYTES) -> Snapshot:
    """One device of a snapshot; by default the only one with events. Raises: FileNotFoundError; ValueError, naming the file,
    what is wrong with it and the way out."""
    path = Path(path)
    try:
        raw = _load(_bytes(path, max_bytes))
        return _snapshot(raw, device, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_snapshot(raw: dict, device: int) -> Snapshot:
    """One device of what `torch.cuda.memory._snapshot` returned in this process. No event at all is no error here: a device may
    not have been asked for anything. Raises: ValueError."""
    traces = _list(raw, "device_traces", "the snapshot")
    if device >= len(traces) or not traces[device]:
        segments = (s for s in _list(raw, "segments", "the snapshot") if s.get("device", 0) == device)
        return Snapshot(device, (), tuple(map(_segment, segments, itertools.count())), _settings(raw.get("allocator_settings")))
    return _snapshot(raw, device, sys.maxsize)


def _bytes(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no snapshot {path}: record one with {DUMP}")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{size} bytes, more than the {max_bytes} that are read: record fewer entries (max_entries) with "
                         "shorter stacks (stacks='python'), or allow more with --max-mib")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the file is empty: its dump did not finish; record it again with {DUMP}")
    if data[:2] == b"\x1f\x8b":
        raise ValueError("this is gzip: gunzip it first")
    return data


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _load(data: bytes):
    _check(data)
    try:
        return _DataOnly(io.BytesIO(data)).load()
    except _PICKLE_RAISES as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__}: {error}): record it again with {DUMP}") from None


def _check(data: bytes) -> None:
    """Walk the instructions without running them. Raises: ValueError."""
    at = 2 if data[0] == _PROTOCOL else 0
    while True:
        at = _PLAIN.match(data, at).end()
        op = data[at] if at < len(data) else None
        if op in _STRINGS:
            width = _STRINGS[op]
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif op == _LONG_PUT and int.from_bytes(data[at + 1 : at + 5], "little") < len(data):
            at += 5
        elif op == _STOP and at == len(data) - 1:
            return
        else:
            raise ValueError(_why_not(data, at, op))


def _why_not(data: bytes, at: int, op: int | None) -> str:
    if at >= len(data) or (op in _LONGER and len(data) - at <= _LONGEST):
        return f"the file ends in the middle: its dump or its copy did not finish; record it again with {DUMP}"
    return (f"byte {at} is {op:#04x}, which no snapshot has: this is not what _dump_snapshot writes, and it was not run; "
            f"record one with {DUMP}")


# from plain data to a snapshot -----------------------------------------------------------------------------------------


def _snapshot(raw, device: int | None, file_bytes: int) -> Snapshot:
    traces, segments = _list(raw, "device_traces", "the snapshot"), _list(raw, "segments", "the snapshot")
    device = _device(traces, device)
    # a list may be named many times in a few bytes: what is read must have cost the file at least a byte each
    if len(traces[device]) + sum(len(_list(s, "blocks", "a segment")) for s in segments) > file_bytes:
        raise ValueError(f"more events and blocks than bytes: this is not what _dump_snapshot writes; record one with {DUMP}")
    events = (_event(entry, number) for number, entry in enumerate(traces[device]))
    return Snapshot(device, tuple(event for event in events if event is not None),
                    tuple(_segment(s, number) for number, s in enumerate(segments) if s.get("device", 0) == device),
                    _settings(raw.get("allocator_settings")))


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
    address = 0 if action == "oom" else _whole(entry, "addr", what)
    return Event(number, action, address, _whole(entry, "size", what), _whole(entry, "stream", what),
                 _pool_id(entry.get("pool_id")), *_told(entry))


def _told(entry: dict) -> tuple[int | None, str]:
    time_us, metadata = entry.get("time_us"), entry.get("user_metadata")
    return time_us if isinstance(time_us, int) else None, metadata if isinstance(metadata, str) else ""


def _segment(entry: dict, number: int) -> Segment:
    what = f"segment {number}"
    address, pieces = _whole(entry, "address", what), []
    end = address
    for block in entry["blocks"]:  # old snapshots leave out a block's address: blocks tile their segment
        size = _whole(block, "size", f"a block of {what}")
        pieces.append(Piece(end, size, _get(block, "state", str, f"a block of {what}")))
        end += size
    if end - address != (size := _whole(entry, "total_size", what)):
        raise ValueError(f"{what} has {size} bytes and its blocks {end - address}; record it again with {DUMP}")
    kind = _get(entry, "segment_type", str, what)
    return Segment(address, size, _whole(entry, "stream", what), kind == "small", entry.get("is_expandable", False) is True,
                   _pool_id(entry.get("segment_pool_id")) or (0, 0), tuple(pieces))


def _settings(told) -> str:
    """What the allocator was told, in the syntax of PYTORCH_ALLOC_CONF; snapshots keep it under the old name."""
    if not isinstance(told, Mapping):
        return ""
    text = told.get("PYTORCH_ALLOC_CONF", told.get("PYTORCH_CUDA_ALLOC_CONF"))
    return text if isinstance(text, str) else ""


def _list(entry, key: str, what: str) -> list:
    return _get(entry, key, list, what)


def _get(entry, key: str, kind: type, what: str):
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        has = f"{key} as {type(entry.get(key)).__name__}, not {kind.__name__}" if isinstance(entry, dict) else "no fields"
        raise ValueError(f"{what} has {has}: this is not what _dump_snapshot writes; record one with {DUMP}")
    return entry[key]


def _whole(entry, key: str, what: str) -> int:
    value = _get(entry, key, int, what)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{what} has {key} {value}, which no address or size can be; record it again with {DUMP}")
    return value


def _pool_id(told) -> tuple[int, int] | None:
    return told if isinstance(told, tuple) and len(told) == 2 else None
