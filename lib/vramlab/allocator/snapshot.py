"""Reading what `torch.cuda.memory._dump_snapshot` wrote: the history of a device and its memory at
the end, as plain records. The file is not trusted, see `safe_pickle`."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from .safe_pickle import DUMP, load_plain

MAX_BYTES = 1 << 30
GROWS, SHRINKS = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
ACTIONS = (*GROWS, *SHRINKS, "alloc", "free_requested", "free_completed", "oom")
STATES = ("active_allocated", "active_awaiting_free", "active_pending_free", "inactive")
ADDRESSES, SIZES_BYTES = range(1 << 64), range(1, 1 << 44)
"""No block or segment is larger than any device."""
ENTRY_BYTES = 16
"""An event or a block takes at least so many bytes of a file: four fields of at least four."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a trace. The `bytes` of an allocation are requested bytes, before rounding."""

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
    """The text that `torch.cuda.memory._set_memory_metadata` set last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One block of a segment, in use or free. `state` as PyTorch writes it, one of `STATES`."""

    address: int
    bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of reserved memory, and the blocks that tile it, by address."""

    address: int
    bytes: int
    stream: int
    small: bool
    expandable: bool
    pool_id: tuple[int, int]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Snapshot:
    """One device: its trace, and its segments at the end of the trace. `settings`: the text of
    PYTORCH_ALLOC_CONF, "" where the snapshot has none."""

    device: int
    events: tuple[Event, ...]
    segments: tuple[Segment, ...]
    settings: str

    @property
    def reserved_bytes(self) -> int:
        """Bytes in segments at the end of the trace."""
        return sum(segment.bytes for segment in self.segments)


def grown_bytes(event: Event) -> int:
    """How many bytes an event adds to what is reserved; negative where it returns them."""
    if event.action in GROWS:
        return event.bytes
    return -event.bytes if event.action in SHRINKS else 0


def read_snapshot(
    path: Path | str, device: int | None = None, max_bytes: int = MAX_BYTES
) -> Snapshot:
    """One device of a snapshot file; by default the only one with events. Raises:
    FileNotFoundError; ValueError, naming the file, what is wrong with it and the way out."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no snapshot {path}: record one with {DUMP}")
    try:
        data = _bytes(path, max_bytes)
        return _snapshot(load_plain(data), device, len(data))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error!s:.2000}") from None


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
    return path.read_bytes()


def parse_snapshot(raw: dict, device: int) -> Snapshot:
    """One device of what `torch.cuda.memory._snapshot` returned in this process. A device without
    events is no error here: it may have been asked for nothing. Raises: ValueError."""
    traces = _get(raw, "device_traces", list, "the snapshot")
    if device < len(traces) and traces[device]:
        return _snapshot(raw, device, sys.maxsize)
    segments = _get(raw, "segments", list, "the snapshot")
    return Snapshot(device, (), _segments(segments, device), _settings(raw))


def _snapshot(raw, device: int | None, file_bytes: int) -> Snapshot:
    if isinstance(raw, list):
        raise ValueError(
            "this is a list of segments without a history, as torch.cuda.memory_snapshot() returns"
            f" it: record a history with {DUMP}"
        )
    traces = _get(raw, "device_traces", list, "the snapshot")
    segments = _get(raw, "segments", list, "the snapshot")
    device = _device(traces, device)
    # a few bytes can name one entry many times
    blocks = sum(1 + len(_get(segment, "blocks", list, "a segment")) for segment in segments)
    entries = len(traces[device]) + blocks
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
    """The device that was asked for, or the only one with events."""
    if not all(isinstance(trace, list) for trace in traces):
        raise ValueError(f"device_traces must be one list a device; record it again with {DUMP}")
    with_events = [number for number, trace in enumerate(traces) if trace]
    if not with_events:
        raise ValueError(f"no device has events: history was not recorded; record it with {DUMP}")
    if device is None and len(with_events) == 1:
        return with_events[0]
    if device not in with_events:
        cause = "several devices have" if device is None else f"device {device} has no"
        choices = ", ".join(map(str, with_events))
        raise ValueError(f"{cause} events: choose with --device, one of {choices}")
    return device


def _event(entry, number: int) -> Event | None:
    """None for what moves no memory: snapshots, annotations, actions of later versions."""
    owner = f"event {number}"
    action = _get(entry, "action", str, owner)
    if action not in ACTIONS:
        return None
    sizes = SIZES_BYTES if action in (*GROWS, *SHRINKS) else range(SIZES_BYTES.stop)
    time_us, metadata = entry.get("time_us"), entry.get("user_metadata")
    return Event(
        number,
        action,
        0 if action == "oom" else _get(entry, "addr", int, owner, ADDRESSES),
        _get(entry, "size", int, owner, sizes),
        _get(entry, "stream", int, owner, ADDRESSES),
        _pool_id(entry.get("pool_id")),
        time_us if isinstance(time_us, int) else None,
        metadata if isinstance(metadata, str) else "",
    )


def _segments(entries: list, device: int) -> tuple[Segment, ...]:
    """The segments of `device`; old snapshots do not name devices."""
    return tuple(
        _segment(entry, number)
        for number, entry in enumerate(entries)
        if "device" not in entry
        or _get(entry, "device", int, f"segment {number}", ADDRESSES) == device
    )


def _segment(entry: dict, number: int) -> Segment:
    owner = f"segment {number}"
    address, pieces = _get(entry, "address", int, owner, ADDRESSES), []
    end = address
    # old snapshots leave out a block's address: blocks tile their segment
    for block in _get(entry, "blocks", list, owner):
        size = _get(block, "size", int, f"a block of {owner}", SIZES_BYTES)
        pieces.append(Piece(end, size, _get(block, "state", str, f"a block of {owner}", STATES)))
        end += size
    size = _get(entry, "total_size", int, owner, ADDRESSES)
    if end - address != size:
        raise ValueError(
            f"{owner} has {size} bytes and its blocks {end - address}; record it again with {DUMP}"
        )
    return Segment(
        address,
        size,
        _get(entry, "stream", int, owner, ADDRESSES),
        _get(entry, "segment_type", str, owner, ("small", "large")) == "small",
        entry.get("is_expandable", False) is True,
        _pool_id(entry.get("segment_pool_id")) or (0, 0),
        tuple(pieces),
    )


def _settings(raw: dict) -> str:
    """In the syntax of PYTORCH_ALLOC_CONF. Snapshots keep it under that variable's old name, and
    old snapshots have none."""
    if "allocator_settings" not in raw:
        return ""
    settings = _get(raw, "allocator_settings", dict, "the snapshot")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in settings:
            return _get(settings, name, str, "allocator_settings")
    return ""


def _get(entry, key: str, kind: type, owner: str, allowed: Container | None = None):
    """`entry[key]`. Raises: ValueError, for a value of another type (True is no number) or one that
    is not among those `allowed`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind or not (allowed is None or value in allowed):
        has = f"{key} {reprlib.repr(value)}" if isinstance(entry, dict) else "no fields"
        must = kind.__name__ if allowed is None else f"{kind.__name__} in {allowed}"
        raise ValueError(
            f"{owner} has {has}, and needs {key} as {must}: this is not what _dump_snapshot writes;"
            f" record one with {DUMP}"
        )
    return value


def _pool_id(value) -> tuple[int, int] | None:
    return value if isinstance(value, tuple) and len(value) == 2 else None
