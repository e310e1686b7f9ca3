"""The events of a trace, by the turns of its loops over chunks.

A storage is named by the number of the event in which it was born, as in the timeline.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from ..trace import Trace

SAME = ["step", "event", "stream", "category", "phase", "module", "op"]
"""The columns of an event that do not depend on the size of anything."""


class NoPlan(Exception):
    """The trace does not determine which events a step of the other size has."""


class TurnEvents:
    """The events of a trace, and the loop and the turn in which each lies (-1: in none)."""

    def __init__(self, trace: Trace):
        frame, self.loops = trace.frame, trace.loops
        self.birth = frame["storage"].to_numpy()
        # equal numbers: events that are equal in `SAME`
        self.kind = frame.groupby(SAME, sort=False, observed=True).ngroup().to_numpy()
        self.loop, self.turn = np.full(len(frame), -1), np.full(len(frame), -1)
        for number, loop in enumerate(self.loops):
            for turn, (first, last) in enumerate(itertools.pairwise(loop.edges)):
                self.loop[first:last], self.turn[first:last] = number, turn
        self.turn_counts = np.array([len(loop.edges) - 1 for loop in self.loops], int)
        self.name = self._names()
        # how many turns ago a storage of the same loop was born; -1 for any other storage
        same_loop = (self.loop[self.birth] == self.loop) & (self.loop >= 0)
        self.age = np.where(same_loop, self.turn - self.turn[self.birth], -1)
        self._subject = np.where(same_loop, self.name[self.birth], self.birth)

    def _names(self) -> np.ndarray:
        """(events,) a number for each birth in a loop, from its kind and from how many births of
        that kind precede it in its turn: counterparts in different turns have the same. Else -1."""
        born = (self.birth == np.arange(len(self.birth))) & (self.loop >= 0)
        births = pd.DataFrame({"loop": self.loop, "turn": self.turn, "kind": self.kind})[born]
        births["nth"] = births.groupby(["loop", "turn", "kind"]).cumcount()
        names = np.full(len(born), -1)
        names[born] = births.groupby(["kind", "nth"]).ngroup()
        return names

    def actions(self, loop: int, turn: int) -> np.ndarray:
        """(3, events) what a turn does: the kind of each event, the age of its storage in turns,
        and the storage's name in the turn of its birth."""
        events = slice(*self.loops[loop].edges[turn : turn + 2])
        return np.stack([column[events] for column in (self.kind, self.age, self._subject)])

    @cached_property
    def outliving(self) -> np.ndarray:
        """The events, after the end of a loop, of storages that were born in it."""
        return np.flatnonzero((self.loop[self.birth] >= 0) & (self.age < 0))

    @cached_property
    def from_every_turn(self) -> np.ndarray:
        """(events,) whether a birth outlives its loop and has a counterpart that does so in every
        other turn of the loop."""
        births = np.unique(self.birth[self.outliving])
        names = pd.DataFrame({"loop": self.loop[births], "name": self.name[births]})
        counterparts = names.groupby(["loop", "name"])["name"].transform("size")
        every = np.zeros(len(self.birth), bool)
        every[births] = counterparts == self.turn_counts[self.loop[births]]
        return every

    def ends_are_known(self, changed: np.ndarray) -> bool:
        """Whether it is known when the storages that outlive a loop die if the loop has another
        number of turns (`changed`): each comes from the first turn or the last two, or has
        counterparts from every turn and dies outside of loops."""
        birth = self.birth[self.outliving]
        turn, loop = self.turn[birth], self.loop[birth]
        known = np.where(
            self.from_every_turn[birth],
            self.loop[self.outliving] < 0,
            (turn == 0) | (self.turn_counts[loop] - turn <= 2),
        )
        return bool((known | ~changed[loop]).all())


_READ: WeakKeyDictionary[Trace, TurnEvents] = WeakKeyDictionary()


def read_events(trace: Trace) -> TurnEvents:
    """The events of `trace`, read once: many sizes are derived from one trace."""
    if trace not in _READ:
        _READ[trace] = TurnEvents(trace)
    return _READ[trace]


def repeated_turns(events: TurnEvents, loop: int, count: int) -> np.ndarray:
    """(count,) for each turn of a loop with `count` turns, the turn of the trace that it repeats.

    Turns in the middle of a loop repeat each other; up to three turns at its beginning and the last
    one may differ from them. Raises: NoPlan.
    """
    last = int(events.turn_counts[loop]) - 1
    if count == last + 1:
        return np.arange(count)
    middle = _first_repeated(events, loop)
    if count > middle:
        return np.array([*range(middle), *[middle] * (count - middle - 1), last])
    # the only turn is the first and the last: these must agree but for what earlier turns left
    first_actions, *others = (
        actions[:, actions[1] <= 0]
        for actions in (events.actions(loop, turn) for turn in (0, middle, last))
    )
    if count == 1 == middle and all(np.array_equal(first_actions, other) for other in others):
        return np.array([0])
    raise NoPlan


def _first_repeated(events: TurnEvents, loop: int) -> int:
    """The first of the turns in the middle of a loop, of which there are two or more, all alike.
    Raises: NoPlan."""
    for first in (1, 2, 3):
        middle = [events.actions(loop, turn) for turn in range(first, events.turn_counts[loop] - 1)]
        if len(middle) >= 2 and all(np.array_equal(middle[0], other) for other in middle[1:]):
            return first
    raise NoPlan
