"""The table of a GPU check: predicted beside measured, error, speed, MFU, energy; and all errors in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from .cards import Card
from .gpu_plan import Cell

GIB = 2**30


def table(found: Sequence[tuple[Cell, Mapping]], card: Card | None) -> pd.DataFrame:
    """One row a cell. Errors are predicted over measured, less 1: negative is an under-estimate. `mfu` is of the card's bf16 peak,
    by the FLOPs of forward and backward as forecast, recomputation left out."""
    by_name = {cell.name: kept for cell, kept in found}
    return pd.DataFrame([_row(cell, kept, card, by_name) for cell, kept in found])


def _row(cell: Cell, kept: Mapping, card: Card | None, by_name: Mapping[str, Mapping]) -> dict:
    told = cell.forecast or {}
    row = {"cell": cell.name, "does": cell.does, "outcome": kept["outcome"], "on_purpose": cell.on_purpose}
    for name in ("allocated", "reserved"):
        row[f"predicted_{name}_bytes"] = told.get(f"{name}_peak_bytes") if cell.does == "measure" else None
        row[f"measured_{name}_bytes"] = kept.get(f"{name}_peak_bytes")
        row[f"{name}_error"] = _error(row[f"predicted_{name}_bytes"], row[f"measured_{name}_bytes"])
    nvml = kept.get("nvml_process_bytes") or kept.get("nvml_used_bytes")
    row["predicted_nvml_bytes"] = _sum(row["predicted_reserved_bytes"], card and card.context_bytes)
    row |= {"measured_nvml_bytes": nvml, "nvml_error": _error(row["predicted_nvml_bytes"], nvml)}
    energy, tokens = (kept.get("energy") or {}).get("j"), kept.get("window_tokens")
    return {**row, "step_s": kept.get("step_s_median"), "tokens_per_s": kept.get("tokens_per_s"), "mfu": _mfu(told, kept, card),
            "j_per_1000_tokens": energy / tokens * 1000 if energy is not None and tokens else None,
            "num_alloc_retries": kept.get("num_alloc_retries"), "over_trainer": _over_trainer(cell, kept, by_name),
            "predicted_fits": told.get("fits"), "reason": kept["reason"]}


def _error(predicted: int | None, measured: int | None) -> float | None:
    return predicted / measured - 1 if predicted and measured else None


def _sum(*parts: int | None) -> int | None:
    return None if None in parts else sum(part for part in parts if part is not None)


def _mfu(told: Mapping, kept: Mapping, card: Card | None) -> float | None:
    seconds = kept.get("step_s_median")
    if card is None or not seconds or not told.get("flops"):
        return None
    flops = sum(count for phase, count in told["flops"].items() if phase in ("forward", "backward"))
    return flops / seconds / (card.bf16_tflops * 1e12)


def _over_trainer(cell: Cell, kept: Mapping, by_name: Mapping[str, Mapping]) -> float | None:
    """How many times the tokens a second of the Trainer of transformers."""
    theirs = by_name.get(Cell("peer", cell.question).name, {}).get("tokens_per_s") if cell.does == "measure" else None
    return kept["tokens_per_s"] / theirs if theirs and kept.get("tokens_per_s") else None


def summary(rows: pd.DataFrame) -> dict:
    """Median and worst absolute error of each peak with its number of cells, the share of under-estimates, of cells forecast not
    to fit that fitted, and of those forecast to fit that ran out. None where nothing was measured."""
    measured = rows[(rows["does"] == "measure")] if len(rows) else rows
    answer: dict = {"cells": len(rows)}
    for name in ("allocated", "reserved", "nvml"):
        errors = measured[f"{name}_error"].dropna().astype(float) if len(measured) else pd.Series(dtype=float)
        answer[name] = {"n": len(errors), "median": _or_none(errors.abs().median()), "worst": _or_none(errors.abs().max()),
                        "under_share": _or_none((errors < -0.005).mean())}
    refused = measured[measured["predicted_fits"].eq(False)] if len(measured) else measured
    fitting = measured[measured["predicted_fits"].eq(True) & ~measured["on_purpose"]] if len(measured) else measured
    answer["false_refusals"] = {"n": len(refused), "share": _or_none((refused["outcome"] == "ok").mean()) if len(refused) else None}
    answer["ran_out_unforeseen"] = {"n": len(fitting),
                                    "share": _or_none((fitting["outcome"] == "oom").mean()) if len(fitting) else None}
    return answer


def _or_none(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def line(cell: Cell, kept: Mapping) -> str:
    """One cell when it is done."""
    tokens = f"{kept['tokens_per_s']:,.0f} tokens/s" if kept.get("tokens_per_s") else ""
    return f"{cell.name:<34}{kept['outcome']:<8}{kept.get('took_s', 0):5.0f} s  {tokens or kept['reason']}"


COLUMNS = (("allocated GiB: predicted", "predicted_allocated_bytes"), ("measured", "measured_allocated_bytes"),
           ("error", "allocated_error"), ("reserved: predicted", "predicted_reserved_bytes"),
           ("measured", "measured_reserved_bytes"), ("error", "reserved_error"), ("tokens/s", "tokens_per_s"), ("MFU", "mfu"),
           ("J/1k tokens", "j_per_1000_tokens"), ("over Trainer", "over_trainer"))


def text(rows: pd.DataFrame, total: Mapping, machine: Mapping, card: Card | None) -> str:
    """The table as Markdown, and under it the errors and the machine."""
    lines = ["| cell | ended | " + " | ".join(head for head, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for _, row in rows.iterrows():
        ended = row["outcome"] + (" (on purpose)" if row["on_purpose"] and row["outcome"] == "oom" else "")
        lines.append(f"| {row['cell']} | {ended} | " + " | ".join(_cell(name, row[name]) for _, name in COLUMNS) + " |")
    for name in ("allocated", "reserved", "nvml"):
        told = total[name]
        lines.append(f"{name} peak: " + ("N/A, nothing measured" if not told["n"] else
                     f"median error {told['median']:.3%}, worst {told['worst']:.3%}, under by more than 0.5 % "
                     f"{told['under_share']:.0%}, n = {told['n']}"))
    for name in ("false_refusals", "ran_out_unforeseen"):
        share = total[name]["share"]
        lines.append(f"{name.replace('_', ' ')}: " + ("N/A" if share is None else f"{share:.0%} of {total[name]['n']}"))
    rates = (f"; MFU of {card.bf16_tflops:.0f} TFLOPS, {card.source['rates']}" if card
             else "; no GPU: measured on CPU, requested bytes")
    return "\n".join([*lines, f"{machine['name']}, driver {machine['driver']}, torch {machine['versions']['torch']}{rates}"])


def _cell(name: str, value) -> str:
    if value is None or pd.isna(value):
        return ""
    if name.endswith("_bytes"):
        return f"{value / GIB:.3f}"
    if name.endswith("_error"):
        return f"{value:+.2%}"
    return f"{value:.1%}" if name == "mfu" else f"{value:,.{2 if value < 100 else 0}f}"
