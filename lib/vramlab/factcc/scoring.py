"""Scores of a model on items: both ways a causal language model can judge a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import nn

from ..baichuan import BaichuanTokenizer
from .items import Item
from .prompt import Encoded, answer_ids, batch_encoded, encode_item


@torch.no_grad()
def score_items(
    model: nn.Module,
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """One row an item: its columns, and two scores, both higher for consistent.

    `yesno`: logit of "yes" minus logit of "no" where the answer begins. `likelihood`: the smallest
    log-probability of a claim token given the document and the claim so far: one surprising token
    is what a wrong claim looks like.
    """
    if model.training:
        raise ValueError("the model is in training mode: call .eval() before scoring")
    no, yes = answer_ids(tokenizer)
    device = device_of(model)
    encoded = [encode_item(tokenizer, item, max_length) for item in items]
    # longest first: rows of a batch are of like length, and running out of memory shows at once
    order = sorted(range(len(items)), key=lambda i: -len(encoded[i].input_ids))
    scores: dict[int, tuple[float, float]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = _score([encoded[i] for i in chosen], model, device, no, yes)
        scores.update(zip(chosen, found, strict=True))
        if progress:
            progress(len(chosen))
    return pd.DataFrame(
        [
            {
                "uid": item.uid,
                "domain": item.domain,
                "split": item.split,
                "shift": item.shift,
                "group": item.group,
                "transform": item.transform,
                "label": item.label,
                "truncated": encoded[i].truncated,
                "yesno": scores[i][0],
                "likelihood": scores[i][1],
                "n_tokens": len(encoded[i].input_ids),
            }
            for i, item in enumerate(items)
        ]
    )


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs are wanted: a table on the host tells; else weights and inputs are in one
    place."""
    return getattr(model.get_input_embeddings(), "runs_on", None) or next(model.parameters()).device


def _score(
    encoded: Sequence[Encoded], model: nn.Module, device, no: int, yes: int
) -> list[tuple[float, float]]:
    batch = {
        name: tensor.to(device)
        for name, tensor in batch_encoded(encoded).items()
        if name != "labels"
    }
    # only what is scored goes through the head: from the first claim token of any row on
    first = min(one.spans[0].start for one in encoded) - 1
    keep = batch["input_ids"].shape[1] - first
    logits = model(**batch, use_cache=False, logits_to_keep=keep).logits.float()
    found = []
    for row, one in enumerate(encoded):
        span = one.spans[0]
        words = logits[row, span.start - 1 - first : span.stop - 1 - first].log_softmax(-1)
        target = batch["input_ids"][row, span.start : span.stop]
        answer = logits[row, span.answer - first]
        found.append(
            (float(answer[yes] - answer[no]), float(words.gather(1, target[:, None]).min()))
        )
    return found
