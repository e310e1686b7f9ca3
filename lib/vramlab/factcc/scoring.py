"""Scores of a model on items: the two ways in which a causal language model can judge a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import nn

from ..baichuan import BaichuanTokenizer
from .items import Item
from .prompt import Encoded, answer_ids, batch_encoded, encode_item

ITEM_COLUMNS = ("uid", "domain", "split", "shift", "group", "transform", "label")


@torch.no_grad()
def score_items(
    model: nn.Module,
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """One row per item: its columns, and two scores, both higher for consistent.

    `yesno`: logit of "yes" minus logit of "no" where the answer begins. `likelihood`: the smallest
    log-probability of a claim token given the document and the claim so far, since one surprising
    token is what a wrong claim looks like.
    """
    if model.training:
        raise ValueError("the model is in training mode: call .eval() before scoring")
    encoded = [encode_item(tokenizer, item, max_length) for item in items]
    lengths = [len(sequence.input_ids) for sequence in encoded]
    compute = partial(_score, model, answer_ids(tokenizer))
    scores = in_batches(encoded, lengths, batch_size, compute, progress)
    return pd.DataFrame(
        [
            {
                **{name: getattr(item, name) for name in ITEM_COLUMNS},
                "truncated": sequence.truncated,
                "yesno": yesno,
                "likelihood": likelihood,
                "n_tokens": length,
            }
            for item, sequence, length, (yesno, likelihood) in zip(
                items, encoded, lengths, scores, strict=True
            )
        ]
    )


def in_batches(
    sequences: Sequence,
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list], list],
    progress: Callable[[int], object] | None,
) -> list:
    """Results of `compute` on batches of `sequences`, one per sequence, in their order.

    The longest come first: those of a batch have similar lengths, and running out of memory shows
    at once.
    """
    order, results = sorted(range(len(lengths)), key=lambda i: -lengths[i]), dict[int, object]()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        results.update(zip(chosen, compute([sequences[i] for i in chosen]), strict=True))
        if progress:
            progress(len(chosen))
    return [results[i] for i in range(len(lengths))]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's inputs: that of its weights, unless the embedding is kept on the
    host, which then names it (`runs_on`)."""
    return getattr(model.get_input_embeddings(), "runs_on", None) or next(model.parameters()).device


def _score(
    model: nn.Module, answers: tuple[int, int], encoded: Sequence[Encoded]
) -> list[tuple[float, float]]:
    """(yesno, likelihood) of each sequence; `answers` are the ids of no and yes."""
    (no, yes), device = answers, device_of(model)
    batch = {
        name: tensor.to(device)
        for name, tensor in batch_encoded(encoded).items()
        if name != "labels"
    }
    # only scored positions go through the head: from the first claim token of any row on
    first = min(sequence.spans[0].start for sequence in encoded) - 1
    keep = batch["input_ids"].shape[1] - first
    logits = model(**batch, use_cache=False, logits_to_keep=keep).logits.float()
    scores = []
    for row, sequence in enumerate(encoded):
        span = sequence.spans[0]
        words = logits[row, span.start - 1 - first : span.stop - 1 - first].log_softmax(-1)
        target = batch["input_ids"][row, span.start : span.stop]
        answer = logits[row, span.answer - first]
        likelihood = float(words.gather(1, target[:, None]).min())
        scores.append((float(answer[yes] - answer[no]), likelihood))
    return scores
