"""A forecast as an answer: plain data and text for `vramlab predict`, one sentence for a
notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ..allocator.settings import Settings
from ..cards import card as read_card
from .forecast import Forecast, forecast, largest
from .question import Question

GIB = 2**30


def answer(
    model: str,
    regime: str,
    seq: int,
    batch: int,
    weights: str | None,
    world: int,
    card: str | None,
    allocator: str | None,
    axis: str | None,
    report: Callable[[str], object],
) -> dict:
    """The answer of `vramlab predict` with these options, `axis` being that of `--max`: `document`,
    plain data for `--json`, and `text`. `report` gets a line for each size that is tried."""
    question = Question(model, regime, seq, batch, weights or "", world=world)
    on_card = None if card is None else read_card(card)
    settings = Settings.parse(allocator or "")
    if axis is None:
        step = forecast(question, on_card, settings)
        document = {**step.to_json(), "reserved_range_bytes": step.reserved_range_bytes}
        return {"document": document, "text": to_text(step)}
    if on_card is None:
        raise ValueError("--max searches what fits on a card: say which with --card")
    value, best = largest(question, axis, on_card, settings, report=report)
    return {
        "document": {"max": axis, "value": value, "forecast": best and best.to_json()},
        "text": f"largest {axis} that fits on {on_card.name}: {value}",
    }


def to_text(forecast: Forecast) -> str:
    """Every figure of a forecast, one for each line."""
    question, trace = forecast.question, forecast.trace
    lines = [
        f"predicted, {trace.device}: {question.model}, {question.name},"
        f" {question.batch} x {question.seq} tokens",
        f"peak allocated  {forecast.allocated_peak_bytes / GIB:8.2f} GiB  in {trace.phase}",
        f"peak reserved   {forecast.reserved_peak_bytes / GIB:8.2f} GiB  allocator:"
        f" {forecast.simulated.label}",
        *(f"  between       {text}" for text in _reserved_range(forecast)),
        f"host memory     {trace.host_bytes / GIB:8.2f} GiB",
        "at the peak:",
        *(f"  {name:<14}{size / GIB:8.2f} GiB" for name, size in forecast.ledger.items()),
        "largest owners:",
        *(
            f"  {size / GIB:6.2f} GiB  {category} {module}"
            for category, module, size in trace.owners(5)
        ),
        *(
            f"{side:<16}{sizes['peak_bytes'] / GIB:8.2f} GiB  sends"
            f" {sizes['sends_bytes'] / 2**20:.1f} MiB a step"
            for side, sizes in forecast.sides().items()
        ),
    ]
    if forecast.card:
        lines += _card_lines(forecast)
    if forecast.max_positions < question.seq:
        lines.append(
            f"note: rows of {question.seq:,} tokens, and {question.model} knows"
            f" {forecast.max_positions:,} positions: their memory is forecast all the same"
        )
    return "\n".join([*lines, f"computed in {forecast.took_s:.1f} s"])


def _card_lines(forecast: Forecast) -> list[str]:
    card, floor = cast(Any, forecast.card), cast(Any, forecast.floor)
    usable_bytes = forecast.settings.usable_bytes(card.capacity_bytes, card.total_bytes)
    verdict = _verdict(forecast, f", after flushing its cache {forecast.retries} times")
    return [
        f"{card.name}: {verdict}; margin"
        f" {cast(int, forecast.margin_bytes) / GIB:+.2f} GiB of {usable_bytes / GIB:.2f}",
        f"no step faster than {floor.s:.3f} s, bound by {floor.binds}"
        f" (roofline floor, not an estimate): compute {floor.compute_s:.3f},"
        f" memory {floor.memory_s:.3f}, bus {floor.bus_s:.3f}",
    ]


def takeaway(forecast: Forecast) -> str:
    """One number, in Markdown: what is left of the card."""
    question, reserved_gib = forecast.question, forecast.reserved_peak_bytes / GIB
    between = "".join(f" Reserved: {text}." for text in _reserved_range(forecast))
    if forecast.card is None or forecast.margin_bytes is None:
        return f"**{reserved_gib:.1f} GiB** reserved at the peak, predicted.{between}"
    return (
        f"**{forecast.margin_bytes / GIB:+.1f} GiB** is what {question.name} of"
        f" {question.model}, {question.batch} x {question.seq} tokens, leaves of"
        f" a {forecast.card.name}: it {_verdict(forecast, ' after flushing its cache')},"
        f" predicted.{between}"
    )


def _verdict(forecast: Forecast, after_flushing: str) -> str:
    if not forecast.fits:
        return "does not fit"
    return "fits" + (after_flushing if forecast.retries else "")


def _reserved_range(forecast: Forecast) -> list[str]:
    """The range of reserved bytes as text; none where the order of addresses changes nothing."""
    least, most = (f"{size / GIB:.2f}" for size in forecast.reserved_range_bytes)
    text = f"{least} to {most} GiB, depending on where the driver places segments"
    return [text] if least != most else []
