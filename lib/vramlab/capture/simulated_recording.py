"""A snapshot in torch's format, written by our allocator simulator: what
`torch.cuda.memory._snapshot` would have returned had these allocations and frees happened on a GPU.

For tests, and to look at a forecast in the tools that read snapshots. It is no measurement, and
says so: its `source` is "simulated". Times are the caller's; frames are empty.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from dataclasses import astuple
from pathlib import Path

import pandas as pd

from ..allocator.allocator import Allocator, OutOfMemory
from ..allocator.settings import Settings
from ..allocator.simulate import KINDS, rows
from ..timeline.events import on_device
from .recording import PREFIX, Mark, Recording

_STATES = {"allocated": "active_allocated", "awaiting": "active_awaiting_free", "free": "inactive"}


class _Telling(Allocator):
    """Says when a block is free again, which a full device or an emptied cache may bring about
    too."""

    completed: Callable[[Hashable], object]

    def free_completed(self, key: Hashable) -> None:
        self.completed(key)
        super().free_completed(key)


class Written:
    """An allocator that keeps its history. `metadata` is attached to every entry, `now_us` tells
    its time."""

    def __init__(
        self,
        settings: Settings = Settings(),
        capacity_bytes: int | None = None,
        now_us: Callable[[], int] | None = None,
    ):
        self.time_us = 0
        """What it is said to be, unless `now_us` tells."""
        self.allocator, self.metadata, self.trace = _Telling(settings, capacity_bytes), "", []
        self.allocator.device.tell, self.allocator.completed = self._say, self._completed
        self._now_us = now_us or (lambda: self.time_us)
        self._asked: dict[Hashable, tuple[int, int]] = {}  # key -> bytes, stream

    def does(self, kind: str, key: Hashable = None, size: int = 0, stream: int = 0) -> None:
        """One event, a kind of `allocator.simulate.KINDS`. Raises: OutOfMemory, once it is in the
        history; ValueError."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no event: use one of {', '.join(KINDS)}")
        if kind == "alloc":
            self._alloc(key, size, stream)
        elif kind == "empty_cache":
            self.allocator.empty_cache()
        if kind in ("free", "free_requested"):
            self.allocator.free_requested(key)
            self._say("free_requested", self.allocator.address(key), *self._asked[key])
        if kind in ("free", "free_completed"):
            self.allocator.free_completed(key)

    def _alloc(self, key: Hashable, size: int, stream: int) -> None:
        try:
            self.allocator.malloc(key, size, stream)
        except OutOfMemory as error:
            self.trace.append(
                {**self._entry("oom", 0, size, stream), "device_free": error.shortage.free_bytes}
            )
            raise
        self._asked[key] = size, stream
        self._say("alloc", self.allocator.address(key), size, stream)

    def _completed(self, key: Hashable) -> None:
        if key in self._asked:  # once only: emptying the cache completes all that is awaited
            self._say("free_completed", self.allocator.address(key), *self._asked.pop(key))

    def _say(self, action: str, address: int | None, size: int, stream: Hashable) -> None:
        """0 bytes have no address, and no entry."""
        if address is not None:
            self.trace.append(self._entry(action, address, size, stream))

    def _entry(self, action: str, address: int, size: int, stream: Hashable) -> dict:
        return {
            "action": action,
            "addr": address,
            "size": size,
            "stream": stream,
            "frames": [],
            "time_us": self._now_us(),
            "user_metadata": self.metadata,
            "compile_context": "N/A",
        }

    def snapshot(self, first: int = 0, device: int = 0) -> dict:
        """As torch has it, of a history that began with entry `first`. Plain data."""
        settings = self.allocator.settings
        segments = [
            self._segment(view, device, settings.expandable_segments)
            for view in self.allocator.segments()
        ]
        return {
            "segments": segments,
            "device_traces": [*([] for _ in range(device)), self.trace[first:]],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": settings.text(),
                "expandable_segments": settings.expandable_segments,
            },
            "external_annotations": [],
        }

    def _segment(self, view, device: int, expandable: bool) -> dict:
        blocks = [
            {
                "address": block.address,
                "size": block.bytes,
                "state": _STATES[block.state],
                "frames": [],
                "requested_size": self._asked[block.key][0] if block.state != "free" else 0,
            }
            for block in view.blocks
        ]
        in_use = [block for block in view.blocks if block.state != "free"]
        return {
            "device": device,
            "address": view.address,
            "total_size": view.bytes,
            "stream": view.stream,
            "frames": [],
            "segment_type": "small" if view.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": expandable,
            "allocated_size": sum(block.bytes for block in in_use if block.state == "allocated"),
            "active_size": sum(block.bytes for block in in_use),
            "requested_size": 0,
            "blocks": blocks,
        }


def written(events, settings: Settings = Settings(), capacity_bytes: int | None = None) -> Written:
    """The history of `events`, as `allocator.simulate.simulate` takes them, up to the first that
    the device has no room for."""
    history = Written(settings, capacity_bytes)
    try:
        for event in rows(events):
            history.does(*event)
    except OutOfMemory:
        pass
    return history


def write_snapshot(path: Path | str, history: Written, first: int = 0, device: int = 0) -> Path:
    """The file that `torch.cuda.memory._dump_snapshot` would have written."""
    path = Path(path)
    path.write_bytes(pickle.dumps(history.snapshot(first, device), protocol=4))
    return path


DECLARED = ("weights", "buffers", "gradients", "optimizer", "inputs", "workspace", "collectives")


def as_recorded(frame: pd.DataFrame, settings: Settings = Settings()) -> tuple[Recording, dict]:
    """(the recording, its snapshot): what the recorder would have brought home had the events of a
    timeline, a forecast's or a meter's, happened on a GPU. Its names are those a history can know:
    of modules, those that ran forward. Its `source` is "simulated": it is no measurement. What
    nobody declares gets its category by lifetime again, with stretches of one phase told apart only
    where another phase lies between them."""
    history, marks, declared, mark = Written(settings), [], [], None
    device = frame[on_device(frame) & (frame["bytes"] > 0).to_numpy()]
    if (
        "t_s" not in device
    ):  # a forecast that was kept has no times: then entries lie a microsecond apart
        device = device.assign(t_s=[at * 1e-6 for at in range(len(device))])
    names = ("t_s", "step", "event", "storage", "bytes", "stream", "phase", "module", "category")
    span = 0
    rows_of = zip(*(device[name].tolist() for name in names), strict=True)
    for t_s, step, event, storage, size, stream, phase, module, category in rows_of:
        known = module if event == "alloc" and phase not in ("backward", "recompute") else ""
        if (
            mark is None
            or (step, phase) != (mark.step, mark.phase)
            or (event == "alloc" and known != mark.module)
        ):
            span += mark is not None and (step, phase) != (mark.step, mark.phase)
            mark = Mark(step, phase, known, span, int(t_s * 1e6))
            marks.append(mark)
        history.metadata, history.time_us = f"{PREFIX}{len(marks) - 1}", int(t_s * 1e6)
        history.does(event, storage, size, stream)
        if event == "alloc" and category in DECLARED:
            marks.append(mark)  # a mark of its own, so that what is allocated next is not meant
            declared.append((len(marks) - 2, history.allocator.address(storage), category, module))
    said = {
        "marks": [astuple(one) for one in marks],
        "declared": declared,
        "clock": [(0, 0.0)],
        "source": "simulated",
    }
    raw = history.snapshot()
    return Recording.of(raw, 0, said), raw
