"""The table of a GPU check: predicted beside measured, error, speed, MFU, energy; and all errors in
a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..cards import Card
from ..timeline import accuracy
from .plan import Cell

GIB = 2**30


def table(found: Sequence[tuple[Cell, Mapping]], card: Card | None) -> pd.DataFrame:
    """One row a cell. Errors are predicted over measured, less 1: negative is an under-estimate.
    `mfu` is of the card's bf16 peak, by the FLOPs of forward and backward as forecast,
    recomputation left out."""
    by_name = {cell.name: kept for cell, kept in found}
    return pd.DataFrame([_row(cell, kept, card, by_name) for cell, kept in found])


def _row(cell: Cell, kept: Mapping, card: Card | None, by_name: Mapping[str, Mapping]) -> dict:
    told = cell.forecast or {}
    row = {
        "cell": cell.name,
        "does": cell.does,
        "outcome": kept["outcome"],
        "on_purpose": cell.on_purpose,
    }
    for name in ("allocated", "reserved"):
        row[f"predicted_{name}_bytes"] = (
            told.get(f"{name}_peak_bytes") if cell.does == "measure" else None
        )
        row[f"measured_{name}_bytes"] = kept.get(f"{name}_peak_bytes")
        row[f"{name}_error"] = _error(row[f"predicted_{name}_bytes"], row[f"measured_{name}_bytes"])
    nvml = kept.get("nvml_process_bytes") or kept.get("nvml_used_bytes")
    row["predicted_nvml_bytes"] = _sum(row["predicted_reserved_bytes"], card and card.context_bytes)
    row |= {"measured_nvml_bytes": nvml, "nvml_error": _error(row["predicted_nvml_bytes"], nvml)}
    energy, tokens = (kept.get("energy") or {}).get("j"), kept.get("window_tokens")
    return {
        **row,
        "step_s": kept.get("step_s_median"),
        "tokens_per_s": kept.get("tokens_per_s"),
        "mfu": _mfu(told, kept, card),
        "j_per_1000_tokens": energy / tokens * 1000 if energy is not None and tokens else None,
        "num_alloc_retries": kept.get("num_alloc_retries"),
        "over_trainer": _over_trainer(cell, kept, by_name),
        "predicted_fits": told.get("fits"),
        "reason": kept["reason"],
    }


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
    theirs = (
        by_name.get(Cell("peer", cell.question).name, {}).get("tokens_per_s")
        if cell.does == "measure"
        else None
    )
    return kept["tokens_per_s"] / theirs if theirs and kept.get("tokens_per_s") else None


def summary(rows: pd.DataFrame) -> dict:
    """`accuracy.summary` of the cells that measured a row: errors of each peak, and what was
    refused or promised falsely."""
    ended = {"ok": True, "oom": False}
    told = [
        {**row, "regime": row["cell"], "measured_fits": ended.get(row["outcome"])}
        for row in rows.to_dict("records")
        if row["does"] == "measure"
    ]
    return {"cells": len(rows), **accuracy.summary(told)}


def line(cell: Cell, kept: Mapping) -> str:
    """One cell when it is done."""
    tokens = f"{kept['tokens_per_s']:,.0f} tokens/s" if kept.get("tokens_per_s") else ""
    return (
        f"{cell.name:<34}{kept['outcome']:<8}{kept.get('took_s', 0):5.0f} s "
        f" {tokens or kept['reason']}"
    )


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


def text(rows: pd.DataFrame, total: Mapping, machine: Mapping, card: Card | None) -> str:
    """The table as Markdown, and under it the errors and the machine."""
    lines = [
        "| cell | ended | " + " | ".join(head for head, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for _, row in rows.iterrows():
        ended = row["outcome"] + (
            " (on purpose)" if row["on_purpose"] and row["outcome"] == "oom" else ""
        )
        lines.append(
            f"| {row['cell']} | {ended} | "
            + " | ".join(_cell(name, row[name]) for _, name in COLUMNS)
            + " |"
        )
    for name in accuracy.PEAKS:
        told = total[name]
        lines.append(
            f"{name} peak: "
            + (
                "N/A, nothing measured"
                if not told["n"]
                else (
                    f"median error {told['median_error']:.3%}, worst {told['worst_error']:.3%},"
                    f" under by more than {accuracy.TOLERANCE:.1%}"
                    f" {told['under_rate_beyond']:.0%}, n = {told['n']}"
                )
            )
        )
    for name, of in (("false_refusal_rate", "that ran"), ("false_promise_rate", "that ran out")):
        rate = total["fits"][name]
        lines.append(
            f"{name.replace('_', ' ')}, of those {of}: "
            + ("N/A" if rate is None else f"{rate:.0%}")
        )
    rates = (
        f"; MFU of {card.bf16_tflops:.0f} TFLOPS, {card.source['rates']}"
        if card
        else "; no GPU: measured on CPU, requested bytes"
    )
    return "\n".join(
        [
            *lines,
            (
                f"{machine['name']}, driver {machine['driver']}, torch"
                f" {machine['versions']['torch']}{rates}"
            ),
        ]
    )


def _cell(name: str, value) -> str:
    if value is None or pd.isna(value):
        return ""
    if name.endswith("_bytes"):
        return f"{value / GIB:.3f}"
    if name.endswith("_error"):
        return f"{value:+.2%}"
    return f"{value:.1%}" if name == "mfu" else f"{value:,.{2 if value < 100 else 0}f}"
