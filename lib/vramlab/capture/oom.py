"""The record of running out of memory: the request that failed, what the device had left, and the
owners of the rest, taken before anything unwinds.

On CUDA the allocator calls an observer when it gives up, while every tensor of the step is still
alive; torch's exception names only the request. Elsewhere `memory_limit.Ceiling` refuses what the
simulated allocator cannot serve. Both write the same record, plain data for a run's `result.json`:

    source                    where the record is from
    asked_bytes               the request that failed
    free_bytes                what the device had left
    allocated_bytes, reserved_bytes, largest_free_block_bytes
                              the allocator's; None where it could not be read
    capacity_bytes            the device's memory for the allocator; the driver's figure includes
                              other processes
    step, phase               where it happened; None where nothing recorded
    categories, owners        what held the rest, largest first; empty where nothing recorded
    said                      why something is missing

The observer has not run on a GPU yet. It follows c10/cuda/CUDACachingAllocator.cpp, which calls it
without the allocator's lock.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from ..allocator.allocator import OutOfMemory, Shortage
from ..timeline.events import alive_rows, by_category, by_owner, largest_owners

OWNERS = 12
"""Rows of `owners`, largest first."""


class RanOut(OutOfMemory):
    """A device of the simulated allocator is full. `record` is the evidence."""

    def __init__(self, shortage: Shortage, record: dict):
        super().__init__(shortage)
        self.record = record


def holders(frame: pd.DataFrame) -> Counter:
    """(module, category, op) -> device bytes that are alive at the end of a timeline. What forward
    made and has not freed counts as activations: whether it would have been kept for backward
    cannot be known."""
    rows = alive_rows(frame, len(frame) - 1)
    unfinished = (rows["category"] == "temporaries") & rows["phase"].isin(("forward", "recompute"))
    return by_owner(rows.assign(category=rows["category"].mask(unfinished, "activations")))


FIGURES = (
    "asked_bytes",
    "free_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "largest_free_block_bytes",
    "capacity_bytes",
)


def record(source: str, figures: Mapping, frame: pd.DataFrame | None, reason: str = "") -> dict:
    """The record. `figures`: of `FIGURES`, in bytes; `frame`: the timeline up to the failure, as
    far as one was kept; `reason`: why something is missing."""
    last = frame.iloc[-1] if frame is not None and len(frame) > 0 else None
    alive = Counter() if last is None else holders(frame)
    return {
        "source": source,
        **{name: None if figures.get(name) is None else int(figures[name]) for name in FIGURES},
        "step": None if last is None else int(last["step"]),
        "phase": None if last is None else str(last["phase"]),
        "categories": by_category(alive),
        "owners": [
            {"category": category, "module": module, "bytes": size}
            for category, module, size in largest_owners(alive, OWNERS)
        ],
        "said": reason
        or ("nothing recorded the allocator, so owners are not known" if last is None else ""),
    }


def of_snapshot(
    raw: Mapping, device: int, segment_bytes: int, free_bytes: int, capacity_bytes: int
) -> dict:
    """The figures of a record from what `torch.cuda.memory._snapshot` returns. The request itself
    is in the history where one is kept; else `segment_bytes`, the segment that the driver was asked
    for, stands for it."""
    segments = [
        segment for segment in raw.get("segments", ()) if segment.get("device", device) == device
    ]
    histories = raw.get("device_traces", ())
    history = histories[device] if device < len(histories) else ()
    failures = (entry["size"] for entry in reversed(history) if entry.get("action") == "oom")
    blocks = [block for segment in segments for block in segment["blocks"]]
    free = (block["size"] for block in blocks if block["state"] == "inactive")
    return {
        "asked_bytes": next(failures, segment_bytes),
        "free_bytes": free_bytes,
        "capacity_bytes": capacity_bytes,
        "allocated_bytes": sum(segment["allocated_size"] for segment in segments),
        "reserved_bytes": sum(segment["total_size"] for segment in segments),
        "largest_free_block_bytes": max(free, default=0),
    }


class _Watch:
    """torch keeps an observer for the life of the process and cannot detach it: so there is only
    one, and its state is here."""

    attached = False
    open = False
    frame: Callable[[], pd.DataFrame] | None = None
    dump: Path | None = None
    record: dict | None = None

    def __call__(self, device: int, segment_bytes: int, device_bytes: int, free_bytes: int) -> None:
        """Called by torch. Never raises: the exception on its way is the one to keep."""
        if not self.open:
            return
        import torch

        figures = {
            "asked_bytes": segment_bytes,
            "free_bytes": free_bytes,
            "capacity_bytes": device_bytes,
        }
        frame, reasons = None, []
        try:
            raw = torch.cuda.memory._snapshot(device)
            figures = of_snapshot(raw, device, segment_bytes, free_bytes, device_bytes)
        except Exception as error:
            reasons.append(f"no snapshot ({type(error).__name__}: {error})")
        try:
            frame = self.frame() if self.frame else None
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            reasons.append(f"no owners ({type(error).__name__}: {error}, {where})")
        if self.dump:
            try:
                torch.cuda.memory._dump_snapshot(str(self.dump))
            except Exception as error:
                self.dump.unlink(missing_ok=True)
                reasons.append(f"no dump ({type(error).__name__}: {error})")
        source = "torch's out-of-memory observer"
        self.record = record(source, figures, frame, "; ".join(reasons))


_watch = _Watch()


@contextmanager
def watched(
    device: str, frame: Callable[[], pd.DataFrame] | None = None, dump: Path | None = None
) -> Iterator[None]:
    """While this context is open, running out of memory on a CUDA `device` is recorded at once, see
    `record_of`. `frame` returns the timeline so far; `dump` is the file for torch's own snapshot.
    Does nothing on any other device, or where torch sees no GPU."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        yield
        return
    if not _Watch.attached:
        torch._C._cuda_attach_out_of_memory_observer(_watch)
        _Watch.attached = True
    _watch.open, _watch.frame, _watch.dump, _watch.record = True, frame, dump, None
    try:
        yield
    finally:
        _watch.open, _watch.frame = False, None


