"""A step with more or fewer turns of a loop over chunks: the same events, but for whole turns put
in or left out.

    plan = unfold(trace, seq=4096, batch=4)  # or None
    trace.frame.iloc[plan.source]            # its events, in order, of which plan.storage says
                                             which storage they are about

A fused head cuts tokens into chunks, and rows of its gradient, by a rule that it tells (`Cut`), so
the number of turns for another number of tokens is known and not guessed. Turns in the middle of a
loop do the same event by event, to storages born as long before: the trace must show at least two
of them, and one is repeated. The first turns and the last may differ from them. What a turn leaves
behind dies in the next turns, or after the loop: as what the first turn left, or the last ones, or,
where every turn left the like, one after the other in a row. Where a loop does anything else, there
is no plan.

Only which events there are is said here; bytes are `scaling`'s. A storage is named by the number of
the event it was born in.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from ..trace import Trace
from .loops import Loop

SAME = ["step", "event", "stream", "category", "phase", "module", "op"]
"""What of an event does not depend on the size of anything."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Arrays by event of the step that is planned."""

    source: np.ndarray
    """The event of the trace that it is the like of."""
    storage: np.ndarray
    loop: np.ndarray
    """The loop it lies in; -1 where it lies in none."""
    turn: np.ndarray
    loops: tuple[Loop, ...]

    def chunks(self) -> np.ndarray:
        """(events, 2) the size of the chunk an event's turn takes, and of the one after it; 0 for
        none."""
        sizes = [[b - a for a, b in loop.cut.spans(loop.tokens)] for loop in self.loops]
        pairs = np.array(
            [[0, 0], *(pair for each in sizes for pair in zip(each, [*each[1:], 0], strict=True))]
        )
        first = np.cumsum([1, *(len(each) for each in sizes)])
        return pairs[np.where(self.loop >= 0, first[self.loop] + self.turn, 0)]


def unfold(trace: Trace, seq: int, batch: int) -> Plan | None:
    """The step of `batch` rows of `seq` tokens, as the turns of `trace` tell it; None where they do
    not."""
    tokens = seq * batch
    if any(loop.tokens != trace.seq * trace.batch for loop in trace.loops):
        return None
    if any(
        (tokens > loop.cut.whole_up_to) != (loop.tokens > loop.cut.whole_up_to)
        for loop in trace.loops
    ):
        return None
    events = _events(trace)
    turns = [
        _turns(events, number, len(loop.cut.spans(tokens)))
        for number, loop in enumerate(trace.loops)
    ]
    if any(found is None for found in turns):
        return None
    changed = np.array(
        [len(found) != had for found, had in zip(turns, events.had, strict=True)], bool
    )
    return _Built(events, turns, changed).plan(tokens) if events.told(changed) else None


