"""What was recorded of one run on CUDA, and the timeline that it is: the meter's columns, from
torch's own allocator history.

A recording is torch's snapshot and what the trainer said while it was made: *marks*, a numbered
list of moments at which phase, step or module changed, and *declarations*, "the storage at this
address is of this category", each made at a mark. The number of the latest mark stands in the
metadata of every entry of the history, so each allocation and each release knows its phase, and a
declaration means the last allocation at its address that was made at or before its mark. No stack
is recorded and no frame is read. An entry without metadata, as where torch keeps none, belongs to
the last mark before its time: exact to the microseconds in which both clocks are read.

Bytes are as asked for, as the meter's are. `reserved_bytes` is the sum of segments;
`allocated_bytes`, blocks as the allocator made them, is in no history and is found by the
simulator. Not seen: host memory; what no entry says (modules of backward, the names of operations:
see `join`). Not yet run on a GPU.
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
from ..allocator.snapshot import GROWS, SHRINKS, Snapshot, parse_snapshot, read_snapshot
from ..timeline import events as timeline
from .modules import common

COLUMNS = (
    "t_s",
    "step",
    "event",
    "storage",
    "stream",
    "bytes",
    "live_bytes",
    "category",
    "phase",
    "module",
    "op",
    "source",
    "reserved_bytes",
    "allocated_bytes",
)
PREFIX = "vramlab:"  # of a mark's number in an entry's metadata


@dataclass(frozen=True)
class Mark:
    """A moment at which something changed. `span` counts stretches of one phase; `time_us` is since
    the epoch."""

    step: int
    phase: str
    module: str
    span: int
    time_us: int


@dataclass(frozen=True)
class Declared:
    """At mark number `mark`, the storage at `address` was said to be of `category`, and called
    `name`."""

    mark: int
    address: int
    category: str
    name: str


@dataclass
class _Life:
    """One allocation. `born`: the number of its mark; -1: before the history."""

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
    """`clock`: pairs of (time_us, perf_counter) read at one moment each. `workspace_bytes`: what a
    library takes for good and nobody declares. `source`: where it is from, as it stands in the
    timeline."""

    snapshot: Snapshot
    marks: tuple[Mark, ...]
    declared: tuple[Declared, ...]
    clock: tuple[tuple[int, float], ...]
    workspace_bytes: int = 0
    source: str = "recorder"

    @classmethod
    def of(cls, raw: Mapping, device: int, said: Mapping) -> Recording:
        """From what torch's `_snapshot` returned and the plain data of `said`. Raises:
        ValueError."""
        return cls(parse_snapshot(raw, device), **_typed(said))

    def frame(self) -> pd.DataFrame:
        """The timeline: one row an allocation or release, in order. Columns: `COLUMNS`. Bytes are
        integers; `allocated_bytes` is missing where the simulator does not know the allocator's
        settings. `t_s` is on `time.perf_counter`'s clock. A storage that was there before the
        history began has its first row at the history's beginning, in phase init.
        """
        lives, rows = _Lives(self).read()
        self._declare(lives)
        at, marks = (
            [row[0] for row in rows],
            [self.marks[row[1]] if row[1] >= 0 else Mark(0, "init", "", 0, 0) for row in rows],
        )
        life, events = [row[3] for row in rows], self.snapshot.events
        frame = pd.DataFrame(
            {
                "t_s": self._seconds([events[place].time_us for place in at]),
                "step": [mark.step for mark in marks],
                "event": [row[2] for row in rows],
                "storage": [one.serial for one in life],
                "stream": [one.stream for one in life],
                "bytes": np.array([one.bytes for one in life], np.int64),
                "live_bytes": 0,
                "category": [one.category for one in life],
                "phase": [mark.phase for mark in marks],
                "module": [one.module for one in life],
                "op": "",
                "source": self.source,
                "reserved_bytes": self._reserved()[at] if at else 0,
                "allocated_bytes": self._allocated(at),
            },
            columns=COLUMNS,
        )
        frame["live_bytes"] = timeline.live_bytes(frame)
        return frame

    @property
    def before(self) -> int:
        """How many entries lie before everything kept; 0 where the history is whole. Told by
        storages older than it."""
        return sum(row[1] < 0 for row in _Lives(self).read()[1])

    @property
    def reserved_before_bytes(self) -> int:
        """What was in segments when the history began."""
        events = self.snapshot.events
        grown = sum(
            event.bytes * ((event.action in GROWS) - (event.action in SHRINKS)) for event in events
        )
        return sum(segment.bytes for segment in self.snapshot.segments) - grown

    def _declare(self, lives: list[_Life]) -> None:
        """Categories and names: as told, by the rule of `Meter.own`; else by lifetime, or as a
        library's own."""
        at: dict[int, list[_Life]] = defaultdict(list)
        for life in sorted(lives, key=lambda one: one.born):  # stable: in the order of their making
            at[life.address].append(life)
        for said in self.declared:
            there = at.get(said.address, [])
            place = bisect_right(there, said.mark, key=lambda one: one.born) - 1
            life = there[place] if place >= 0 else None
            if (
                life is None
                or life.category in ("weights", "inputs")
                or (life.died is not None and life.died < said.mark)
            ):
                continue
            life.module = (
                common(life.module, said.name) if life.category == said.category else said.name
            )
            life.category = said.category
        for life in lives:
            life.category = life.category or self._undeclared(life)

    def _undeclared(self, life: _Life) -> str:
        if life.died is None and self.workspace_bytes and life.bytes == self.workspace_bytes:
            return "workspace"
        return timeline.by_lifetime(
            self.marks[life.born].phase if life.born >= 0 else "init", life.survived
        )

    def _seconds(self, times_us: list[int | None]) -> np.ndarray:
        """Entries' times on the other clock: what lies between them, interpolated between the
        readings of both."""
        told = (
            np.array([np.nan if time_us is None else time_us for time_us in times_us], float) * 1e-6
        )
        if not self.clock:
            return np.full(len(told), np.nan)
        there, here = np.array(self.clock, float).T
        return told + np.interp(told, there * 1e-6, here - there * 1e-6)

    def _reserved(self) -> np.ndarray:
        """(events,) bytes in segments after each entry; what they are at the end is known."""
        change = np.array(
            [
                event.bytes * ((event.action in GROWS) - (event.action in SHRINKS))
                for event in self.snapshot.events
            ],
            np.int64,
        ).cumsum()
        return change + self.reserved_before_bytes

    def _allocated(self, at: list[int]) -> pd.Series:
        try:
            known = allocated_bytes(self.snapshot)
        except ValueError:  # settings that are not simulated
            known = {}
        return pd.Series(
            [known.get(self.snapshot.events[place].number) for place in at], dtype="Int64"
        )

    # on disk --------------------------------------------------------------------------------------

    def write(self, folder: Path, raw: Mapping) -> None:
        """`raw`, what torch's `_snapshot` returned, and what was said: for a replay without the
        machine."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "snapshot.pickle").write_bytes(pickle.dumps(raw, protocol=4))
        said = {
            "marks": [astuple(mark) for mark in self.marks],
            "declared": [astuple(one) for one in self.declared],
            "clock": self.clock,
            "workspace_bytes": self.workspace_bytes,
            "source": self.source,
        }
        (folder / "said.json").write_text(json.dumps({"device": self.snapshot.device, **said}))


def read_recording(folder: Path | str) -> Recording:
    """What `Recording.write` wrote. Raises: FileNotFoundError; ValueError."""
    folder = Path(folder)
    said = json.loads((folder / "said.json").read_text())
    return Recording(read_snapshot(folder / "snapshot.pickle", said.pop("device")), **_typed(said))


def _typed(said: Mapping) -> dict:
    return {
        **said,
        "marks": tuple(Mark(*mark) for mark in said["marks"]),
        "declared": tuple(Declared(*one) for one in said["declared"]),
        "clock": tuple((int(time_us), float(t_s)) for time_us, t_s in said["clock"]),
    }


class _Lives:
    """Reads a history once, from its first entry to its last."""

    def __init__(self, recording: Recording):
        self.events, self.segments, self.marks = (
            recording.snapshot.events,
            recording.snapshot.segments,
            recording.marks,
        )
        self.lives: list[_Life] = []
        self.alive: dict[int, _Life] = {}
        self.rows: list[
            tuple[int, int, str, _Life]
        ] = []  # (place in the history, mark, event, life)

    def read(self) -> tuple[list[_Life], list[tuple[int, int, str, _Life]]]:
        """All lives, and the timeline's rows."""
        changes, last_phase = 0, ""
        for at, (event, mark) in enumerate(zip(self.events, self._marks_of(), strict=True)):
            span = self.marks[mark].span + changes
            if event.action in ("alloc", "free_requested", "free_completed"):
                self._free(at, mark, span, event)
            if event.action == "alloc":
                # recompute begins and ends inside backward; what it leaves dies shortly after it
                # has ended
                if self.marks[mark].phase != last_phase:
                    last_phase, changes = self.marks[mark].phase, changes + 1
                    span += 1
                life = self._new(event.address, event.bytes, event.stream, mark, span)
                self.alive[event.address] = life
                self.rows.append((at, mark, "alloc", life))
        older = [*(life for life in self.lives if life.born < 0), *self._untouched()]
        return self.lives, [(0, -1, "alloc", life) for life in older] + self.rows

    def _new(self, address: int, size: int, stream: int, mark: int, span: int) -> _Life:
        self.lives.append(
            _Life(
                len(self.lives),
                address,
                size,
                stream,
                mark,
                span,
                self.marks[mark].module if mark >= 0 else "",
            )
        )
        return self.lives[-1]

    def _free(self, at: int, mark: int, span: int, event) -> None:
        """An address that is handed out again was freed, whether or not the history kept that."""
        life = self.alive.pop(event.address, None)
        if life is None and event.action == "free_requested":  # older than the history
            life = self._new(event.address, event.bytes, event.stream, -1, -1)
        if life is not None:
            life.died, life.survived = mark, life.span != span
            self.rows.append((at, mark, "free", life))

    def _untouched(self) -> Iterator[_Life]:
        """What was there before the history and still is: of it only the block's size is known."""
        for segment in self.segments if self.events else ():
            for piece in segment.pieces:
                if piece.state == "active_allocated" and piece.address not in self.alive:
                    yield self._new(piece.address, piece.bytes, segment.stream, -1, -1)

    def _marks_of(self) -> list[int]:
        """The number of each entry's mark. Marks only grow: an entry without one, or with an older
        one (a release may have its allocation's), lies between those around it, and where, its time
        says."""
        told = np.array([_number(event.metadata) for event in self.events], np.int64)
        told[told < np.maximum.accumulate(told)] = -1
        first = np.maximum.accumulate(np.maximum(told, 0))
        last = np.minimum.accumulate(np.where(told < 0, len(self.marks) - 1, told)[::-1])[::-1]
        by_time = (
            np.searchsorted(
                [mark.time_us for mark in self.marks],
                [event.time_us or 0 for event in self.events],
                "right",
            )
            - 1
        )
        return np.where(told < 0, np.clip(by_time, first, last), told).tolist()


def _number(metadata: str) -> int:
    number = metadata.removeprefix(PREFIX)
    return int(number) if number != metadata and number.isdecimal() else -1
