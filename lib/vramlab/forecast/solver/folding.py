"""Derives the events of a step that goes round its loops over chunks more or less often.

    plan = unfold(trace, seq=4096, batch=4)  # or None
    trace.frame.iloc[plan.source]            # its events, in order; plan.storage: their storages

A fused head cuts tokens, and the rows of its gradient, into chunks by a fixed rule (`Cut`). So the
number of turns for another number of tokens is computed, not guessed. Turns in the middle of a loop
repeat each other event by event, on storages born equally many turns before. The trace must show at
least two such turns; one of them is repeated or left out. The first turns and the last one may
differ.

A storage that a turn leaves behind dies in one of the next turns or after the loop: with what the
first turn or the last turns left, or, where every turn leaves a counterpart, turn by turn in one
run of events. If a loop does anything else, there is no plan.

A plan says which events there are; `byte_formulas` says how many bytes each has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..trace import Trace
from .loops import Loop
from .turns import SAME, NoPlan, TurnEvents, read_events, repeated_turns


@dataclass(frozen=True, eq=False)
class Plan:
    """The events of a step that was not traced: arrays with one entry for each event."""

    source: np.ndarray
    """The event of the trace that it repeats."""
    storage: np.ndarray
    loop: np.ndarray
    """The loop in which it lies; -1: in none."""
    turn: np.ndarray
    loops: tuple[Loop, ...]

    def chunks(self) -> np.ndarray:
        """(events, 2) the size of the chunk of an event's turn, and of the chunk after it; 0 where
        there is none."""
        sizes = [[b - a for a, b in loop.cut.spans(loop.tokens)] for loop in self.loops]
        pairs = [pair for each in sizes for pair in zip(each, [*each[1:], 0], strict=True)]
        first = np.cumsum([1, *(len(each) for each in sizes)])
        return np.array([[0, 0], *pairs])[np.where(self.loop >= 0, first[self.loop] + self.turn, 0)]


def unfold(trace: Trace, seq: int, batch: int) -> Plan | None:
    """The step of `batch` rows of `seq` tokens, from the turns of `trace`; None where they do not
    determine it."""
    tokens = seq * batch
    for loop in trace.loops:
        limit = loop.cut.rounded_sum_token_limit
        if (tokens > limit) != (loop.tokens > limit) or loop.tokens != trace.seq * trace.batch:
            return None
    try:
        return _Builder(read_events(trace), tokens).build()
    except NoPlan:
        return None


class _Builder:
    """Puts together the events of a plan. Raises: NoPlan."""

    def __init__(self, events: TurnEvents, tokens: int):
        self._events, self._tokens = events, tokens
        self._turns = [
            repeated_turns(events, number, len(loop.cut.spans(tokens)))
            for number, loop in enumerate(events.loops)
        ]
        self._counts = np.array([len(turns) for turns in self._turns], int)
        # with an entry for loop -1, which is no loop
        self._changed = np.append(self._counts != events.turn_counts, False)
        if not events.ends_are_known(self._changed):
            raise NoPlan
        self._edges: list[list[int]] = [[] for _ in events.loops]
        self._length = 0
        # (events of the trace; their loop and turn in the plan; the turn their storages are from)
        self._pieces: list[tuple[np.ndarray, int, int, int]] = []

    def build(self) -> Plan:
        end = 0
        for number, loop in enumerate(self._events.loops):
            self._add_between(end, loop.edges[0])
            for turn, repeated in enumerate(self._turns[number].tolist()):
                self._edges[number].append(self._length)
                self._add(np.arange(*loop.edges[repeated : repeated + 2]), number, turn)
            self._edges[number].append(self._length)
            end = loop.edges[-1]
        self._add_between(end, len(self._events.birth))
        return self._plan()

    def _add(
        self, source: np.ndarray, loop: int = -1, turn: int = -1, birth_turn: int = -1
    ) -> None:
        self._pieces.append((source, loop, turn, birth_turn))
        self._length += len(source)

    def _add_between(self, first: int, last: int) -> None:
        """Add the events between two loops, in which storages from every turn of a loop die."""
        births = self._events.birth[first:last]
        deaths = first + np.flatnonzero(
            self._events.from_every_turn[births] & self._changed[self._events.loop[births]]
        )
        while len(deaths):
            self._add(np.arange(first, deaths[0]))
            length = self._add_deaths(deaths)
            first, deaths = int(deaths[0]) + length, deaths[length:]
        self._add(np.arange(first, last))

    def _add_deaths(self, deaths: np.ndarray) -> int:
        """Add the run with which `deaths` begins: storages from every turn of one loop die, turn by
        turn, from the first to the last or the other way round. Returns how long it is in the
        trace."""
        events, births = self._events, self._events.birth[deaths]
        loop, turn = events.loop[births[0]], events.turn[births[0]]
        count = events.turn_counts[loop]
        same_turn = (
            (events.loop[births] == loop)
            & (events.turn[births] == turn)
            & (deaths == deaths[0] + np.arange(len(deaths)))
        )
        per_turn = int(np.append(same_turn, False).argmin())
        run = deaths[0] + np.arange(count * per_turn).reshape(count, per_turn)
        if turn not in (0, count - 1) or run[-1, -1] > deaths[-1]:
            raise NoPlan
        run = run if turn == 0 else run[::-1]
        births = events.birth[run]
        if not (
            (events.loop[births] == loop).all()
            and (events.turn[births] == np.arange(count)[:, None]).all()
            and np.isin(run, deaths).all()
            and (events.name[births] == events.name[births[0]]).all()
            and (events.kind[run] == events.kind[run[0]]).all()
        ):
            raise NoPlan
        turns = list(enumerate(self._turns[loop]))
        for birth_turn, repeated in turns if turn == 0 else reversed(turns):
            self._add(run[repeated], birth_turn=birth_turn)
        return count * per_turn

    def _plan(self) -> Plan:
        """Number the storages by where they are born in the plan."""
        source = np.concatenate([piece for piece, *_ in self._pieces])
        lengths = [len(piece) for piece, *_ in self._pieces]
        loop, turn, birth_turn = np.repeat([place for _, *place in self._pieces], lengths, axis=0).T
        storages = self._storages(source, turn, birth_turn)
        births = np.flatnonzero(self._events.birth[source] == source)
        birth_numbers = storages[births].get_indexer(storages)
        storage = np.where(birth_numbers < 0, -1, births[birth_numbers])
        if (storage < 0).any() or (storage > np.arange(len(storage))).any():
            raise NoPlan
        loops = tuple(
            Loop(loop.cut, self._tokens, edges)
            for loop, edges in zip(self._events.loops, self._edges, strict=True)
        )
        return Plan(source, storage, loop, turn, loops)

    def _storages(
        self, source: np.ndarray, turn: np.ndarray, birth_turn: np.ndarray
    ) -> pd.MultiIndex:
        """(events of the plan,) the storage that each is about: the loop and the turn of its birth,
        and its name there; outside of loops, the event of its birth."""
        events, birth, age = self._events, self._events.birth[source], self._events.age[source]
        loop, traced_turn = events.loop[birth], events.turn[birth]
        # what outlives the loop keeps its distance from the first turn or from the last one
        added = np.append(self._counts - events.turn_counts, 0)[loop]
        kept_turn = np.where(traced_turn <= 0, traced_turn, traced_turn + added)
        known_turn = np.where(birth_turn >= 0, birth_turn, kept_turn)
        name = np.where(loop >= 0, events.name[birth], birth)
        return pd.MultiIndex.from_arrays([loop, np.where(age >= 0, turn - age, known_turn), name])


def differs(trace: Trace, plan: Plan, other: Trace) -> bool:
    """Whether `other` does anything else than `plan`, which was made from `trace`."""
    frame, other_frame = trace.frame, other.frame
    return (
        len(plan.source) != len(other_frame)
        or plan.loops != other.loops
        or not np.array_equal(plan.storage, other_frame["storage"].to_numpy())
        or any(
            not np.array_equal(frame[name].to_numpy()[plan.source], other_frame[name].to_numpy())
            for name in SAME
        )
    )
