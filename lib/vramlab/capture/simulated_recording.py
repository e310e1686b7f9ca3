"""A snapshot in torch's format, made by our allocator simulator: what
`torch.cuda.memory._snapshot` would have returned had these allocations and frees happened on a GPU.

For tests, and to look at a forecast in the tools that read snapshots. It is no measurement, and its
`source`, "simulated", says so. Frames are empty; times are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import astuple

import pandas as pd

from ..allocator.allocator import Allocator, OutOfMemory
from ..allocator.settings import Settings
from ..allocator.simulate import operations
from ..allocator.snapshot import Segment
from ..timeline.events import on_device
from .recording import PREFIX, Mark, Recording

DECLARED = ("weights", "buffers", "gradients", "optimizer", "inputs", "workspace", "collectives")
"""Categories that a trainer declares."""


class HistoryAllocator(Allocator):
    """An allocator that keeps its history, as torch does. `metadata` is attached to every entry;
    its time is `time_us`, or what `now_us` returns."""

    def __init__(
        self,
        settings: Settings = Settings(),
        capacity_bytes: int | None = None,
        now_us: Callable[[], int] | None = None,
    ):
        super().__init__(settings, capacity_bytes)
        self.trace: list[dict] = []
        self.metadata, self.time_us, self._now_us = "", 0, now_us
        self.device.on_change = self._write
        self._requests: dict[Hashable, tuple[int, Hashable]] = {}  # key -> bytes, stream

    def apply(self, kind: str, key: Hashable = None, size: int = 0, stream: int = 0) -> None:
        """One event, a kind of `allocator.simulate.KINDS`. Raises: OutOfMemory, once the failure is
        in the history; ValueError."""
        operations(self)[kind](key, size, stream)

    def malloc(self, key: Hashable, size: int, stream: Hashable = 0, cached: bool = True) -> None:
        try:
            super().malloc(key, size, stream, cached)
        except OutOfMemory as error:
            self._write("oom", 0, size, stream)
            self.trace[-1]["device_free"] = error.shortage.free_bytes
            raise
        self._requests[key] = size, stream
        self._write("alloc", self.address(key), size, stream)

    def free(self, key: Hashable) -> None:
        self.free_requested(key)
        self.free_completed(key)

    def free_requested(self, key: Hashable) -> None:
        super().free_requested(key)
        self._write("free_requested", self.address(key), *self._requests[key])

    def free_completed(self, key: Hashable) -> None:
        """Only the first time counts: a full device or an emptied cache may have come before."""
        if key in self._awaiting:
            self._write("free_completed", self.address(key), *self._requests.pop(key))
        super().free_completed(key)

    def _write(self, action: str, address: int | None, size: int, stream: Hashable) -> None:
        if address is None:  # 0 bytes have no address, and no entry
            return
        self.trace.append(
            {
                "action": action,
                "addr": address,
                "size": size,
                "stream": stream,
                "frames": [],
                "time_us": self._now_us() if self._now_us else self.time_us,
                "user_metadata": self.metadata,
                "compile_context": "N/A",
            }
        )

    def snapshot(self, first: int = 0, device: int = 0) -> dict:
        """As torch returns it, of a history that began with entry `first`. Plain data."""
        requested = {self.address(key): size for key, (size, _) in self._requests.items()}
        return {
            "segments": [_segment(segment, device, requested) for segment in self.segments()],
            "device_traces": [*([] for _ in range(device)), self.trace[first:]],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": self.settings.text(),
                "expandable_segments": self.settings.expandable_segments,
            },
            "external_annotations": [],
        }


def _segment(segment: Segment, device: int, requested: dict[int | None, int]) -> dict:
    sizes = dict.fromkeys(("active_allocated", "active_awaiting_free", "inactive"), 0)
    for piece in segment.pieces:
        sizes[piece.state] += piece.bytes
    blocks = [
        {
            "address": piece.address,
            "size": piece.bytes,
            "state": piece.state,
            "frames": [],
            "requested_size": requested.get(piece.address, 0),
        }
        for piece in segment.pieces
    ]
    return {
        "device": device,
        "address": segment.address,
        "total_size": segment.bytes,
        "stream": segment.stream,
        "frames": [],
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": segment.pool_id,
        "is_expandable": segment.expandable,
        "allocated_size": sizes["active_allocated"],
        "active_size": sizes["active_allocated"] + sizes["active_awaiting_free"],
        "requested_size": 0,
        "blocks": blocks,
    }


def as_recorded(frame: pd.DataFrame, settings: Settings = Settings()) -> tuple[Recording, dict]:
    """(the recording, its snapshot) that the recorder would have made had the events of a timeline,
    a forecast's or a meter's, happened on a GPU.

    It is no measurement: its `source` is "simulated". It has the names that a history can know: of
    modules, those that ran forward. The category of an undeclared storage is inferred from its
    lifetime again, and two stretches of a phase are distinct only where another phase lies
    between them.
    """
    history, marks, declared, span = HistoryAllocator(settings), list[Mark](), [], -1
    device = frame[on_device(frame) & (frame["bytes"] > 0).to_numpy()]
    if "t_s" not in device:  # a kept forecast has no times: entries then lie a microsecond apart
        device = device.assign(t_s=[at * 1e-6 for at in range(len(device))])
    names = ("t_s", "step", "event", "storage", "bytes", "stream", "phase", "module", "category")
    rows = zip(*(device[name].tolist() for name in names), strict=True)
    for t_s, step, event, storage, size, stream, phase, module, category in rows:
        known = module if event == "alloc" and phase not in ("backward", "recompute") else ""
        begins = not marks or (step, phase) != (marks[-1].step, marks[-1].phase)
        if begins or (event == "alloc" and known != marks[-1].module):
            span += begins
            marks.append(Mark(step, phase, known, span, int(t_s * 1e6)))
        history.metadata, history.time_us = f"{PREFIX}{len(marks) - 1}", int(t_s * 1e6)
        history.apply(event, storage, size, stream)
        if event == "alloc" and category in DECLARED:
            declared.append((len(marks) - 1, history.address(storage), category, module))
            # a mark of its own: the declaration means nothing allocated later
            marks.append(marks[-1])
    document = {
        "marks": [astuple(each) for each in marks],
        "declared": declared,
        "clock": [(0, 0.0)],
        "source": "simulated",
    }
    raw = history.snapshot()
    return Recording.of(raw, 0, document), raw
