"""The files of a run folder: the fields and columns that reports draw, with their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

OUTCOMES = ("ok", "oom", "diverged", "failed")
SPEED = (
    "tokens_per_s",
    "step_s_median",
    "step_s_q25",
    "step_s_q75",
    "forward_s",
    "backward_s",
    "update_s",
)
_OWNER = {"category": str, "module": str, "bytes": int}
_COUNTS = dict.fromkeys(
    (
        "asked_bytes",
        "free_bytes",
        "capacity_bytes",
        "reserved_bytes",
        "allocated_bytes",
        "largest_free_block_bytes",
    ),
    int | None,
)
RESULT: Mapping[str, Any] = {
    "outcome": OUTCOMES,
    "reason": str,
    "regime": str,
    "model": str,
    "measured_on": str,
    "device": str,
    "loss_first": Real,
    "loss_last": Real,
    "trainable_parameters": int,
    "parameters": int,
    "host_bytes": int | None,
    "optimizer_state_bytes": int,
    "speed": dict.fromkeys(SPEED, float),
    "peak_bytes": Mapping[str, int | None],
    "memory_ledger": Mapping[str, int],
    "peak": {
        "peak_bytes": int,
        "phase": str,
        "step": int,
        "categories": Mapping[str, int],
        "owners": [_OWNER],
    },
    "base": Mapping[str, Any],
    "notes": Sequence[str],
    "generation": {
        "shares": [
            {"judge": str, "domain": str, "shift": str, "call": str, "share": Real, "n": int}
        ]
    },
    "oom": {**_COUNTS, "phase": str | None, "source": str, "said": str | None, "owners": [_OWNER]},
    "ledger": {"parts": Mapping[str, int | None], "used": int | None, "context_source": str},
}
"""Fields of `result.json` that are drawn, with their types. Which of them a run has depends on its
outcome and its passes."""
PARAMETERS = {"regime": str, "model": str, "seed": int, "train_domain": str, "batch_size": int}
ENVIRONMENT = {"device": {"name": str}, "versions": Mapping[str, Any]}
FINISHED = ("speed", "trainable_parameters", "loss_first", "loss_last")
"""Fields that a run which ended ok has."""
TABLES: Mapping[str, Sequence[str]] = {
    "steps": ("step", "loss", "step_s", "tokens", "lr"),
    "scores": (
        "uid",
        "domain",
        "split",
        "shift",
        "transform",
        "label",
        "group",
        "yesno",
        "likelihood",
    ),
    "accuracy": ("domain", "shift", "scoring", "metric", "value", "low", "high", "n", "threshold"),
    "timeline": ("event", "bytes", "category", "module", "step", "phase", "live_bytes"),
}
"""Tables of a run with the columns that are drawn."""
NUMBERS = {
    *("step", "loss", "step_s", "tokens", "lr", "label", "yesno", "likelihood"),
    *("value", "low", "high", "n", "bytes", "live_bytes"),
}
"""Columns that must be numbers."""
SCORINGS = ("yesno", "likelihood")
"""Scorings by the model itself, which figures draw in its training domain."""
NEEDED = ("params.yml", "steps.parquet", "scores.parquet", "accuracy.parquet")
"""Without one of these a finished run cannot be drawn."""
READERS = {
    "result.json": "result",
    "params.yml": "params",
    "env.json": "environment",
    "nvml.parquet": "samples",
    "table.parquet": "table",
    **{f"{name}.parquet": name for name in TABLES},
}
"""File -> the attribute of `folder.Run` that reads it."""
