"""What a step should cost by back-of-the-envelope arithmetic, beside the forecast, and why they
differ.

Bytes a parameter, for the weights, gradients and optimizer state that are there throughout: fp32
AdamW 4 + 4 + 8, bf16 AdamW 2 + 2 + 4, with an fp32 master 2 + 2 + 12, LOMO 4 or 2 alone. Parts that
take turns count as one part of equal size; low-rank adapters and moments as nothing. NOT included:
activations, temporaries, workspaces, rounding and the allocator's cache. Only the forecast has
those.
"""

from __future__ import annotations

import re
from collections import Counter

import pandas as pd
import torch

from ..baichuan import BaichuanForCausalLM, ModelSpec
from .forecast import Forecast, Question

GIB = 2**30
STORED = {"fp32": 4, "mixed": 4, "bf16": 2, "bf16_sr": 2, "master": 2, "int8": 1, "nf4": 0.5}
"""Bytes of a stored weight, as if all were packed where some are. Gradients have the weight's own
type, and so have moments, but beside a master they are fp32."""
MOMENTS = {"adamw": 2, "adam_mini": 1}
CODED = {"adam8bit": 2 + 8 / 256, "adam4bit": 1 + 8 / 128}
"""Bytes of both moments for each trained weight, whatever the weight's type: codes, and a scale for
each block."""
WHY = {
    "activations": "kept by forward for backward; the arithmetic has none",
    "temporaries": "alive only inside an operation or between two; the arithmetic has none",
    "workspace": "held by cuBLAS and attention kernels",
    "cached": (
        "reserved by the allocator and in no tensor at that moment: freed blocks of other sizes"
    ),
    "rounding": "each request rounded up to the allocator's blocks",
    "context": "CUDA's own memory before the first tensor, a public figure for this card",
    "buffers": "not parameters",
    "inputs": "the batch",
    "collectives": "buffers of gathers and reductions between ranks",
}
UNNAMED = "unnamed"
HEAD = "NormHead, its weight normalised and gradients of that"
PLACES = (
    ("lm_head", HEAD),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp", "MLP"),
    ("embed_tokens", "embedding"),
    ("rotary", "rotary angles"),
    ("layers", "sums between blocks"),
)
"""(part of a module's name, what its bytes are); the first that matches counts."""


def count_parameters(spec: ModelSpec) -> int:
    """Number of weights, from the model itself without any memory."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in BaichuanForCausalLM(spec.config).parameters())


def closed_form(question: Question) -> dict[str, int]:
    """category -> bytes by the arithmetic above."""
    row, count = question.row, count_parameters(question.spec)
    weights, rule, trained = row.values["weights"], row.values["rule"], count * _share(question)
    keeps_gradients = row.values["until"] != "backward" and row.grads.backward
    state = 4 * (weights == "master") + CODED.get(rule, _moments(weights, rule))
    return {
        "weights": round(STORED[weights] * count),
        "gradients": round(STORED[weights] * trained) if keeps_gradients else 0,
        "optimizer": round(state * trained),
    }


def _moments(weights: str, rule: str) -> float:
    return (4 if weights == "master" else STORED[weights]) * MOMENTS.get(rule, 0)


def _share(question: Question) -> float:
    """The share of the weights that is trained at one time."""
    trains, kind = question.row.trains, question.row.values["trains"]
    if kind == "all":
        return 1.0
    blocks = question.spec.config.num_hidden_layers if kind == "blocks" else 0
    parts = getattr(trains, "count", 0) or blocks
    return 1 / parts if parts else 0.0


def comparison(forecast: Forecast) -> pd.DataFrame:
    """category, by arithmetic, forecast at its peak, difference, in GiB; the last row is the
    sum."""
    arithmetic, ledger = closed_form(forecast.question), forecast.ledger
    names = list(dict.fromkeys([*arithmetic, *ledger]))
    frame = pd.DataFrame(
        {
            "category": names,
            "arithmetic_GiB": [arithmetic.get(name, 0) / GIB for name in names],
            "predicted_GiB": [ledger.get(name, 0) / GIB for name in names],
        }
    )
    frame.loc[len(frame)] = {"category": "sum", **frame.drop(columns="category").sum()}
    return frame.assign(difference_GiB=frame["predicted_GiB"] - frame["arithmetic_GiB"])


def large_differences(forecast: Forecast) -> pd.DataFrame:
    """The rows of `comparison` whose difference is over 1 %: of the forecast's sum, or of the
    arithmetic's figure where that is less."""
    frame = comparison(forecast)
    rows, total = frame.iloc[:-1], frame["predicted_GiB"].iloc[-1]
    scale = rows["arithmetic_GiB"].where(rows["arithmetic_GiB"] > 0, total).clip(upper=total)
    return rows[rows["difference_GiB"].abs() > scale / 100]