class _Events:
    """The events of a trace, and where in its loops they lie."""

    def __init__(self, trace: Trace):
        frame, self.loops = trace.frame, trace.loops
        self.birth = frame["storage"].to_numpy()
        self.code = frame.groupby(SAME, sort=False, observed=True).ngroup().to_numpy()
        count = len(frame)
        self.loop, self.turn = np.full(count, -1), np.full(count, -1)
        for number, loop in enumerate(self.loops):
            for turn, (a, b) in enumerate(itertools.pairwise(loop.edges)):
                self.loop[a:b], self.turn[a:b] = number, turn
        self.had = np.array([len(loop.edges) - 1 for loop in self.loops], int)
        self.edges = np.array([edge for loop in self.loops for edge in loop.edges], int)
        self._first = np.cumsum([0, *(self.had + 1)])
        self._name_births()
        self.lag = np.where(
            (self.loop[self.birth] == self.loop) & (self.loop >= 0),
            self.turn - self.turn[self.birth],
            -1,
        )
        self.about = np.where(self.lag >= 0, self.name[self.birth], self.birth)

    def _name_births(self) -> None:
        """Within its turn a birth is named by what it is, and the how manieth of these."""
        born = np.flatnonzero((self.birth == np.arange(len(self.birth))) & (self.loop >= 0))
        turns = pd.DataFrame(
            {"turn": self._first[self.loop[born]] + self.turn[born], "code": self.code[born]}
        )
        turns["nth"] = turns.groupby(["turn", "code"]).cumcount()
        self.name = np.full(len(self.birth), -1)
        self.name[born] = (
            turns["code"] * (1 + turns["nth"].max()) + turns["nth"] if len(born) else 0
        )
        self._names = 1 + self.name.max(initial=-1)
        keys = turns["turn"].to_numpy() * self._names + self.name[born]
        order = keys.argsort()
        self._keys, self._born = keys[order], born[order]

    def born(self, loop: np.ndarray, turn: np.ndarray, name: np.ndarray) -> np.ndarray:
        """The birth of that name in a turn; -1 where there is none."""
        keys = (self._first[loop] + turn) * self._names + name
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._born[at], -1)

    def edge(self, loop: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """The event a turn begins with."""
        return self.edges[self._first[loop] + turn]

    def said(self, loop: int, turn: int) -> np.ndarray:
        """(3, events) what a turn does: what, to a storage how many turns old, and which of that
        turn's."""
        body = slice(*self.loops[loop].edges[turn : turn + 2])
        return np.stack([array[body] for array in (self.code, self.lag, self.about)])

    @cached_property
    def outlive(self) -> np.ndarray:
        """Events about a storage that was born in a loop that is over."""
        return np.flatnonzero((self.loop[self.birth] >= 0) & (self.lag < 0))

    @cached_property
    def by_all(self) -> np.ndarray:
        """(events,) whether a birth has its like in every turn of its loop, and all these outlive
        it."""
        found, kept = np.zeros(len(self.birth), bool), np.unique(self.birth[self.outlive])
        for number, had in enumerate(self.had):
            own = kept[self.loop[kept] == number]
            names, counts = np.unique(self.name[own], return_counts=True)
            found[own] = np.isin(self.name[own], names[counts == had])
        return found

    def told(self, changed: np.ndarray) -> bool:
        """Whether all that outlives a loop with another number of turns is left by its first turn,
        by its last two, or by every one, and then dies outside loops."""
        birth = self.birth[self.outlive]
        turn, left, by_all = (
            self.turn[birth],
            self.had[self.loop[birth]] - self.turn[birth],
            self.by_all[birth],
        )
        good = np.where(by_all, self.loop[self.outlive] < 0, (turn == 0) | (left <= 2))
        return bool((good | ~changed[self.loop[birth]]).all())


_READ: WeakKeyDictionary[Trace, _Events] = WeakKeyDictionary()


def _events(trace: Trace) -> _Events:
    """Read once: a trace is asked for every size that may follow from it."""
    if trace not in _READ:
        _READ[trace] = _Events(trace)
    return _READ[trace]


def _turns(events: _Events, loop: int, count: int) -> np.ndarray | None:
    """(count,) for each turn the turn of the trace that it is the like of; None where the trace
    does not say."""
    had = int(events.had[loop])
    if count == had:
        return np.arange(had)
    lead = next(
        (
            lead
            for lead in (1, 2, 3)
            if had >= lead + 3
            and all(
                np.array_equal(events.said(loop, lead), events.said(loop, turn))
                for turn in range(lead + 1, had - 1)
            )
        ),
        None,
    )
    if lead is None:
        return None
    if count > lead:
        return np.array([*range(lead), *[lead] * (count - lead - 1), had - 1])
    # one turn is the first and the last: they must be the same but for what turns before them left
    first, middle, last = (
        said[:, said[1] <= 0] for said in (events.said(loop, turn) for turn in (0, lead, had - 1))
    )
    return (
        np.array([0])
        if count == 1 == lead and np.array_equal(first, middle) and np.array_equal(first, last)
        else None
    )


class _Built:
    """The events of a plan while they are put together."""

    def __init__(self, events: _Events, turns: list[np.ndarray], changed: np.ndarray):
        self.events, self.turns, self.changed = events, turns, changed
        self.starts: list[list[int]] = [[] for _ in turns]
        self.length, self._parts = (
            0,
            [],
        )  # events of the trace; the loop and turn they lie in; the turn their storages are of

    def plan(self, tokens: int) -> Plan | None:
        """None where what every turn left does not die in an order that is understood."""
        at = 0
        for number, loop in enumerate(self.events.loops):
            if not self._outside(at, loop.edges[0]):
                return None
            for turn, like in enumerate(self.turns[number].tolist()):
                self.starts[number].append(self.length)
                self._add(np.arange(loop.edges[like], loop.edges[like + 1]), number, turn)
            self.starts[number].append(self.length)
            at = loop.edges[-1]
        return self._numbered(tokens) if self._outside(at, len(self.events.birth)) else None

    def _add(self, source: np.ndarray, loop: int = -1, turn: int = -1, of_turn: int = -1) -> None:
        self._parts.append((source, loop, turn, of_turn))
        self.length += len(source)

    def _outside(self, first: int, last: int) -> bool:
        """What lies between two loops; False where it is not understood."""
        events, births = self.events, self.events.birth[first:last]
        special = (
            np.flatnonzero(
                events.by_all[births] & np.isin(events.loop[births], np.flatnonzero(self.changed))
            )
            + first
        )
        while len(special):
            self._add(np.arange(first, special[0]))
            length = self._deaths(special)
            if not length:
                return False
            first, special = int(special[0]) + length, special[length:]
        self._add(np.arange(first, last))
        return True

    def _deaths(self, special: np.ndarray) -> int:
        """Puts in deaths of what every turn left, which begin the events `special`; returns how
        many the trace has, 0 for another order than turn by turn, up or down."""
        events, births = self.events, self.events.birth[special]
        loop, turn, had = (
            events.loop[births[0]],
            events.turn[births[0]],
            events.had[events.loop[births[0]]],
        )
        same = (
            (events.loop[births] == loop)
            & (events.turn[births] == turn)
            & (special == special[0] + np.arange(len(special)))
        )
        each = len(same) if same.all() else int(same.argmin())
        block = special[0] + np.arange(had * each).reshape(had, each)
        if turn not in (0, had - 1) or block[-1, -1] > special[-1]:
            return 0
        block = block if turn == 0 else block[::-1]
        births, wanted = events.birth[block], np.arange(had)[:, None]
        if not (
            (events.loop[births] == loop).all()
            and (events.turn[births] == wanted).all()
            and np.isin(block, special).all()
            and (events.name[births] == events.name[births[0]]).all()
            and (events.code[block] == events.code[block[0]]).all()
        ):
            return 0
        like = self.turns[loop]
        for now in range(len(like)) if turn == 0 else reversed(range(len(like))):
            self._add(block[like[now]], of_turn=now)
        return had * each

    def _numbered(self, tokens: int) -> Plan | None:
        """Which storage each event is about, by where its birth has come to lie."""
        events = self.events
        source = np.concatenate([part for part, *_ in self._parts])
        loop, turn, of_turn = np.repeat(
            [part[1:] for part in self._parts], [len(part) for part, *_ in self._parts], axis=0
        ).T
        birth, place = events.birth[source], np.full(len(events.birth), -1)
        place[source[loop < 0]] = np.flatnonzero(loop < 0)
        inside = events.loop[birth] >= 0
        storage = np.where(inside, -1, place[birth])
        if inside.any():
            storage[inside] = self._in_a_loop(source[inside], turn[inside], of_turn[inside])
        if (storage < 0).any() or (storage > np.arange(len(storage))).any():
            return None
        loops = tuple(
            Loop(was.cut, tokens, starts)
            for was, starts in zip(events.loops, self.starts, strict=True)
        )
        return Plan(source, storage, loop, turn, loops)

    def _in_a_loop(self, source: np.ndarray, turn: np.ndarray, of_turn: np.ndarray) -> np.ndarray:
        """Where what was born in a turn has come to be born; -1 where that turn has no such
        thing."""
        events, count = self.events, np.array([len(turns) for turns in self.turns])
        birth, lag = events.birth[source], events.lag[source]
        loop, was = events.loop[birth], events.turn[birth]
        left = np.where(was == 0, was, count[loop] - events.had[loop] + was)
        now = np.where(lag >= 0, turn - lag, np.where(of_turn >= 0, of_turn, left))
        firsts = np.cumsum([0, *count])
        like = np.concatenate(self.turns)[firsts[loop] + now]
        start = np.array([start for starts in self.starts for start in starts])[
            (firsts + np.arange(len(firsts)))[loop] + now
        ]
        born = events.born(loop, like, events.name[birth])
        return np.where(
            (born >= 0) & (now >= 0) & (now < count[loop]),
            start + born - events.edge(loop, like),
            -1,
        )


def births(trace: Trace) -> list[tuple[int, int]]:
    """For each event (loop, name): what is made in one turn and the like of it in another have the
    same."""
    events = _events(trace)
    return list(zip(events.loop.tolist(), events.name.tolist(), strict=True))


def differs(trace: Trace, plan: Plan, other: Trace) -> bool:
    """Whether `other` does anything else than planned from `trace`."""
    frame, wanted = trace.frame, other.frame
    return (
        len(plan.source) != len(wanted)
        or plan.loops != other.loops
        or not np.array_equal(plan.storage, wanted["storage"].to_numpy())
        or any(
            not np.array_equal(frame[name].to_numpy()[plan.source], wanted[name].to_numpy())
            for name in SAME
        )
    )
