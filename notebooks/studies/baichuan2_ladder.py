"""The paper's scaling ladder: what its shapes count and hold, and what a model that has learned
nothing reaches."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import torch

from vramlab.baichuan import BaichuanForCausalLM
from vramlab.factcc.prompt import IGNORED
from vramlab.regimes.parameters import model_spec
from vramlab.runs.parameters import resolve
from vramlab.runs.preparation import prepare


def shape(model: str) -> pd.DataFrame:
    """Of a model without any bytes: `parameters`, `head_parameters` (the embedding has as many),
    `counted`, all but head and embedding, which is what the paper's table 10 counts; and its
    sizes."""
    spec = model_spec(model)
    with torch.device("meta"):
        made = BaichuanForCausalLM(spec.config)
    config = spec.config
    total, head = sum(weight.numel() for weight in made.parameters()), made.lm_head.weight.numel()
    return pd.DataFrame(
        [
            {
                "parameters": total,
                "head_parameters": head,
                "counted": total - 2 * head,
                "hidden_size": config.hidden_size,
                "layers": config.num_hidden_layers,
                "heads": config.num_attention_heads,
            }
        ]
    )


def frequencies(model: str, seed: int, steps: int, **params) -> pd.DataFrame:
    """The cross-entropy (nats a token) of the frequencies of tokens themselves, over the batches of
    a pre-training run of these parameters: what knowing nothing of a token's past comes to, at
    best. One row: `cross_entropy`, `tokens`.
    """
    asked = {
        "model": model,
        "recipe": "none",
        "objective": "lm",
        "seed": seed,
        "steps": steps,
        **params,
    }
    batches, counts = prepare(resolve(asked), progress=False).batches(), Counter()
    for _ in range(steps):
        for batch in next(batches):
            labels = batch["labels"][:, 1:]  # the first of a row is never predicted
            counts.update(labels[labels != IGNORED].tolist())
    often = torch.tensor(list(counts.values()), dtype=torch.float64)
    shares = often / often.sum()
    return pd.DataFrame(
        [{"cross_entropy": float(-(shares * shares.log()).sum()), "tokens": int(often.sum())}]
    )
