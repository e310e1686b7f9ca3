"""Derives the step of another length and batch from a few traces of the same model and regime.

    sizes = Sizes()
    for seq, batch in ((512, 1), (4096, 4)):
        sizes.add(trace(spec, row, seq, batch))
    sizes.at(seq=2048, batch=1)  # the Trace, or None where it does not follow

The events of a step do not depend on how long its rows are or how many, except for how often it
goes round loops over chunks (`folding`). Only the bytes do, by the rules in `byte_formulas`. There
is an answer only between the traced sizes. It is then byte for byte what a trace would give, as
long as no kernel changes its algorithm in between. Kernels round lengths up, so only whole
multiples of `GRAIN` tokens are derived. FLOPs and bytes moved are sums of more terms and are not
derived.
"""

from __future__ import annotations

import time

from ...timeline import events as timeline
from ..representative_step import highest
from ..trace import Trace
from .byte_formulas import ByteFormulas
from .folding import Plan, differs, unfold

ENOUGH = 2
"""Traces that an answer needs: one to derive it from, one to check it. Sizes that are sums of two
monomials need a third."""
GRAIN = 128
"""The largest multiple to which a kernel rounds a length up: attention's rows."""


class Sizes:
    """Traces of one question in several sizes, in families that do the same event by event."""

    def __init__(self) -> None:
        self._families: list[_Family] = []

    def add(self, trace: Trace) -> None:
        if not any(family.add(trace) for family in self._families):
            self._families.append(_Family(trace))

    def at(self, seq: int, batch: int) -> Trace | None:
        """The step of `batch` rows of `seq` tokens; None where the traces do not determine it."""
        lengths = [seq, *(trace.seq for family in self._families for trace in family.traces)]
        if any(length % GRAIN for length in lengths):
            return None
        families = (family for family in self._families if len(family.traces) >= ENOUGH)
        steps = (family.at(seq, batch) for family in families)
        return next((step for step in steps if step is not None), None)


def plan_for(first: Trace, other: Trace) -> Plan | None:
    """The plan by which `first` unfolds to exactly the events of `other`; None where `other` does
    anything else."""
    fields = ("model", "regime", "architecture", "world", "step", "parts", "ranked")
    if any(getattr(first, name) != getattr(other, name) for name in fields):
        return None
    if _unseen_host_bytes(first) != _unseen_host_bytes(other):
        return None
    plan = unfold(first, other.seq, other.batch)
    return None if plan is None or differs(first, plan, other) else plan


def _unseen_host_bytes(trace: Trace) -> int:
    return trace.host_bytes - timeline.host_peak_bytes(trace.frame)


class _Family:
    """Traces that `first`, one of them, unfolds to; `plans` holds one plan for each."""

    def __init__(self, trace: Trace):
        self.first, self.traces, self.plans = trace, [trace], [plan_for(trace, trace)]
        self._formulas: ByteFormulas | None = None

    def add(self, trace: Trace) -> bool:
        """Add `trace` if it belongs to the family, and make it the first if only it unfolds to all
        others. Returns whether it belongs."""
        first, plans = self.first, [*self.plans, plan_for(self.first, trace)]
        if plans[-1] is None:
            first, plans = trace, [plan_for(trace, other) for other in (*self.traces, trace)]
        if None in plans:
            return False
        self.first, self.plans, self._formulas = first, plans, None
        self.traces.append(trace)
        return True

    def at(self, seq: int, batch: int) -> Trace | None:
        """None also where a different part would be the one to report at that size."""
        began, first = time.perf_counter(), self.first
        traced = [(trace.seq, trace.batch) for trace in self.traces]
        if not _between(traced, (seq, batch), in_chunks=bool(first.loops)):
            return None
        plan = unfold(first, seq, batch)
        if plan is None:
            return None
        self._formulas = self._formulas or ByteFormulas(
            first, self.traces, [each for each in self.plans if each is not None]
        )
        sizes = self._formulas.bytes(plan, seq, batch)
        crossed = self._formulas.crossed(seq, batch)
        if sizes is None or None in crossed.values():
            return None
        frame = first.frame.take(plan.source).reset_index(drop=True)
        frame = frame.assign(storage=plan.storage, bytes=sizes)
        frame["live_bytes"] = timeline.live_bytes(frame)
        if first.ranked and highest(frame, first.ranked) != highest(first.frame, first.ranked):
            return None
        return Trace.of(
            frame,
            first.step,
            first.ranked,
            _unseen_host_bytes(first),
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


def _between(traced: list[tuple[int, int]], wanted: tuple[int, int], in_chunks: bool) -> bool:
    """Whether the length and the number of rows lie within the traced ones, and, where nothing is
    cut into chunks, the number of tokens too."""
    (*lengths, length), (*batches, batch) = zip(*traced, wanted, strict=True)
    tokens = [seq * rows for seq, rows in traced]
    return (
        min(lengths) <= length <= max(lengths)
        and min(batches) <= batch <= max(batches)
        and (in_chunks or min(tokens) <= length * batch <= max(tokens))
    )
