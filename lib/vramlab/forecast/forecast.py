"""Forecasts: a traced step, run through the simulated allocator and compared with a card.

    forecast(Question("baichuan2-7b", "lomo", seq=1024, batch=1),
             card("rtx4090")).reserved_peak_bytes

A trace depends on the question and on this library's code only, so it is kept on disk, see
`question`. What the allocator and the card make of it takes a tenth of a second and is
computed each time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from ..allocator.settings import Settings
from ..allocator.simulate import STRIDES, Simulated, rows, simulate
from ..capture.work import Floor, roofline
from ..cards import Card
from ..timeline.events import alive_after, by_category
from ..timeline.sides import sides
from .question import CACHE, Question, traced_step
from .trace import Trace


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a question's step does to one card, or to a device of unlimited memory. Bytes are
    integers, of the reported step unless said otherwise; `predicted`, never measured."""

    question: Question
    card: Card | None
    settings: Settings
    trace: Trace
    simulated: Simulated
    """The step through an allocator of unlimited memory; through the card's where garbage is
    collected and the step fits."""
    allocated_peak_bytes: int
    """Highest `allocated`: requests rounded as the allocator rounds them."""
    reserved_peak_bytes: int
    """Most bytes that the allocator has taken from the driver, up to the end of the reported
    step."""
    ledger: Mapping[str, int]
    """category -> bytes at the peak of allocated: the trace's categories, `rounding`, `cached`
    (reserved, not allocated) and, with a card, `context`. Their sum is what the driver would
    report."""
    fits: bool | None
    """Whether the step runs on the card, the allocator emptying its cache where it must; None
    without a card."""
    retries: int
    """How often the allocator had to empty its cache to fit."""
    margin_bytes: int | None
    """What the card has left at the reserved peak; negative: how many bytes are missing unless the
    cache is emptied."""
    floor: Floor | None
    """No step on this card can be faster; not an estimate of the time. None without a card."""
    took_s: float

    @property
    def max_positions(self) -> int:
        """Tokens of the longest row in the model's config; longer rows are forecast too."""
        return self.question.spec.config.max_position_embeddings

    @cached_property
    def reserved_range_bytes(self) -> tuple[int, int]:
        """Least and most of `reserved_peak_bytes` over several orders of the segments' addresses.
        The driver chooses the addresses, and they decide which of several free blocks of the same
        size is used. Simulates the step once for each of `STRIDES`."""
        card, end = self.card, self.trace.reported.stop
        limits: tuple[int | None, int | None] = (None, None)
        if card and self.fits and self.settings.collects_above_bytes(card.total_bytes) is not None:
            limits = card.capacity_bytes, card.total_bytes
        events, peaks = list(rows(self.trace.events)), [self.reserved_peak_bytes]
        for stride in STRIDES:
            simulated = simulate(events, self.settings, *limits, stride)
            peaks.append(int(simulated.reserved_bytes[:end].max()))
        return min(peaks), max(peaks)

    def to_json(self) -> dict:
        """Plain data for `--json` and the report."""
        question, trace = self.question, self.trace
        owners = [
            {"category": category, "module": module, "bytes": size}
            for category, module, size in trace.owners(8)
        ]
        return {
            "kind": "predicted",
            "model": question.model,
            "regime": question.regime,
            "weights": question.row.values["weights"],
            "seq": question.seq,
            "batch": question.batch,
            "max_positions": self.max_positions,
            "world": question.world,
            "card": self.card and self.card.key,
            "device": trace.device,
            "compute_capability": list(trace.architecture),
            "allocator": self.simulated.label,
            "peak_allocated_bytes": self.allocated_peak_bytes,
            "peak_reserved_bytes": self.reserved_peak_bytes,
            "peak_requested_bytes": trace.peak_bytes,
            "phase": trace.phase,
            "ledger": dict(self.ledger),
            "owners": owners,
            "host_bytes": trace.host_bytes,
            "fits": self.fits,
            "margin_bytes": self.margin_bytes,
            "num_alloc_retries": self.retries,
            "work": {phase: dict(work) for phase, work in trace.work.items()},
            "floor_s": self.floor and self.floor.s,
            "floor": self.floor and {**dataclasses.asdict(self.floor), "binds": self.floor.binds},
            "took_s": round(self.took_s, 2),
            **({"sides": self.sides()} if trace.crossed else {}),
        }

    def sides(self) -> dict[str, dict[str, int]]:
        """What client and server hold where the model is cut between two machines, in requested
        bytes, see `timeline.sides.sides`; empty elsewhere."""
        if not self.trace.crossed:
            return {}
        cut = self.question.row.trains.cut
        return sides(self.trace.frame, self.trace.step, cut, self.trace.crossed)


