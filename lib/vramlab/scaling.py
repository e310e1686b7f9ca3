"""Steps of other sizes, solved from a few traced ones: same model, same regime, another length and batch.

    sizes = Sizes()
    for seq, batch in ((512, 1), (4096, 4), (1024, 2)):
        sizes.add(trace(spec, row, seq, batch))
    sizes.at(seq=2048, batch=1)  # the Trace, or None where it does not follow

What a step does, event by event, does not depend on how long or how many its rows are; only bytes do. Every event's bytes are
explained as c0 * m0 + c1 * m1 with m0, m1 of `MONOMIALS`, such that it holds in all traces. An answer is given only between the
traced sizes and only where every explanation of every event agrees on it, and is then byte for byte what a trace would find, as
long as no kernel changes its mind in between. Kernels round lengths up, so only whole multiples of `GRAIN` tokens are solved.
FLOPs and bytes moved are sums of more terms and are not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from .forecast import Trace, highest
from .memory import timeline

MONOMIALS = (lambda s, b: 1, lambda s, b: s, lambda s, b: b, lambda s, b: b * s, lambda s, b: s * s, lambda s, b: b * s * s)
"""What a storage's bytes can be made of, for b rows of s tokens: weights, positions, rows, activations, masks, scores."""
ENOUGH = 3
"""Traces that a solution needs: two to solve for it, one to check it."""
GRAIN = 128
"""The most that a kernel rounds a length up to: attention's rows."""
_SAME = ["step", "event", "storage", "stream", "category", "phase", "module", "op"]


class Sizes:
    """Traces of one question in several sizes, in families that do the same event by event."""

    def __init__(self) -> None:
        self._families: list[list[Trace]] = []

    def add(self, trace: Trace) -> None:
        family = next((family for family in self._families if alike(family[0], trace)), None)
        if family is None:
            self._families.append(family := [])
        family.append(trace)

    def at(self, seq: int, batch: int) -> Trace | None:
        """The step of `batch` rows of `seq` tokens; None where the traces that are there do not say."""
        if any(length % GRAIN for length in (seq, *(trace.seq for family in self._families for trace in family))):
            return None
        found = (_solved(family, seq, batch) for family in self._families if len(family) >= ENOUGH)
        return next((trace for trace in found if trace is not None), None)


def alike(one: Trace, other: Trace) -> bool:
    """Whether two traces do the same things, to storages of other sizes."""
    asked = ("model", "regime", "architecture", "world", "step", "parts", "ranked")
    return (all(getattr(one, name) == getattr(other, name) for name in asked) and len(one.frame) == len(other.frame)
            and one.frame[_SAME].equals(other.frame[_SAME]) and _unseen(one) == _unseen(other))


def _unseen(trace: Trace) -> int:
    return trace.host_bytes - timeline.host_peak_bytes(trace.frame)


def _solved(family: Sequence[Trace], seq: int, batch: int) -> Trace | None:
    """None too where another part, at that size, would be the one to report."""
    began, first = time.perf_counter(), family[0]
    sizes, which = np.unique(np.stack([trace.frame["bytes"] for trace in family], axis=1), axis=0, return_inverse=True)
    places = [(trace.seq, trace.batch) for trace in family]
    if not _between(places, (seq, batch)):
        return None
    solved = [_bytes(places, row.tolist(), (seq, batch)) for row in sizes]
    crossed = {way: _bytes(places, [trace.crossed[way] for trace in family], (seq, batch)) for way in first.crossed}
    if None in (*solved, *crossed.values()):
        return None
    frame = first.frame.assign(bytes=np.array(solved, np.int64)[which.ravel()])
    frame["live_bytes"] = timeline.live_bytes(frame)
    if first.ranked and highest(frame, first.ranked) != highest(first.frame, first.ranked):
        return None
    return Trace.of(frame, first.step, first.ranked, _unseen(first), model=first.model, regime=first.regime, seq=seq, batch=batch,
                    world=first.world, device=first.device, architecture=first.architecture, parts=first.parts,
                    crossed=crossed, work={}, took_s=time.perf_counter() - began)


def _between(places: list[tuple[int, int]], wanted: tuple[int, int]) -> bool:
    """Whether length and number of tokens lie within the traced ones: what is cut into chunks by them, as a fused head is, has
    as many chunks there as at both ends, which do the same; beyond them it may have more."""
    return all(min(sizes) <= size <= max(sizes) for *sizes, size in (
        [*(s for s, _ in places), wanted[0]], [*(s * b for s, b in places), wanted[0] * wanted[1]]))


def _bytes(places: list[tuple[int, int]], sizes: list[int], wanted: tuple[int, int]) -> int | None:
    """What is `sizes` bytes at `places`, each (tokens, rows), at another place."""
    answers = set()
    for one, two in itertools.combinations(MONOMIALS, 2):
        found = _coefficients([(one(*place), two(*place)) for place in places], sizes)
        if found is not None:
            c0, c1, scale = found
            answers.add(divmod(c0 * one(*wanted) + c1 * two(*wanted), scale))
    size, rest = answers.pop() if len(answers) == 1 else (-1, 0)
    return size if size >= 0 and rest == 0 else None


def _coefficients(rows: list[tuple[int, int]], sizes: list[int]) -> tuple[int, int, int] | None:
    """(c0, c1, scale) such that c0 * m0 + c1 * m1 = scale * size in every row, in integers; None when there are none or many."""
    known = list(zip(rows, sizes, strict=True))
    for ((a, b), y), ((c, d), z) in itertools.combinations(known, 2):
        scale = a * d - b * c
        if scale:
            c0, c1 = y * d - z * b, z * a - y * c
            return (c0, c1, scale) if all(c0 * p + c1 * q == scale * size for (p, q), size in known) else None
    return None
