"""What a step should cost by arithmetic on a napkin, beside the forecast, and why they differ.

Bytes a parameter, for the weights, gradients and optimizer state that are there throughout: fp32
AdamW 4 + 4 + 8, bf16 AdamW 2 + 2 + 4, with an fp32 master 2 + 2 + 12, LOMO 4 or 2 alone. Parts that
take turns count as one part of equal size; low-rank adapters and moments as nothing. NOT in it:
activations, temporaries, workspaces, rounding and the allocator's cache. Those are the forecast's
to say.
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
"""Bytes of a stored weight, as if all were packed where some are; gradients have the weight's own
type, and moments too, but fp32 beside a master."""
MOMENTS = {"adamw": 2, "adam_mini": 1}
CODED = {"adam8bit": 2 + 8 / 256, "adam4bit": 1 + 8 / 128}
"""Bytes a trained weight of both moments, whatever the weight's type: codes, and a scale a
block."""
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
PLACES = (
    ("lm_head", "NormHead, its weight normalised and gradients of that"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp", "MLP"),
    ("embed_tokens", "embedding"),
    ("rotary", "rotary angles"),
    ("layers", "sums between blocks"),
)
"""(in a module's name, what bytes there are), the first that fits."""


def parameters(spec: ModelSpec) -> int:
    """Number of weights, from the model itself with no memory behind it."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in BaichuanForCausalLM(spec.config).parameters())


def closed_form(question: Question) -> dict[str, int]:
    """category -> bytes by the arithmetic above."""
    row, count = question.row, parameters(question.spec)
    weights, rule, trained = row.values["weights"], row.values["rule"], count * _share(question)
    kept = 0.0 if row.values["until"] == "backward" or not row.grads.backward else trained
    state = 4 * (weights == "master") + CODED.get(rule, _moments(weights, rule))
    return {
        "weights": round(STORED[weights] * count),
        "gradients": round(STORED[weights] * kept),
        "optimizer": round(state * trained),
    }


def _moments(weights: str, rule: str) -> float:
    return (4 if weights == "master" else STORED[weights]) * MOMENTS.get(rule, 0)


def _share(question: Question) -> float:
    """Which share of the weights is trained at one time."""
    trains, kind = question.row.trains, question.row.values["trains"]
    if kind == "all":
        return 1.0
    parts = getattr(trains, "count", 0) or (
        question.spec.config.num_hidden_layers if kind == "blocks" else 0
    )
    return 1 / parts if parts else 0.0


def beside(found: Forecast) -> pd.DataFrame:
    """category, by arithmetic, forecast at its peak, difference, in GiB; the last row is the
    sum."""
    said, ledger = closed_form(found.question), dict(found.ledger)
    names = [*said, *(name for name in ledger if name not in said)]
    frame = pd.DataFrame(
        [
            {
                "category": name,
                "arithmetic_GiB": said.get(name, 0) / GIB,
                "predicted_GiB": ledger.get(name, 0) / GIB,
            }
            for name in names
        ]
    )
    frame.loc[len(frame)] = {"category": "sum", **frame.drop(columns="category").sum()}
    return frame.assign(difference_GiB=frame["predicted_GiB"] - frame["arithmetic_GiB"])


def over(found: Forecast) -> pd.DataFrame:
    """The rows of `beside` whose difference is over 1 %: of the forecast's sum, or of what
    arithmetic says where that is less."""
    frame = beside(found)
    rows, total = frame.iloc[:-1], frame["predicted_GiB"].iloc[-1]
    said = rows["arithmetic_GiB"].where(rows["arithmetic_GiB"] > 0, total)
    return rows[rows["difference_GiB"].abs() > said.clip(upper=total) / 100]


def explained(found: Forecast) -> list[str]:
    """A sentence for each category that is `over`, with what makes the difference."""
    return [
        f"{row.category}: {row.predicted_GiB:.2f} GiB predicted, {row.arithmetic_GiB:.2f} by"
        f" arithmetic ({row.difference_GiB:+.2f}): {_why(found, row.category, row.difference_GiB)}."
        for row in over(found).itertuples()
    ]


def causes(found: Forecast, category: str) -> dict[str, int]:
    """What the category's bytes are at the forecast's peak, named by where they were made; largest
    first. They add up."""
    step, rows = found.trace.reported, found.trace.device_rows()
    rows = rows.iloc[: step.start + int(found.simulated.allocated_bytes[step].argmax()) + 1]
    gone = rows.loc[rows["event"] == "free", "storage"]
    alive = rows[
        (rows["event"] == "alloc") & (rows["category"] == category) & ~rows["storage"].isin(gone)
    ]
    sizes: Counter = Counter()
    for (module, op), size in alive.groupby(["module", "op"])["bytes"].sum().items():
        sizes[_cause(found, module, op)] += int(size)
    return dict(sizes.most_common())


def _cause(found: Forecast, module: str, op: str) -> str:
    module = re.sub(r"^base_model\.model\.?", "", module)  # peft's
    if "lm_head" in module and ("softmax" in op or "nll_loss" in op):
        module = ""  # where the head forms its own loss
    if not module:
        return "the update" if found.trace.phase == "update" else "the loss on the logits"
    if module == "model":  # what all blocks share
        return (
            "ALiBi's mask"
            if found.question.spec.config.position == "alibi"
            else "the attention mask"
        )
    where = next((name for word, name in PLACES if word in module), f"{UNNAMED} ({module})")
    return (
        f"copies in another type, {where}"
        if "_to_copy" in op and "lm_head" not in module
        else where
    )


def _why(found: Forecast, category: str, difference_gib: float) -> str:
    if category in ("activations", "temporaries"):
        return f"{WHY[category]}: {_named(found, category)}"
    if category in WHY:
        return WHY[category]
    rule = found.question.row.values["rule"]
    if (
        category == "optimizer"
        and rule in MOMENTS
        and 0 < _share(found.question) < 1
        and category in found.ledger
    ):
        return _unequal(found, _moments(found.weights, rule))
    phase = found.trace.phase
    owner = next(
        (
            f"; the largest is {module}, {size / GIB:.2f} GiB"
            for kind, module, size in found.trace.owners(100)
            if kind == category
        ),
        "",
    )
    if difference_gib < 0:
        return (
            f"the peak is in {phase}, when"
            f" {'none' if not found.ledger.get(category) else 'not all'} of it is there{owner}"
        )
    return f"more is there at the peak in {phase} than the arithmetic has{owner}"


def _unequal(found: Forecast, each: float) -> str:
    moments = sum(
        size
        for (module, kind, _), size in found.trace.alive.items()
        if kind == "optimizer" and "exp_avg" in module
    )
    equal = parameters(found.question.spec) * _share(found.question)
    return (
        f"the active part has {moments / each:,.0f} weights, an equal share of the model"
        f" {equal:,.0f}; a part that is whole blocks has nothing of the embedding and the head"
    )


def _named(found: Forecast, category: str) -> str:
    """The causes above a twentieth of the category, in GiB; NormHead's also in copies of the head's
    stored weight."""
    named = causes(found, category)
    least = sum(named.values()) / 20
    head = sum(
        size
        for (module, kind, _), size in found.trace.alive.items()
        if kind == "weights" and "lm_head" in module
    )
    words = [
        f"{name} {size / GIB:.2f}"
        + (f" (the stored weight {size / head:.1f} times)" if name == PLACES[0][1] and head else "")
        for name, size in named.items()
        if size >= least
    ]
    rest = sum(size for size in named.values() if size < least)
    return "; ".join([*words, *([f"smaller ones {rest / GIB:.2f}"] if rest >= GIB / 200 else [])])


def arithmetic_words(question: Question) -> str:
    """The arithmetic as one line."""
    count, said = parameters(question.spec), closed_form(question)
    each = " + ".join(f"{size / count:.4g}" for size in said.values())
    return (
        f"{question.model} has {count:,} parameters. {question.name}: {each} bytes a parameter for"
        f" weights, gradients and optimizer, {sum(said.values()) / GIB:.2f} GiB before any"
        " activation."
    )
