"""Running out of memory, as evidence: what was asked for, what there was, and who held the rest,
before anything unwinds.

On CUDA the allocator tells an observer when it gives up, while every tensor of the step is still
alive; torch's exception names the request alone. Elsewhere `memory_limit.Ceiling` refuses what the
simulated allocator cannot serve. Both write the same record, plain data for a run's `result.json`:

    source                    who says so
    asked_bytes               the request that failed
    free_bytes                what the device had left
    allocated_bytes, reserved_bytes, largest_free_block_bytes    of the allocator; None where it was
      not asked
    capacity_bytes            all the device had for the allocator; the driver's figure has other
                              processes in it
    step, phase               where it happened; None where nothing watched
    categories, owners        who held the rest, largest first; empty where nothing recorded, and
                              `said` has the reason

The observer is not yet run on a GPU. It follows c10/cuda/CUDACachingAllocator.cpp, which calls it
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
    made and nobody has freed yet counts as activations: whether it would have been kept for
    backward cannot be known any more.
    """
    rows = alive_rows(frame, len(frame) - 1)
    unfinished = (rows["category"] == "temporaries") & rows["phase"].isin(("forward", "recompute"))
    return by_owner(rows.assign(category=rows["category"].mask(unfinished, "activations")))


def record(source: str, figures: Mapping, frame: pd.DataFrame | None, said: str = "") -> dict:
    """The evidence. `figures`: the fields in bytes; `frame`: the timeline up to the failure, as far
    as anybody kept one."""
    known = frame is not None and len(frame) > 0
    alive = holders(frame) if known else Counter()
    last = frame.iloc[-1] if known else {"step": None, "phase": None}
    return {
        "source": source,
        **{name: None if figures.get(name) is None else int(figures[name]) for name in FIGURES},
        "step": int(last["step"]) if known else None,
        "phase": str(last["phase"]) if known else None,
        "categories": by_category(alive),
        "owners": [
            {"category": category, "module": module, "bytes": size}
            for category, module, size in largest_owners(alive, OWNERS)
        ],
        "said": (
            said or ("" if known else "nothing recorded the allocator, so owners are not known")
        ),
    }


FIGURES = (
    "asked_bytes",
    "free_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "largest_free_block_bytes",
    "capacity_bytes",
)


def of_snapshot(
    raw: Mapping, device: int, asked_segment_bytes: int, free_bytes: int, capacity_bytes: int
) -> dict:
    """The figures of a record from what `torch.cuda.memory._snapshot` returns. The request itself
    is in the history where one is kept; else it is the segment that was asked of the driver,
    rounded up."""
    segments = [
        segment for segment in raw.get("segments", ()) if segment.get("device", device) == device
    ]
    traces = raw.get("device_traces", ())
    history = traces[device] if device < len(traces) else ()
    asked = next(
        (entry["size"] for entry in reversed(history) if entry.get("action") == "oom"),
        asked_segment_bytes,
    )
    free = (
        block["size"]
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "inactive"
    )
    return {
        "asked_bytes": asked,
        "free_bytes": free_bytes,
        "capacity_bytes": capacity_bytes,
        "allocated_bytes": sum(segment["allocated_size"] for segment in segments),
        "reserved_bytes": sum(segment["total_size"] for segment in segments),
        "largest_free_block_bytes": max(free, default=0),
    }


class _Watch:
    """torch keeps an observer for the life of the process and knows no way to detach one: there is
    one, and it asks here."""

    attached = False
    open = False
    frame: Callable[[], pd.DataFrame] | None = None
    dump: Path | None = None
    seen: dict | None = None

    def __call__(self, device: int, segment_bytes: int, device_bytes: int, free_bytes: int) -> None:
        """What torch calls. It never raises: the exception on its way is the one to keep."""
        if not self.open:
            return
        import torch

        figures = {
            "asked_bytes": segment_bytes,
            "free_bytes": free_bytes,
            "capacity_bytes": device_bytes,
        }
        frame, said = None, []
        try:
            figures |= of_snapshot(
                torch.cuda.memory._snapshot(device), device, segment_bytes, free_bytes, device_bytes
            )
        except Exception as error:
            said.append(f"no snapshot ({type(error).__name__}: {error})")
        try:
            frame = self.frame() if self.frame else None
        except Exception as error:
            said.append(
                f"no owners ({type(error).__name__}: {error},"
                f" {traceback.extract_tb(error.__traceback__)[-1].name})"
            )
        try:
            if self.dump:
                torch.cuda.memory._dump_snapshot(str(self.dump))
        except Exception as error:
            self.dump.unlink(missing_ok=True)
            said.append(f"no dump ({type(error).__name__}: {error})")
        self.seen = record("torch's out-of-memory observer", figures, frame, "; ".join(said))


_watch = _Watch()


@contextmanager
def watched(
    device: str, frame: Callable[[], pd.DataFrame] | None = None, dump: Path | None = None
) -> Iterator[None]:
    """While open, running out of memory on a CUDA `device` is recorded at once, see `record_of`.
    `frame` gives the timeline so far; `dump` is where torch's own snapshot goes. On any other
    device, or where torch sees none, it does nothing.
    """
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        yield
        return
    if not _Watch.attached:
        torch._C._cuda_attach_out_of_memory_observer(_watch)
        _Watch.attached = True
    _watch.open, _watch.frame, _watch.dump, _watch.seen = True, frame, dump, None
    try:
        yield
    finally:
        _watch.open, _watch.frame = False, None


def record_of(error: BaseException) -> dict:
    """The evidence of an error that says memory ran out; without an observer, that there is
    none."""
    if isinstance(error, RanOut):
        return error.record
    import torch

    if isinstance(error, torch.OutOfMemoryError) and _watch.seen is not None:
        return _watch.seen
    source = (
        "torch's exception" if isinstance(error, torch.OutOfMemoryError) else "the host's allocator"
    )
    return record(source, {}, None, f"no figures beside the error's own words: {error}")


def words(found: Mapping) -> str:
    """A record in a few lines, and what would have fitted."""
    lines = evidence_words(found)
    for change in found.get("would_fit", ()):
        told = change["reason"] or (
            f"{change['peak_reserved_bytes'] / 2**20:,.1f} MiB reserved, "
            f"{'fits' if change['fits'] else 'does not fit'}, predicted"
        )
        lines.append(f"  with {change['change']}: {told}")
    return "\n".join(lines)


def evidence_words(found: Mapping) -> list[str]:
    """What was asked for and what there was, in a line; then each owner; then what the record has
    to add."""

    def mib(name: str) -> str:
        return "N/A" if found[name] is None else f"{found[name] / 2**20:,.1f} MiB"

    head = (
        f"out of memory in {found['phase'] or 'an unknown phase'}: asked for {mib('asked_bytes')},"
        f" {mib('free_bytes')} free of {mib('capacity_bytes')}; {mib('reserved_bytes')} reserved,"
        f" {mib('allocated_bytes')} allocated, largest free block {mib('largest_free_block_bytes')}"
        f" ({found['source']})"
    )
    owners = [
        f"  {owner['bytes'] / 2**20:10,.1f} MiB  {owner['category']} {owner['module']}"
        for owner in found["owners"]
    ]
    return [head, *owners, *([f"  {found['said']}"] if found["said"] else [])]
