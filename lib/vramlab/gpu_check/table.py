"""The table of a GPU check: predicted beside measured, errors, speed, MFU and energy, and a summary
of the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..cards import Card
from ..timeline import accuracy
from ..timeline.accuracy import PEAKS, TOLERANCE, peak_error
from .plan import Cell

GIB = 2**30


def build_table(results: Sequence[tuple[Cell, Mapping]], card: Card | None) -> pd.DataFrame:
    """One row a cell. Errors are predicted over measured, less 1: negative is an under-estimate.
    `mfu` is of the card's bf16 peak, by the FLOPs of forward and backward as forecast, without
    recomputation; `over_trainer`, how many times the tokens a second of the row's peer."""
    tokens_per_s = {cell.name: result.get("tokens_per_s") for cell, result in results}
    return pd.DataFrame(
        _row(cell, result, card, tokens_per_s.get(Cell("peer", cell.question).name))
        for cell, result in results
    )


def _row(cell: Cell, result: Mapping, card: Card | None, peer_tokens_per_s: float | None) -> dict:
    measured = cell.kind == "measure"
    forecast = cell.forecast if measured else {}
    reserved_bytes = forecast.get("reserved_peak_bytes")
    joules, tokens = (result.get("energy") or {}).get("j"), result.get("window_tokens")
    speed = result.get("tokens_per_s")
    row = {
        "cell": cell.name,
        "does": cell.kind,
        "outcome": result["outcome"],
        "on_purpose": cell.meant_to_run_out,
        "predicted_allocated_bytes": forecast.get("allocated_peak_bytes"),
        "measured_allocated_bytes": result.get("allocated_peak_bytes"),
        "predicted_reserved_bytes": reserved_bytes,
        "measured_reserved_bytes": result.get("reserved_peak_bytes"),
        "predicted_nvml_bytes": reserved_bytes and card and reserved_bytes + card.context_bytes,
        "measured_nvml_bytes": result.get("nvml_process_bytes") or result.get("nvml_used_bytes"),
        "step_s": result.get("step_s_median"),
        "tokens_per_s": speed,
        "mfu": _mfu(cell.forecast, result, card),
        "j_per_1000_tokens": joules / tokens * 1000 if joules is not None and tokens else None,
        "num_alloc_retries": result.get("num_alloc_retries"),
        "over_trainer": speed / peer_tokens_per_s
        if measured and speed and peer_tokens_per_s
        else None,
        "predicted_fits": cell.forecast.get("fits"),
        "reason": result["reason"],
    }
    return row | {f"{name}_error": peak_error(row, name) for name in PEAKS}


def _mfu(forecast: Mapping, result: Mapping, card: Card | None) -> float | None:
    step_s, flops = result.get("step_s_median"), forecast.get("flops")
    if not (card and step_s and flops):
        return None
    model_flops = flops.get("forward", 0) + flops.get("backward", 0)
    return model_flops / step_s / (card.bf16_tflops * 1e12)


def summarise(table: pd.DataFrame) -> dict:
    """`accuracy.summary` of the cells that measured a row: errors of each peak, and how many were
    refused or promised falsely."""
    measured_fits = {"ok": True, "oom": False}
    rows = [
        {**row, "regime": row["cell"], "measured_fits": measured_fits.get(row["outcome"])}
        for row in table.to_dict("records")
        if row["does"] == "measure"
    ]
    return {"cells": len(table), **accuracy.summary(rows)}


def to_line(cell: Cell, result: Mapping) -> str:
    """One cell when it is done."""
    tokens_per_s = result.get("tokens_per_s")
    speed_or_reason = f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s else result["reason"]
    took_s = result.get("took_s", 0)
    return f"{cell.name:<34}{result['outcome']:<8}{took_s:5.0f} s  {speed_or_reason}"


COLUMNS = (
    ("allocated GiB: predicted", "predicted_allocated_bytes"),
    ("measured", "measured_allocated_bytes"),
    ("error", "allocated_error"),
    ("reserved: predicted", "predicted_reserved_bytes"),
    ("measured", "measured_reserved_bytes"),
    ("error", "reserved_error"),
    ("tokens/s", "tokens_per_s"),
    ("MFU", "mfu"),
    ("J/1k tokens", "j_per_1000_tokens"),
    ("over Trainer", "over_trainer"),
)
"""(heading, column of the table)."""
RATES = (("false_refusal_rate", "that ran"), ("false_promise_rate", "that ran out"))


def to_text(table: pd.DataFrame, summary: Mapping, machine: Mapping, card: Card | None) -> str:
    """The table in Markdown; under it the errors, and the machine."""
    headings = ["cell", "ended", *(heading for heading, _ in COLUMNS)]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in table.to_dict("records"):
        on_purpose = " (on purpose)" if row["on_purpose"] and row["outcome"] == "oom" else ""
        values = [to_cell(column, row[column]) for _, column in COLUMNS]
        lines.append(f"| {' | '.join([row['cell'], row['outcome'] + on_purpose, *values])} |")
    lines += [f"{name} peak: {_errors_to_text(summary[name])}" for name in PEAKS]
    for name, population in RATES:
        rate = summary["fits"][name]
        share = "N/A" if rate is None else f"{rate:.0%}"
        lines.append(f"{name.replace('_', ' ')}, of those {population}: {share}")
    note = "no GPU: measured on CPU, requested bytes"
    if card:
        note = f"MFU of {card.bf16_tflops:.0f} TFLOPS, {card.source['rates']}"
    versions = f"driver {machine['driver']}, torch {machine['versions']['torch']}"
    return "\n".join([*lines, f"{machine['name']}, {versions}; {note}"])


def _errors_to_text(errors: Mapping) -> str:
    if not errors["n"]:
        return "N/A, nothing measured"
    return (
        f"median error {errors['median_error']:.3%}, worst {errors['worst_error']:.3%}, under by"
        f" more than {TOLERANCE:.1%} {errors['under_rate_beyond']:.0%},"
        f" n = {errors['n']}"
    )


def to_cell(column: str, value) -> str:
    """A value in the unit and with the digits of its column; empty where there is none."""
    if value is None or pd.isna(value):
        return ""
    if column.endswith("_bytes"):
        return f"{value / GIB:.3f}"
    if column.endswith("_error"):
        return f"{value:+.2%}"
    return f"{value:.1%}" if column == "mfu" else f"{value:,.{2 if value < 100 else 0}f}"
