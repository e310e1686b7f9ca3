"""Steps of other sizes, solved from a few traced ones: same model, same regime, another length and
batch.

    sizes = Sizes()
    for seq, batch in ((512, 1), (4096, 4)):
        sizes.add(trace(spec, row, seq, batch))
    sizes.at(seq=2048, batch=1)  # the Trace, or None where it does not follow

What a step does, event by event, does not depend on how long or how many its rows are, but for how
often it goes round loops over chunks (`folding`); only bytes do. Every event's bytes are explained
such that it holds in all traces: of two traces as c * m, m of `MONOMIALS`, of more as c0 * m0 + c1
* m1; in a loop m is of `IN_A_TURN`. An answer is given only between the traced sizes and only where
every explanation of every event agrees on it, and is then byte for byte what a trace would find, as
long as no kernel changes its mind in between. Kernels round lengths up, so only whole multiples of
`GRAIN` tokens are solved. FLOPs and bytes moved are sums of more terms and are not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ...timeline import events as timeline
from ..representative_step import highest
from ..trace import Trace
from .folding import Plan, births, differs, unfold

Place = tuple[int, ...]
Monomial = Callable[..., int]
Terms = Sequence[tuple[Monomial, ...]]

MONOMIALS = (
    lambda s, b, *_: 1,
    lambda s, b, *_: s,
    lambda s, b, *_: b,
    lambda s, b, *_: b * s,
    lambda s, b, *_: s * s,
    lambda s, b, *_: b * s * s,
)
"""What a storage's bytes can be made of, for b rows of s tokens: weights, positions, rows,
activations, masks, scores."""
SHIFTED = (lambda s, b, *_: b * (s - 1),)
"""Which is a sum of two, and in every step: labels, moved by one."""
IN_A_TURN = (
    lambda n, r, after: 1,
    lambda n, r, after: n,
    lambda n, r, after: r,
    lambda n, r, after: n * r,
)
"""The same in a loop over chunks, for n tokens and r tokens or rows in the chunk; or those `after`
it, on their way already."""
PAIRS: Terms = list(itertools.combinations(MONOMIALS, 2))
PAIRS_IN_A_TURN: Terms = [
    *itertools.combinations(IN_A_TURN, 2),
    (IN_A_TURN[0], lambda n, r, after: after),
]
NUMBER_BYTES = 8
"""The most that a number takes: there may be one for each turn of a loop."""
ENOUGH = 2
"""Traces that a solution needs: one to solve for it, one to check it. What is a sum of two takes a
third."""
GRAIN = 128
"""The most that a kernel rounds a length up to: attention's rows."""


class Sizes:
    """Traces of one question in several sizes, in families that do the same event by event."""

    def __init__(self) -> None:
        self._families: list[_Family] = []

    def add(self, trace: Trace) -> None:
        if not any(family.takes(trace) for family in self._families):
            self._families.append(_Family(trace))

    def at(self, seq: int, batch: int) -> Trace | None:
        """The step of `batch` rows of `seq` tokens; None where the traces that are there do not
        say."""
        if any(
            length % GRAIN
            for length in (
                seq,
                *(trace.seq for family in self._families for trace in family.traces),
            )
        ):
            return None
        found = (
            family.solved(seq, batch) for family in self._families if len(family.traces) >= ENOUGH
        )
        return next((trace for trace in found if trace is not None), None)


def alike(one: Trace, other: Trace) -> bool:
    """Whether two traces do the same things, to storages of other sizes."""
    return _told(one, other) is not None


def _told(first: Trace, other: Trace) -> Plan | None:
    """`other` as the turns of `first` tell it; None where it does anything else."""
    asked = ("model", "regime", "architecture", "world", "step", "parts", "ranked")
    if any(getattr(first, name) != getattr(other, name) for name in asked) or _unseen(
        first
    ) != _unseen(other):
        return None
    plan = unfold(first, other.seq, other.batch)
    return None if plan is None or differs(first, plan, other) else plan


def _unseen(trace: Trace) -> int:
    return trace.host_bytes - timeline.host_peak_bytes(trace.frame)


