"""The ledger of a device: what the driver reports, taken apart until nothing is left, and what is
left is printed.

    used (NVML) = categories + rounding + cached but free + context + other processes + the rest

Categories and their sum are the timeline's, requested bytes; rounding is what the allocator handed
out beyond them; cached is what it reserved beyond that. The context is what the process held before
its first tensor: measured then, or a card's published figure, and the ledger says which. The rest
is used minus all of these: kernels loaded since, libraries' handles, and the error of everything
above. A part nobody measured is None, is shown as N/A, and lies in the rest, whose name then says
so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .events import alive_after, peak_event

NOT_AVAILABLE = "N/A"


@dataclass(frozen=True)
class Ledger:
    """Bytes at one moment. None: not measured."""

    categories: Mapping[str, int]
    rounding: int | None
    cached: int | None
    context: int | None
    other_processes: int | None
    used: int | None
    context_source: str = ""

    @property
    def parts(self) -> dict[str, int | None]:
        """Every part by its name, in order; with the rest they add up to `used`."""
        return {
            **self.categories,
            "rounding": self.rounding,
            "cached": self.cached,
            "context": self.context,
            "other processes": self.other_processes,
        }

    @property
    def missing(self) -> list[str]:
        return [name for name, size in self.parts.items() if size is None]

    @property
    def rest(self) -> int | None:
        """Negative: parts overlap, or the moments of two readings differ."""
        return (
            None
            if self.used is None
            else self.used - sum(size or 0 for size in self.parts.values())
        )

    @property
    def rest_name(self) -> str:
        return "the rest" + (
            f", with {', '.join(self.missing)} in it"
            if self.missing and self.used is not None
            else ""
        )

    def rows(self) -> list[tuple[str, int | None]]:
        """(name, bytes): the parts, the rest, what the driver reports."""
        return [*self.parts.items(), (self.rest_name, self.rest), ("used (driver)", self.used)]

    def words(self) -> str:
        """A line each, in MiB."""
        said = {
            "context": (
                f" ({self.context_source})"
                if self.context_source and self.context is not None
                else ""
            )
        }
        return "\n".join(
            f"{name + said.get(name, ''):<44}{_mib(size):>14}" for name, size in self.rows()
        )

    @classmethod
    def from_json(cls, kept: Mapping) -> Ledger:
        """What `to_json` gave."""
        parts = dict(kept["parts"])
        own = {
            name: parts.pop(name.replace("_", " "))
            for name in ("rounding", "cached", "context", "other_processes")
        }
        return cls(parts, **own, used=kept["used"], context_source=kept["context_source"])

    def to_json(self) -> dict:
        return {
            "parts": dict(self.parts),
            "rest": self.rest,
            "rest_name": self.rest_name,
            "used": self.used,
            "context_source": self.context_source,
        }


def _mib(size: int | None) -> str:
    return NOT_AVAILABLE if size is None else f"{size / 2**20:,.1f} MiB"


def ledger(
    frame: pd.DataFrame,
    event: int | None = None,
    *,
    sample: Mapping | None = None,
    context_bytes: int | None = None,
    context_source: str = "",
) -> Ledger:
    """The ledger after event number `event` of a timeline, by default the one with most bytes
    requested. What the timeline has no column for (`allocated_bytes`, `reserved_bytes`: a CPU's) is
    missing. `sample`: what NVML said, a row of a sampler's frame with `used_bytes` and, where a
    process's own bytes are known, `process_bytes`: see `sample_at`."""
    event = peak_event(frame) if event is None else event
    sizes: Counter = Counter()
    for (_, category, _), size in alive_after(frame, event).items():
        sizes[category] += size
    requested, row = sum(sizes.values()), frame.iloc[event]
    allocated, reserved = _whole(row.get("allocated_bytes")), _whole(row.get("reserved_bytes"))
    used, process = (
        _whole(sample.get(name)) if sample is not None else None
        for name in ("used_bytes", "process_bytes")
    )
    return Ledger(
        dict(sizes.most_common()),
        None if allocated is None else allocated - requested,
        None if allocated is None or reserved is None else reserved - allocated,
        context_bytes,
        None if used is None or process is None else used - process,
        used,
        context_source,
    )


def sample_at(samples: pd.DataFrame, t_s: float) -> dict | None:
    """The first sample at or after a moment of the same clock; the last one where there is none
    later; None without samples. The driver's figure changes only when segments do, so the next
    reading is of that moment unless the step has moved on.
    """
    if not len(samples):
        return None
    at = int(np.searchsorted(samples["t_s"].to_numpy(), t_s))
    return samples.iloc[min(at, len(samples) - 1)].to_dict()


def _whole(value) -> int | None:
    return None if value is None or pd.isna(value) else int(value)