def explain(forecast: Forecast) -> list[str]:
    """A sentence for each of the `large_differences`, with its cause."""
    return [
        f"{row.category}: {row.predicted_GiB:.2f} GiB predicted, {row.arithmetic_GiB:.2f} by"
        f" arithmetic ({row.difference_GiB:+.2f}): "
        f"{_why(forecast, row.category, row.difference_GiB)}."
        for row in large_differences(forecast).itertuples()
    ]


def causes(forecast: Forecast, category: str) -> dict[str, int]:
    """The category's bytes at the forecast's peak, named by where they were made, largest first.
    They add up to the category."""
    step, rows = forecast.trace.reported, forecast.trace.device_rows()
    rows = rows.iloc[: step.start + int(forecast.simulated.allocated_bytes[step].argmax()) + 1]
    freed = rows.loc[rows["event"] == "free", "storage"]
    alive = rows[
        (rows["event"] == "alloc") & (rows["category"] == category) & ~rows["storage"].isin(freed)
    ]
    sizes: Counter = Counter()
    for (module, op), size in alive.groupby(["module", "op"])["bytes"].sum().items():
        sizes[_cause(forecast, module, op)] += int(size)
    return dict(sizes.most_common())


def _cause(forecast: Forecast, module: str, op: str) -> str:
    module = re.sub(r"^base_model\.model\.?", "", module)  # peft's
    if not module or "lm_head" in module and ("softmax" in op or "nll_loss" in op):
        return "the update" if forecast.trace.phase == "update" else "the loss on the logits"
    if module == "model":  # what all blocks share
        position = forecast.question.spec.config.position
        return "ALiBi's mask" if position == "alibi" else "the attention mask"
    place = next((name for part, name in PLACES if part in module), f"{UNNAMED} ({module})")
    copies = "copies in another type, " if "_to_copy" in op and "lm_head" not in module else ""
    return copies + place


def _why(forecast: Forecast, category: str, difference_gib: float) -> str:
    if category in ("activations", "temporaries"):
        return f"{WHY[category]}: {_named_causes(forecast, category)}"
    if category in WHY:
        return WHY[category]
    rule, phase = forecast.question.row.values["rule"], forecast.trace.phase
    counted = category == "optimizer" and category in forecast.ledger and rule in MOMENTS
    if counted and 0 < _share(forecast.question) < 1:
        return _unequal_parts(forecast)
    largest = next(
        (
            f"; the largest is {module}, {size / GIB:.2f} GiB"
            for owned, module, size in forecast.trace.owners(100)
            if owned == category
        ),
        "",
    )
    if difference_gib > 0:
        return f"more is there at the peak in {phase} than the arithmetic has{largest}"
    share = "not all" if forecast.ledger.get(category) else "none"
    return f"the peak is in {phase}, when {share} of it is there{largest}"


def _unequal_parts(forecast: Forecast) -> str:
    row, alive = forecast.question.row.values, forecast.trace.alive
    moments_bytes = sum(
        size
        for (module, category, _), size in alive.items()
        if category == "optimizer" and "exp_avg" in module
    )
    active = moments_bytes / _moments(row["weights"], row["rule"])
    equal = count_parameters(forecast.question.spec) * _share(forecast.question)
    return (
        f"the active part has {active:,.0f} weights, an equal share of the model"
        f" {equal:,.0f}; a part that is whole blocks has nothing of the embedding and the head"
    )


def _named_causes(forecast: Forecast, category: str) -> str:
    """The causes above a twentieth of the category, in GiB; NormHead's also in copies of the head's
    stored weight."""
    sizes = causes(forecast, category)
    least = sum(sizes.values()) / 20
    stored_bytes = sum(
        size
        for (module, owned, _), size in forecast.trace.alive.items()
        if owned == "weights" and "lm_head" in module
    )
    parts = [
        f"{name} {size / GIB:.2f}"
        + (
            f" (the stored weight {size / stored_bytes:.1f} times)"
            if name == HEAD and stored_bytes
            else ""
        )
        for name, size in sizes.items()
        if size >= least
    ]
    rest = sum(size for size in sizes.values() if size < least)
    return "; ".join([*parts, *([f"smaller ones {rest / GIB:.2f}"] if rest >= GIB / 200 else [])])


def to_text(question: Question) -> str:
    """The arithmetic as one line."""
    count, sizes = count_parameters(question.spec), closed_form(question)
    each = " + ".join(f"{size / count:.4g}" for size in sizes.values())
    return (
        f"{question.model} has {count:,} parameters. {question.name}: {each} bytes a parameter for"
        f" weights, gradients and optimizer, {sum(sizes.values()) / GIB:.2f} GiB before any"
        " activation."
    )