class _Family:
    """Traces that are all told by the turns of one of them, `first`."""

    def __init__(self, trace: Trace):
        self.first, self.traces, self.plans = trace, [trace], [_told(trace, trace)]
        self._known: _Known | None = None

    def takes(self, trace: Trace) -> bool:
        """Adds it, if it is of this family."""
        plan, first = _told(self.first, trace), self.first
        plans = (
            [*self.plans, plan]
            if plan is not None
            else [_told(trace, one) for one in (*self.traces, trace)]
        )
        if any(plan is None for plan in plans):
            return False
        self.first, self.plans, self.traces, self._known = (
            first if plan is not None else trace,
            plans,
            [*self.traces, trace],
            None,
        )
        return True

    def solved(self, seq: int, batch: int) -> Trace | None:
        """None too where another part, at that size, would be the one to report."""
        began, first = time.perf_counter(), self.first
        if not _between(
            [(trace.seq, trace.batch) for trace in self.traces], (seq, batch), bool(first.loops)
        ):
            return None
        plan = unfold(first, seq, batch)
        if plan is None:
            return None
        self._known = self._known or _Known(first, self.traces, self.plans)
        sizes, crossed = self._known.bytes(plan, seq, batch), self._known.crossed(seq, batch)
        if sizes is None or None in crossed.values():
            return None
        frame = (
            first.frame.take(plan.source)
            .reset_index(drop=True)
            .assign(storage=plan.storage, bytes=sizes)
        )
        frame["live_bytes"] = timeline.live_bytes(frame)
        if first.ranked and highest(frame, first.ranked) != highest(first.frame, first.ranked):
            return None
        return Trace.of(
            frame,
            first.step,
            first.ranked,
            _unseen(first),
            model=first.model,
            regime=first.regime,
            seq=seq,
            batch=batch,
            world=first.world,
            device=first.device,
            architecture=first.architecture,
            parts=first.parts,
            crossed=crossed,
            work={},
            loops=plan.loops,
            took_s=time.perf_counter() - began,
        )


def _between(places: list[tuple[int, int]], wanted: tuple[int, int], in_chunks: bool) -> bool:
    """Whether length and rows, where nothing is cut into chunks also the number of tokens, lie
    within the traced ones."""
    asked = [[*(s for s, _ in places), wanted[0]], [*(b for _, b in places), wanted[1]]]
    asked += [] if in_chunks else [[*(s * b for s, b in places), wanted[0] * wanted[1]]]
    return all(min(sizes) <= size <= max(sizes) for *sizes, size in asked)


