"""What was recorded of a run on CUDA, and the timeline in it: the meter's columns, from torch's
own allocator history.

A recording is torch's snapshot and what the trainer declared while it was made: *marks*, a numbered
list of moments at which phase, step or module changed, and *declarations*, "the storage at this
address is of this category", each made at a mark. The number of the latest mark stands in the
metadata of every entry of the history. So each allocation and each release knows its phase, and a
declaration means the last allocation at its address that was made at or before its mark. No stack
is recorded. An entry without metadata, as where torch keeps none, belongs to the last mark before
its time: exact to the microseconds in which both clocks are read.

Bytes are requested bytes, as the meter's are. `reserved_bytes` is the sum of segments;
`allocated_bytes`, of blocks as the allocator made them, is in no history and is found by the
simulator. Not seen: host memory, and what no entry names (modules of backward and operations, see
`timeline.align`). Not yet run on a GPU.
"""

from __future__ import annotations

import json
import pickle
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..allocator.replay import allocated_bytes
from ..allocator.snapshot import Snapshot, grown_bytes, parse_snapshot, read_snapshot
from ..files import write_whole
from ..timeline import events as timeline
from .meter import COLUMNS as METER_COLUMNS
from .modules import common

COLUMNS = (*METER_COLUMNS, "reserved_bytes", "allocated_bytes")
PREFIX = "vramlab:"  # of a mark's number in an entry's metadata


@dataclass(frozen=True)
class Mark:
    """A moment at which something changed. `span` counts stretches of the same phase; `time_us` is
    since the epoch."""

    step: int
    phase: str
    module: str
    span: int
    time_us: int


@dataclass(frozen=True)
class Declared:
    """At mark number `mark`, the storage at `address` was declared to be of `category`, and called
    `name`."""

    mark: int
    address: int
    category: str
    name: str


@dataclass
class _Life:
    """One allocation. `born`: the number of its mark, -1 for one from before the history; `died`:
    of the mark of its release."""

    serial: int
    address: int
    bytes: int
    stream: int
    born: int
    span: int
    module: str = ""
    died: int | None = None
    survived: bool = False
    category: str = ""