def record_of(error: BaseException) -> dict:
    """The record of an error that says that memory ran out. Where no observer was called it has no
    figures, and says so."""
    if isinstance(error, RanOut):
        return error.record
    import torch

    if isinstance(error, torch.OutOfMemoryError) and _watch.record is not None:
        return _watch.record
    source = (
        "torch's exception" if isinstance(error, torch.OutOfMemoryError) else "the host's allocator"
    )
    return record(source, {}, None, f"no figures beside the error's own words: {error}")


def to_text(record: Mapping) -> str:
    """A record in a few lines, and what would have fitted."""
    lines = evidence_lines(record)
    for change in record.get("would_fit", ()):
        verdict = change["reason"] or (
            f"{change['peak_reserved_bytes'] / 2**20:,.1f} MiB reserved, "
            f"{'fits' if change['fits'] else 'does not fit'}, predicted"
        )
        lines.append(f"  with {change['change']}: {verdict}")
    return "\n".join(lines)


def evidence_lines(record: Mapping) -> list[str]:
    """The request and what the device had left, in a line; then each owner; then why something is
    missing."""
    mib = {
        name: "N/A" if record[name] is None else f"{record[name] / 2**20:,.1f} MiB"
        for name in FIGURES
    }
    head = (
        f"out of memory in {record['phase'] or 'an unknown phase'}: asked for"
        f" {mib['asked_bytes']}, {mib['free_bytes']} free of {mib['capacity_bytes']};"
        f" {mib['reserved_bytes']} reserved, {mib['allocated_bytes']} allocated, largest free block"
        f" {mib['largest_free_block_bytes']} ({record['source']})"
    )
    owners = [
        f"  {owner['bytes'] / 2**20:10,.1f} MiB  {owner['category']} {owner['module']}"
        for owner in record["owners"]
    ]
    return [head, *owners, *([f"  {record['said']}"] if record["said"] else [])]