class _Known:
    """What the traces of a family say of bytes, by the events of its first."""

    def __init__(self, first: Trace, traces: list[Trace], plans: list[Plan]):
        count = 1 + max(int(plan.source.max()) for plan in plans)
        outside, inside = np.full((count, len(traces)), -1), {}
        self.traces, self.cuts, self.made = (
            traces,
            tuple(dict.fromkeys(loop.cut for loop in plans[0].loops)),
            np.zeros(count, bool),
        )
        for number, (trace, plan) in enumerate(zip(traces, plans, strict=True)):
            made, sizes = (
                (trace.frame["event"] == "alloc").to_numpy(),
                trace.frame["bytes"].to_numpy(),
            )
            self.made[plan.source] = made
            there = made & (plan.loop < 0)
            outside[plan.source[there], number] = sizes[there]
            there = made & (plan.loop >= 0)
            for event, *place, size in np.unique(
                np.column_stack((plan.source, plan.chunks(), sizes))[there], axis=0
            ).tolist():
                inside.setdefault(event, set()).add((trace.seq * trace.batch, *place, size))
        self.rows, self.row = np.unique(outside, axis=0, return_inverse=True)
        alike, pooled = births(first), {}
        for event, sample in inside.items():
            pooled.setdefault(alike[event], set()).update(sample)
        kinds: dict[tuple[frozenset, frozenset], int] = {}
        self.kind = np.full(count, -1)
        for event, sample in inside.items():
            self.kind[event] = kinds.setdefault(
                (frozenset(pooled[alike[event]]), frozenset(sample)), len(kinds)
            )
        self.samples, self._answers = list(kinds), {}

    def _place(self, seq: int, batch: int) -> Place:
        return seq, batch, *(len(cut.spans(seq * batch)) for cut in self.cuts)

    def _solved(self, sizes: Sequence[int], seq: int, batch: int) -> int | None:
        """What is `sizes` bytes in the traces, outside loops."""
        counts = [
            lambda s, b, *turns, at=at: turns[at] for at in range(len(self.cuts))
        ]  # one thing a turn
        places = [self._place(trace.seq, trace.batch) for trace in self.traces]
        return _bytes(
            places,
            sizes,
            self._place(seq, batch),
            [*PAIRS, *((MONOMIALS[0], count) for count in counts)],
            [*MONOMIALS, *SHIFTED, *counts],
            counts,
        )

    def _in_turn(self, kind: int, place: Place) -> int | None:
        """In a loop: by what is told of the like in all turns, else by that of the same event
        alone."""
        if (kind, place) not in self._answers:
            found = (
                _bytes(
                    [tuple(at) for *at, _ in sample],
                    [size for *_, size in sample],
                    place,
                    PAIRS_IN_A_TURN,
                    IN_A_TURN,
                )
                for sample in self.samples[kind]
            )
            self._answers[kind, place] = next((size for size in found if size is not None), None)
        return self._answers[kind, place]

    def crossed(self, seq: int, batch: int) -> dict[str, int | None]:
        return {
            way: self._solved([trace.crossed[way] for trace in self.traces], seq, batch)
            for way in self.traces[0].crossed
        }

    def bytes(self, plan: Plan, seq: int, batch: int) -> np.ndarray | None:
        """(events,) of a step that is planned; None where they do not follow."""
        made, row = self.made[plan.source], self.row[plan.source]
        found = np.full(len(made), -1)
        there = made & (plan.loop < 0)
        rows, inverse = np.unique(row[there], return_inverse=True)
        answers = [self._solved(self.rows[row].tolist(), seq, batch) for row in rows.tolist()]
        there_too = made & (plan.loop >= 0)
        asked, which = np.unique(
            np.column_stack((self.kind[plan.source], plan.chunks()))[there_too],
            axis=0,
            return_inverse=True,
        )
        answers_too = [
            self._in_turn(kind, (seq * batch, *place)) for kind, *place in asked.tolist()
        ]
        if None in (*answers, *answers_too):
            return None
        found[there] = np.array(answers, np.int64)[inverse.ravel()]
        if len(asked):
            found[there_too] = np.array(answers_too, np.int64)[which.ravel()]
        # what is freed is what was allocated last
        last = (
            pd.Series(np.where(made, np.arange(len(made)), -1))
            .groupby(plan.storage)
            .cummax()
            .to_numpy()
        )
        return found[last]


def _bytes(
    places: Sequence[Place],
    sizes: Sequence[int],
    wanted: Place,
    pairs: Terms = PAIRS,
    singles: Sequence[Monomial] = (*MONOMIALS, *SHIFTED),
    counts: Sequence[Monomial] = (),
) -> int | None:
    """What is `sizes` bytes at `places`, at another place; of `MONOMIALS` a place is (tokens,
    rows). Of two places only what is one thing is told. Of what is in `counts` each is a number, of
    some whole bytes."""
    answers = set()
    for terms in pairs if len(set(places)) > 2 else [(one,) for one in singles]:
        rows = [tuple(term(*place) for term in terms) for place in places]
        found = _coefficients(rows, sizes)
        if found is not None:
            *each, scale = found
            if (
                terms[-1] not in counts
                or not any(size % scale for size in each)
                and each[-1] // scale <= NUMBER_BYTES
            ):
                answers.add(
                    divmod(
                        sum(size * term(*wanted) for size, term in zip(each, terms, strict=True)),
                        scale,
                    )
                )
    size, rest = answers.pop() if len(answers) == 1 else (-1, 0)
    return size if size >= 0 and rest == 0 else None


def _coefficients(rows: list[tuple[int, ...]], sizes: Sequence[int]) -> tuple[int, ...] | None:
    """(c0, c1, scale) such that c0 * m0 + c1 * m1 = scale * size in every row of two, (c0, scale)
    likewise of one, in integers; None when there are none or many."""
    known = list(zip(rows, sizes, strict=True))
    if len(rows[0]) == 1:
        c0, scale = sizes[0], rows[0][0]
        return (c0, scale) if all(c0 * m == scale * size for (m,), size in known) else None
    for ((a, b), y), ((c, d), z) in itertools.combinations(known, 2):
        scale = a * d - b * c
        if scale:
            c0, c1 = y * d - z * b, z * a - y * c
            return (
                (c0, c1, scale)
                if all(c0 * p + c1 * q == scale * size for (p, q), size in known)
                else None
            )
    return None
