"""What a step should cost by arithmetic on a napkin, beside the forecast, and why they differ.

Bytes a parameter, for the weights, gradients and optimizer state that are there throughout: fp32 AdamW 4 + 4 + 8, bf16 AdamW
2 + 2 + 4, LOMO 4 or 2 alone. Parts that take turns count as one part of equal size; low-rank adapters and moments as nothing. NOT
in it: activations, temporaries, workspaces, rounding and the allocator's cache. Those are the forecast's to say.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from .baichuan import BaichuanForCausalLM, ModelSpec
from .predict import Forecast, Question

GIB = 2**30
STORED = {"fp32": 4, "mixed": 4, "bf16": 2}
"""Bytes of a stored weight; gradients and moments have the weight's own type."""
MOMENTS = {"adamw": 2}
WHY = {
    "activations": "kept by forward for backward; the arithmetic has none",
    "temporaries": "alive only inside an operation or between two, the logits and their loss first; the arithmetic has none",
    "workspace": "held by cuBLAS and attention kernels",
    "cached": "reserved by the allocator and in no tensor at that moment: freed blocks of other sizes",
    "rounding": "each request rounded up to the allocator's blocks",
    "context": "CUDA's own memory before the first tensor, a public figure for this card",
    "buffers": "not parameters", "inputs": "the batch",
}


def parameters(spec: ModelSpec) -> int:
    """Number of weights, from the model itself with no memory behind it."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in BaichuanForCausalLM(spec.config).parameters())


def closed_form(question: Question) -> dict[str, int]:
    """category -> bytes by the arithmetic above."""
    row, count = question.row, parameters(question.spec)
    stored, trained = STORED[row.values["weights"]], count * _share(question)
    kept = 0.0 if row.values["until"] == "backward" or not row.grads.backward else trained
    return {"weights": stored * count, "gradients": round(stored * kept),
            "optimizer": round(stored * MOMENTS.get(row.values["rule"], 0) * trained)}


def _share(question: Question) -> float:
    """Which share of the weights is trained at one time."""
    trains, kind = question.row.trains, question.row.values["trains"]
    if kind == "all":
        return 1.0
    parts = getattr(trains, "count", 0) or (question.spec.config.num_hidden_layers if kind == "blocks" else 0)
    return 1 / parts if parts else 0.0


def beside(found: Forecast) -> pd.DataFrame:
    """category, by arithmetic, forecast at its peak, difference, in GiB; the last row is the sum."""
    said, ledger = closed_form(found.question), dict(found.ledger)
    names = [*said, *(name for name in ledger if name not in said)]
    frame = pd.DataFrame([{"category": name, "arithmetic_GiB": said.get(name, 0) / GIB, "predicted_GiB": ledger.get(name, 0) / GIB}
                          for name in names])
    frame.loc[len(frame)] = {"category": "sum", **frame.drop(columns="category").sum()}
    return frame.assign(difference_GiB=frame["predicted_GiB"] - frame["arithmetic_GiB"])


def explained(found: Forecast) -> list[str]:
    """A sentence for each category whose difference is over 1 % of the forecast's sum."""
    frame = beside(found)
    total = frame["predicted_GiB"].iloc[-1]
    return [f"{row.category}: {row.predicted_GiB:.2f} GiB predicted, {row.arithmetic_GiB:.2f} by arithmetic "
            f"({row.difference_GiB:+.2f}): {_why(found, row.category, row.difference_GiB, found.ledger)}."
            for row in frame.iloc[:-1].itertuples() if abs(row.difference_GiB) > total / 100]


def _why(found: Forecast, category: str, difference_gib: float, ledger: Mapping[str, int]) -> str:
    if category in WHY:
        return WHY[category]
    phase = found.trace.phase
    owner = next((f"; the largest is {module}, {size / GIB:.2f} GiB" for kind, module, size in found.trace.owners(100)
                  if kind == category), "")
    if difference_gib < 0:
        return f"the peak is in {phase}, when {'none' if not ledger.get(category) else 'not all'} of it is there{owner}"
    return f"more is there at the peak in {phase} than the share that trains{owner}"


def arithmetic_words(question: Question) -> str:
    """The arithmetic as one line."""
    count, said = parameters(question.spec), closed_form(question)
    each = " + ".join(f"{size / count:.4g}" for size in said.values())
    return (f"{question.model} has {count:,} parameters. {question.name}: {each} bytes a parameter for weights, gradients and "
            f"optimizer, {sum(said.values()) / GIB:.2f} GiB before any activation.")