def forecast(
    question: Question,
    card: Card | None = None,
    settings: Settings = Settings(),  # noqa: B008, frozen
    cache_dir: Path | None = CACHE,
) -> Forecast:
    """The forecast of `question` on `card`. The trace is read from `cache_dir`, or made in seconds
    and kept there."""
    began = time.perf_counter()
    if card is not None:
        question = dataclasses.replace(question, architecture=card.compute_capability)
    trace = traced_step(question, cache_dir)
    simulated, on_card, step = simulate(trace.events, settings), None, trace.reported
    if card is not None:
        on_card = simulate(trace.events, settings, card.capacity_bytes, card.total_bytes)
        if on_card.oom is None and settings.collects_above_bytes(card.total_bytes) is not None:
            simulated = on_card
    peak = step.start + int(simulated.allocated_bytes[step].argmax())
    allocated_bytes = int(simulated.allocated_bytes[peak])
    reserved_bytes = int(simulated.reserved_bytes[: step.stop].max())
    alive = by_category(alive_after(trace.device_rows(), peak))
    return Forecast(
        question=question,
        card=card,
        settings=settings,
        trace=trace,
        simulated=simulated,
        allocated_peak_bytes=allocated_bytes,
        reserved_peak_bytes=reserved_bytes,
        ledger={
            **alive,
            "cached": int(simulated.reserved_bytes[peak]) - allocated_bytes,
            "rounding": allocated_bytes - sum(alive.values()),
            **({"context": card.context_bytes} if card else {}),
        },
        fits=on_card.oom is None if on_card else None,
        retries=on_card.num_alloc_retries if on_card else 0,
        margin_bytes=settings.usable_bytes(card.capacity_bytes, card.total_bytes) - reserved_bytes
        if card
        else None,
        floor=roofline(
            trace.work, card.bf16_tflops, card.fp32_tflops, card.gb_per_s, card.host_gb_per_s
        )
        if card
        else None,
        took_s=time.perf_counter() - began,
    )


def largest(
    question: Question,
    axis: str,
    card: Card,
    settings: Settings = Settings(),  # noqa: B008, frozen
    limit: int = 1 << 20,
    report: Callable[[str], object] = lambda _: None,
) -> tuple[int, Forecast | None]:
    """The largest `axis` ("seq" or "batch") with which the step still fits on the card: (value, its
    forecast), or (0, None) when not even the smallest does. Doubles from 1 (a sequence from 64, in
    steps of 64), then halves the gap. `report` gets a line for each size that was tried.

    Raises: ValueError, for another axis.
    """
    if axis not in ("seq", "batch"):
        raise ValueError(f"max is {axis!r}: it searches seq or batch")
    grain = 64 if axis == "seq" else 1
    value, fitting, best, too_large = 1, 0, None, None
    while too_large is None or too_large - fitting > 1:
        step = forecast(
            dataclasses.replace(question, **cast(Any, {axis: value * grain})), card, settings
        )
        report(f"{axis} {value * grain}: {'fits' if step.fits else 'does not fit'}")
        if step.fits:
            fitting, best = value, step
        else:
            too_large = value
        if too_large is None and value * 2 * grain > limit:
            break
        value = value * 2 if too_large is None else (fitting + too_large) // 2
    return fitting * grain, best


def assert_peak(
    regime: str, model: str, seq: int, batch: int, most_bytes: int, weights: str = ""
) -> Forecast:
    """A memory regression test: the forecast's peak allocated bytes are at most `most_bytes`.

    Raises: AssertionError, with what is alive at the peak, largest first.
    """
    step = forecast(Question(model, regime, seq, batch, weights))
    peak_bytes = step.allocated_peak_bytes
    if peak_bytes > most_bytes:
        owners = "\n".join(
            f"  {size:>16,}  {category} {module}"
            for category, module, size in step.trace.owners(12)
        )
        raise AssertionError(
            f"{step.question.name} on {model}, {batch} x {seq} tokens, peaks at"
            f" {peak_bytes:,} bytes in {step.trace.phase}, {peak_bytes - most_bytes:,} more than"
            f" {most_bytes:,}; alive then:\n{owners}"
        )
    return step
