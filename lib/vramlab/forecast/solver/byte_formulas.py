"""Derives how many bytes each event of a planned step has from the traces of its family.

Outside of loops a storage's bytes are explained by the rows' length, their number and the number of
turns of each loop: as c * m if two sizes were traced, m of `MONOMIALS`, as c0 * m0 + c1 * m1 if
three or more were. In a loop, m is of `IN_A_TURN`. An explanation counts if it holds in all traces,
and there is an answer only if all explanations agree on it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ..trace import Trace
from .folding import Plan
from .turns import read_events

Point = tuple[int, ...]
"""The arguments of a monomial. Outside of loops: the tokens of a row, the number of rows, and the
number of turns of each kind of loop; in a loop: the tokens of the step, and the sizes of this chunk
and the next one."""
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
"""For b rows of s tokens: weights, positions, rows, activations, masks, attention scores."""
SHIFTED = (lambda s, b, *_: b * (s - 1),)
"""The labels, moved by one. It is a sum of two monomials, but one that every step has."""
IN_A_TURN = (
    lambda n, r, after: 1,
    lambda n, r, after: n,
    lambda n, r, after: r,
    lambda n, r, after: n * r,
)
"""In a loop, for n tokens in the step and r tokens or rows in the chunk."""
PAIRS: Terms = list(itertools.combinations(MONOMIALS, 2))
PAIRS_IN_A_TURN: Terms = [
    *itertools.combinations(IN_A_TURN, 2),
    (IN_A_TURN[0], lambda n, r, after: after),  # the next chunk, on its way already
]
NUMBER_BYTES = 8
"""The most bytes of a number, of which a loop may make one in each turn."""


class ByteFormulas:
    """The bytes that the traces of a family show for each event of `first`, which is one of them.

    `plans[i]` unfolds `first` to `traces[i]`.
    """

    def __init__(self, first: Trace, traces: Sequence[Trace], plans: Sequence[Plan]):
        self._traces = traces
        self._cuts = tuple(dict.fromkeys(loop.cut for loop in first.loops))
        self._is_alloc = (first.frame["event"] == "alloc").to_numpy()
        outside = np.full((len(self._is_alloc), len(traces)), -1)
        # samples, each the arguments of a monomial and the bytes: of an event in a loop, and of it
        # and its counterparts in the other turns
        self._own: dict[int, set[Point]] = defaultdict(set)
        self._pooled: dict[tuple[int, int], set[Point]] = defaultdict(set)
        events = read_events(first)
        self._names = list(zip(events.loop.tolist(), events.name.tolist(), strict=True))
        for number, (trace, plan) in enumerate(zip(traces, plans, strict=True)):
            sizes, allocs = trace.frame["bytes"].to_numpy(), self._is_alloc[plan.source]
            rows = np.column_stack((plan.source, plan.chunks(), sizes))
            in_loop = plan.loop >= 0
            outside[plan.source[allocs & ~in_loop], number] = sizes[allocs & ~in_loop]
            for event, *sample in np.unique(rows[allocs & in_loop], axis=0).tolist():
                self._own[event].add((trace.seq * trace.batch, *sample))
                self._pooled[self._names[event]].add((trace.seq * trace.batch, *sample))
        # the different rows of `outside`, and which of them each event has
        self._sizes, self._sizes_row = np.unique(outside, axis=0, return_inverse=True)

    def bytes(self, plan: Plan, seq: int, batch: int) -> np.ndarray | None:
        """(events,) the bytes of each event of a planned step; None where they do not follow."""
        allocs, in_loop = self._is_alloc[plan.source], plan.loop >= 0
        sizes = np.full(len(allocs), -1)
        outside_keys = self._sizes_row.ravel()[plan.source][:, None]
        turn_keys = np.column_stack((plan.source, plan.chunks()))
        for where, keys, solve in (
            (allocs & ~in_loop, outside_keys, self._outside),
            (allocs & in_loop, turn_keys, self._in_turn),
        ):
            unique, inverse = np.unique(keys[where], axis=0, return_inverse=True)
            answers = [solve(key, seq, batch) for key in unique.tolist()]
            if None in answers:
                return None
            sizes[where] = np.array(answers, np.int64)[inverse.ravel()]
        # what is freed is what was allocated last
        alloc_events = pd.Series(np.where(allocs, np.arange(len(allocs)), -1))
        return sizes[alloc_events.groupby(plan.storage).cummax().to_numpy()]

    def crossed(self, seq: int, batch: int) -> dict[str, int | None]:
        """`Trace.crossed` of another size; None for what does not follow."""
        return {
            way: self._solve([trace.crossed[way] for trace in self._traces], seq, batch)
            for way in self._traces[0].crossed
        }

    def _outside(self, key: list[int], seq: int, batch: int) -> int | None:
        return self._solve(self._sizes[key[0]].tolist(), seq, batch)

    def _in_turn(self, key: list[int], seq: int, batch: int) -> int | None:
        """From the samples of the event's counterparts in all turns, else from its own alone."""
        event, *chunks = key
        for samples in (self._pooled[self._names[event]], self._own[event]):
            points, sizes = [sample[:-1] for sample in samples], [sample[-1] for sample in samples]
            wanted = (seq * batch, *chunks)
            size = solve_bytes(points, sizes, wanted, PAIRS_IN_A_TURN, IN_A_TURN)
            if size is not None:
                return size
        return None

    def _solve(self, sizes: Sequence[int], seq: int, batch: int) -> int | None:
        """The bytes at another size of what has `sizes` bytes in the traces, outside of loops."""
        counts = [lambda s, b, *turns, at=at: turns[at] for at in range(len(self._cuts))]
        return solve_bytes(
            [self._point(trace.seq, trace.batch) for trace in self._traces],
            sizes,
            self._point(seq, batch),
            [*PAIRS, *((MONOMIALS[0], count) for count in counts)],
            [*MONOMIALS, *SHIFTED, *counts],
            counts,
        )

    def _point(self, seq: int, batch: int) -> Point:
        return seq, batch, *(len(cut.spans(seq * batch)) for cut in self._cuts)


