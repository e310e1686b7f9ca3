"""The byte ledger of a device: what the driver reports, taken apart into known parts, and the rest,
which is printed and never hidden.

    used (NVML) = categories + rounding + cached but free + context + other processes + the rest

Categories and their sum are the timeline's, requested bytes; rounding is what the allocator handed
out beyond them; cached is what it reserved beyond that. The context is what the process held before
its first tensor: measured then, or a card's published figure, and the ledger says which. The rest
is `used` minus all of these: kernels loaded since, libraries' handles, and the error of everything
above. A part that nobody measured is None, is shown as N/A, and lies in the rest, whose name then
says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .events import alive_after, by_category, peak_event

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
        """Each part by its name, in order; with the rest they add up to `used`."""
        return {
            **self.categories,
            "rounding": self.rounding,
            "cached": self.cached,
            "context": self.context,
            "other processes": self.other_processes,
        }

    @property
    def missing(self) -> list[str]:
        """The parts that were not measured."""
        return [name for name, size in self.parts.items() if size is None]

    @property
    def rest(self) -> int | None:
        """What no part explains. Negative where parts overlap, or where the moments of two readings
        differ."""
        known = sum(size or 0 for size in self.parts.values())
        return None if self.used is None else self.used - known

    @property
    def rest_name(self) -> str:
        if not self.missing or self.used is None:
            return "the rest"
        return f"the rest, with {', '.join(self.missing)} in it"

    def rows(self) -> list[tuple[str, int | None]]:
        """(name, bytes): the parts, the rest, what the driver reports."""
        return [*self.parts.items(), (self.rest_name, self.rest), ("used (driver)", self.used)]

    @classmethod
    def from_json(cls, document: Mapping) -> Ledger:
        """The ledger whose `to_json` is `document`."""
        parts = dict(document["parts"])
        own = {
            name: parts.pop(name.replace("_", " "))
            for name in ("rounding", "cached", "context", "other_processes")
        }
        return cls(parts, **own, used=document["used"], context_source=document["context_source"])

    def to_json(self) -> dict:
        return {
            "parts": self.parts,
            "rest": self.rest,
            "rest_name": self.rest_name,
            "used": self.used,
            "context_source": self.context_source,
        }


def ledger(
    frame: pd.DataFrame,
    event: int | None = None,
    *,
    sample: Mapping | None = None,
    context_bytes: int | None = None,
    context_source: str = "",
) -> Ledger:
    """The ledger after event number `event` of a timeline, by default the event with most requested
    bytes alive. Where the timeline has no `allocated_bytes` and `reserved_bytes`, as on a CPU, the
    parts that follow from them are missing. `sample`: the driver's figures, a row of a sampler's
    frame with `used_bytes` and, where a process's own bytes are known, `process_bytes`; see
    `sample_at`."""
    event = peak_event(frame) if event is None else event
    categories, row = by_category(alive_after(frame, event)), frame.iloc[event]
    allocated, reserved = _whole(row, "allocated_bytes"), _whole(row, "reserved_bytes")
    used, process = _whole(sample or {}, "used_bytes"), _whole(sample or {}, "process_bytes")
    return Ledger(
        categories,
        _difference(allocated, sum(categories.values())),
        _difference(reserved, allocated),
        context_bytes,
        _difference(used, process),
        used,
        context_source,
    )


def _whole(row: Mapping | pd.Series, name: str) -> int | None:
    value = row.get(name)
    return None if value is None or pd.isna(value) else int(value)


def _difference(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def sample_at(samples: pd.DataFrame, t_s: float) -> dict | None:
    """The first sample at or after moment `t_s` of the same clock; the last sample where none is
    later; None without samples. The driver's figure changes only when segments do, so the next
    reading is of that moment unless the step has moved on."""
    if not len(samples):
        return None
    at = int(np.searchsorted(samples["t_s"].to_numpy(), t_s))
    return samples.iloc[min(at, len(samples) - 1)].to_dict()