@dataclass(frozen=True, eq=False)
class Recording:
    """`clock`: pairs of (time_us, perf_counter), each read at one moment. `workspace_bytes`: the
    size of what a library takes for good and nobody declares. `source`: where the recording is
    from, as it stands in the timeline."""

    snapshot: Snapshot
    marks: tuple[Mark, ...]
    declared: tuple[Declared, ...]
    clock: tuple[tuple[int, float], ...]
    workspace_bytes: int = 0
    source: str = "recorder"

    @classmethod
    def of(cls, raw: dict, device: int, document: Mapping) -> Recording:
        """From what torch's `_snapshot` returned, and the other fields as plain data. Raises:
        ValueError."""
        return cls(parse_snapshot(raw, device), **_typed(document))

    def frame(self) -> pd.DataFrame:
        """The timeline: one row for each allocation and release, in order. Columns: `COLUMNS`.
        Bytes are integers; `allocated_bytes` is missing where the simulator does not support the
        allocator's settings. `t_s` is on `time.perf_counter`'s clock. A storage from before the
        history has its first row at the history's beginning, in phase init."""
        lives, rows = _read_lives(self)
        self._categorize(lives)
        events, initial = self.snapshot.events, Mark(0, "init", "", 0, 0)
        places, life = [place for place, *_ in rows], [each for *_, each in rows]
        marks = [self.marks[number] if number >= 0 else initial for _, number, *_ in rows]
        frame = pd.DataFrame(
            {
                "t_s": self._seconds([events[place].time_us for place in places]),
                "step": [mark.step for mark in marks],
                "event": [event for _, _, event, _ in rows],
                "storage": [each.serial for each in life],
                "stream": [each.stream for each in life],
                "bytes": np.array([each.bytes for each in life], np.int64),
                "live_bytes": 0,
                "category": [each.category for each in life],
                "phase": [mark.phase for mark in marks],
                "module": [each.module for each in life],
                "op": "",
                "source": self.source,
                "reserved_bytes": self._reserved()[places] if places else 0,
                "allocated_bytes": self._allocated(places),
            },
            columns=COLUMNS,
        )
        frame["live_bytes"] = timeline.live_bytes(frame)
        return frame

    @property
    def before(self) -> int:
        """How many storages are older than the history; 0 where it is whole."""
        return sum(number < 0 for _, number, *_ in _read_lives(self)[1])

    @property
    def reserved_before_bytes(self) -> int:
        """What was in segments when the history began."""
        return self.snapshot.reserved_bytes - sum(map(grown_bytes, self.snapshot.events))

    def _categorize(self, lives: list[_Life]) -> None:
        """Categories and names: as declared, by the rule of `Meter.own`; else by lifetime, or a
        library's own."""
        by_address: dict[int, list[_Life]] = defaultdict(list)
        for life in sorted(lives, key=lambda each: each.born):  # stable: in the order of allocation
            by_address[life.address].append(life)
        for declaration in self.declared:
            candidates = by_address[declaration.address]
            place = bisect_right(candidates, declaration.mark, key=lambda each: each.born)
            if place == 0:
                continue
            life = candidates[place - 1]
            freed = life.died is not None and life.died < declaration.mark
            if freed or life.category in ("weights", "inputs"):
                continue
            again = life.category == declaration.category
            life.module = common(life.module, declaration.name) if again else declaration.name
            life.category = declaration.category
        for life in lives:
            life.category = life.category or self._undeclared(life)

    def _undeclared(self, life: _Life) -> str:
        if life.died is None and self.workspace_bytes and life.bytes == self.workspace_bytes:
            return "workspace"
        phase = self.marks[life.born].phase if life.born >= 0 else "init"
        return timeline.by_lifetime(phase, life.survived)

    def _seconds(self, times_us: list[int | None]) -> np.ndarray:
        """Times since the epoch, on `perf_counter`'s clock: between two readings of both clocks
        their difference is interpolated."""
        epoch_s = np.array([np.nan if us is None else us for us in times_us], float) * 1e-6
        if not self.clock:
            return np.full(len(epoch_s), np.nan)
        read_us, counter_s = np.array(self.clock, float).T
        return epoch_s + np.interp(epoch_s, read_us * 1e-6, counter_s - read_us * 1e-6)

    def _reserved(self) -> np.ndarray:
        """(events,) bytes in segments after each entry."""
        grown = np.array([grown_bytes(event) for event in self.snapshot.events], np.int64)
        return grown.cumsum() + self.reserved_before_bytes

    def _allocated(self, places: list[int]) -> pd.Series:
        try:
            known = allocated_bytes(self.snapshot)
        except ValueError:  # settings that are not simulated
            known = {}
        numbers = [self.snapshot.events[place].number for place in places]
        return pd.Series([known.get(number) for number in numbers], dtype="Int64")

    # on disk --------------------------------------------------------------------------------------

    def write(self, folder: Path, raw: Mapping) -> None:
        """Write the recording for `read_recording`. `raw`: what torch's `_snapshot` returned."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "snapshot.pickle", pickle.dumps(raw, protocol=4))
        document = {
            "device": self.snapshot.device,
            "marks": [astuple(mark) for mark in self.marks],
            "declared": [astuple(declaration) for declaration in self.declared],
            "clock": self.clock,
            "workspace_bytes": self.workspace_bytes,
            "source": self.source,
        }
        write_whole(folder / "said.json", json.dumps(document))


def read_recording(folder: Path | str) -> Recording:
    """The recording that `Recording.write` wrote. Raises: FileNotFoundError; ValueError."""
    folder = Path(folder)
    document = json.loads((folder / "said.json").read_text())
    snapshot = read_snapshot(folder / "snapshot.pickle", document.pop("device"))
    return Recording(snapshot, **_typed(document))


def _typed(document: Mapping) -> dict:
    return {
        **document,
        "marks": tuple(Mark(*mark) for mark in document["marks"]),
        "declared": tuple(Declared(*declaration) for declaration in document["declared"]),
        "clock": tuple((int(time_us), float(t_s)) for time_us, t_s in document["clock"]),
    }


# a history, read once from its first entry to its last --------------------------------------------

_Row = tuple[int, int, str, _Life]  # (place in the history, number of the mark, event, life)


def _read_lives(recording: Recording) -> tuple[list[_Life], list[_Row]]:
    """All lives, and the rows of the timeline."""
    marks, snapshot = recording.marks, recording.snapshot
    lives: list[_Life] = []
    alive: dict[int, _Life] = {}
    rows: list[_Row] = []

    def begin(address: int, size: int, stream: int, mark: int = -1, span: int = -1) -> _Life:
        module = marks[mark].module if mark >= 0 else ""
        lives.append(_Life(len(lives), address, size, stream, mark, span, module))
        return lives[-1]

    changes, last_phase = 0, ""
    for place, (event, mark) in enumerate(zip(snapshot.events, _marks_of(recording), strict=True)):
        span = marks[mark].span + changes
        if event.action in ("alloc", "free_requested", "free_completed"):
            # an address that is handed out again was freed, whether or not the history has the free
            life = alive.pop(event.address, None)
            if life is None and event.action == "free_requested":  # older than the history
                life = begin(event.address, event.bytes, event.stream)
            if life is not None:
                life.died, life.survived = mark, life.span != span
                rows.append((place, mark, "free", life))
        if event.action == "alloc":
            # recompute begins and ends inside backward; what it leaves dies shortly after its end
            if marks[mark].phase != last_phase:
                last_phase, changes, span = marks[mark].phase, changes + 1, span + 1
            life = begin(event.address, event.bytes, event.stream, mark, span)
            alive[event.address] = life
            rows.append((place, mark, "alloc", life))
    older = [life for life in lives if life.born < 0]
    older += [begin(*block) for block in _untouched(snapshot, alive)]
    return lives, [(0, -1, "alloc", life) for life in older] + rows


def _untouched(snapshot: Snapshot, alive: Mapping[int, _Life]) -> Iterator[tuple[int, int, int]]:
    """(address, bytes, stream) of allocations from before the history that are still alive: only
    the block's size is known of them."""
    for segment in snapshot.segments if snapshot.events else ():
        for piece in segment.pieces:
            if piece.state == "active_allocated" and piece.address not in alive:
                yield piece.address, piece.bytes, segment.stream


def _marks_of(recording: Recording) -> list[int]:
    """The number of each entry's mark. Marks only grow: an entry without one, or with an older one
    (a release may have its allocation's), belongs to one between those of its neighbours, the last
    before its time."""
    marks, events = recording.marks, recording.snapshot.events
    numbers = np.array([_number(event.metadata) for event in events], np.int64)
    numbers[numbers < np.maximum.accumulate(numbers)] = -1
    first = np.maximum.accumulate(np.maximum(numbers, 0))
    later = np.where(numbers < 0, len(marks) - 1, numbers)
    last = np.minimum.accumulate(later[::-1])[::-1]
    times_us = [event.time_us or 0 for event in events]
    by_time = np.searchsorted([mark.time_us for mark in marks], times_us, "right") - 1
    return np.where(numbers < 0, np.clip(by_time, first, last), numbers).tolist()


def _number(metadata: str) -> int:
    number = metadata.removeprefix(PREFIX)
    return int(number) if number != metadata and number.isdecimal() else -1