def solve_bytes(
    points: Sequence[Point],
    sizes: Sequence[int],
    wanted: Point,
    pairs: Terms = PAIRS,
    singles: Sequence[Monomial] = (*MONOMIALS, *SHIFTED),
    counts: Sequence[Monomial] = (),
) -> int | None:
    """The bytes at the point `wanted` of a storage that has `sizes` bytes at `points`; None unless
    all explanations give the same whole number. `pairs` are tried where there are three points or
    more, else `singles`. A monomial of `counts` is the number of turns of a loop: each turn adds a
    whole number of bytes, `NUMBER_BYTES` at most.
    """
    answers = set()
    for terms in pairs if len(set(points)) > 2 else [(term,) for term in singles]:
        solution = solve_coefficients(
            [tuple(term(*point) for term in terms) for point in points], sizes
        )
        if solution is None:
            continue
        *coefficients, scale = solution
        whole = not any(coefficient % scale for coefficient in coefficients)
        if terms[-1] in counts and not (whole and coefficients[-1] // scale <= NUMBER_BYTES):
            continue
        products = (c * term(*wanted) for c, term in zip(coefficients, terms, strict=True))
        answers.add(divmod(sum(products), scale))
    size, remainder = answers.pop() if len(answers) == 1 else (-1, 0)
    return size if size >= 0 and remainder == 0 else None


def solve_coefficients(
    rows: Sequence[tuple[int, ...]], sizes: Sequence[int]
) -> tuple[int, ...] | None:
    """Integers (c0, scale) with c0 * m0 = scale * size for every row (m0,), or (c0, c1, scale) with
    c0 * m0 + c1 * m1 = scale * size for every row (m0, m1); None if there are none or many."""
    known = list(zip(rows, sizes, strict=True))
    if len(rows[0]) == 1:
        c0, scale = sizes[0], rows[0][0]
        return (c0, scale) if all(c0 * m == scale * size for (m,), size in known) else None
    for ((a, b), y), ((c, d), z) in itertools.combinations(known, 2):
        scale = a * d - b * c
        if scale:
            c0, c1 = y * d - z * b, z * a - y * c
            holds = all(c0 * p + c1 * q == scale * size for (p, q), size in known)
            return (c0, c1, scale) if holds else None
    return None
