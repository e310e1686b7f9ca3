"""From an item to token ids, and from items to training batches.

One sequence is a document and the claims made about it, each with its answer:

    [195] " " document ("\\nClaim:" " " claim [196] answer)*

[195] and [196] are Baichuan-2's user and assistant marks. The document and each claim are encoded
separately, so that their spans are exact. A scored sequence has one claim. When it is too long, the
end of the document is cut off, never the claim.

A question (`Item.asks`) stands in the same place, in the form in which BoolQ is prompted:

    [195] " " passage ("\\nQuestion:" " " question "?\\nAnswer:" [196] answer)*
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..baichuan import BaichuanTokenizer
from .items import Item

CLAIM = "\nClaim:"
QUESTION, ANSWER = "\nQuestion:", "?\nAnswer:"
OBJECTIVES = ("answer", "answer+claim", "lm")
"""The tokens that are learned. `answer`: the answers only; `answer+claim`: also the words of
consistent claims, but not of corrupted ones: a model that learns to write those learns to hedge its
copying; `lm`, for pre-training: every token after the first."""
IGNORED = -100
CLAIMS_PER_SEQUENCE = 4
HALF = 2
"""The last batch of an epoch may be smaller than a full one by this factor."""


@dataclass(frozen=True)
class Span:
    """A claim inside a sequence: its tokens are `start:stop`; `answer` is the position of [196],
    which predicts the answer."""

    start: int
    stop: int
    answer: int
    label: int


@dataclass(frozen=True)
class Encoded:
    """A document and claims as ids."""

    input_ids: list[int]
    spans: tuple[Span, ...]
    truncated: bool


def answer_ids(tokenizer: BaichuanTokenizer) -> tuple[int, int]:
    """(id of "no", id of "yes"): the first piece of each.

    Raises: ValueError, when both begin with the same piece and so cannot be distinguished.
    """
    no, yes = tokenizer.encode_text("no")[0], tokenizer.encode_text("yes")[0]
    if no == yes:
        raise ValueError(
            f"the tokenizer writes 'yes' and 'no' with the same first piece {no}: train it on text"
            " with both"
        )
    return no, yes


def encode_item(tokenizer: BaichuanTokenizer, item: Item, max_length: int) -> Encoded:
    """One item as it is scored: no answer after [196]."""
    encoded = encode_document(tokenizer, [item], max_length)
    return replace(encoded, input_ids=encoded.input_ids[:-1])


def encode_document(
    tokenizer: BaichuanTokenizer, items: Sequence[Item], max_length: int
) -> Encoded:
    """Items of one document as one sequence of at most `max_length` tokens.

    Raises: ValueError, when the claims alone do not fit.
    """
    answers = answer_ids(tokenizer)
    parts = [[tokenizer.encode_text(text) for text in _claim_parts(item)] for item in items]
    room = max_length - 1 - sum(2 + sum(map(len, part)) for part in parts)
    if room < 1:
        kind = "questions" if items[0].asks else "claims"
        raise ValueError(
            f"item {items[0].uid}: its {len(items)} {kind} leave no room for the document in"
            f" max_length {max_length}: raise max_length to {max_length - room + 64} or more"
        )
    document = tokenizer.encode_text(" " + items[0].doc)
    ids, spans = [tokenizer.user_id, *document[:room]], []
    for item, (lead, claim, end) in zip(items, parts, strict=True):
        start, stop = len(ids) + len(lead), len(ids) + len(lead) + len(claim)
        spans.append(Span(start, stop, stop + len(end), item.label))
        ids += [*lead, *claim, *end, tokenizer.assistant_id, answers[item.label]]
    return Encoded(ids, tuple(spans), len(document) > room)


def _claim_parts(item: Item) -> tuple[str, str, str]:
    """The text before the claim, the claim, the text after it."""
    return (QUESTION, " " + item.claim, ANSWER) if item.asks else (CLAIM, " " + item.claim, "")


def encode_prompt(
    tokenizer: BaichuanTokenizer, item: Item, max_length: int, new_tokens: int
) -> tuple[list[int], bool]:
    """(ids that a claim about the item's document is to follow, whether the document was cut),
    short enough for `new_tokens` more within `max_length`.

    Raises: ValueError, when that leaves no room for the document.
    """
    lead, document = tokenizer.encode_text(CLAIM), tokenizer.encode_text(" " + item.doc)
    room = max_length - 1 - len(lead) - new_tokens
    if room < 1:
        raise ValueError(
            f"max_length is {max_length}: the claim to be written takes {new_tokens} tokens and its"
            f" lead {len(lead)}, raise max_length to {new_tokens + len(lead) + 64} or more, or set"
            " generate: 0"
        )
    return [tokenizer.user_id, *document[:room], *lead], len(document) > room


def batch_encoded(encoded: Sequence[Encoded], objective: str = "answer+claim") -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each (batch, longest); labels are -100
    at tokens that are not learned."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: use one of {', '.join(OBJECTIVES)}")
    ids = [torch.tensor(sequence.input_ids) for sequence in encoded]
    labels = [torch.full_like(row, IGNORED) for row in ids]
    for row, row_labels, sequence in zip(ids, labels, encoded, strict=True):
        for learned in _learned(sequence, objective):
            row_labels[learned] = row[learned]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _learned(encoded: Encoded, objective: str) -> list[slice]:
    """The tokens that are learned; a scored sequence has no token for its answer."""
    if objective == "lm":
        return [slice(None)]
    claims = [slice(span.start, span.stop) for span in encoded.spans if span.label]
    answers = [slice(span.answer + 1, span.answer + 2) for span in encoded.spans]
    return answers + (claims if objective == "answer+claim" else [])


def training_batches(
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    seed: int,
    objective: str = "answer+claim",
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of `batch_size` sequences, claims of one document together, reshuffled every
    epoch by `seed`. The last batch of an epoch may be half as large. Raises: ValueError, when there
    are fewer sequences."""
    for groups in batched_sequences(items, batch_size, seed, HALF):
        yield batch_encoded(
            [encode_document(tokenizer, group, max_length) for group in groups], objective
        )


def batched_sequences(
    items: Sequence[Item], batch_size: int, seed: int, share: int = 1
) -> Iterator[list[list[Item]]]:
    """Endless batches of `sequences`, reshuffled every epoch by `seed`; the last of an epoch is
    left out unless it has a `share`-th of `batch_size`. Raises: ValueError, when none has."""
    check_items(items, batch_size, share)
    rng = random.Random(seed)
    while True:
        groups = sequences(items, rng)
        for start in range(0, len(groups), batch_size):
            batch = groups[start : start + batch_size]
            if len(batch) * share >= batch_size:
                yield batch


def check_items(items: Sequence[Item], batch_size: int, share: int = 1) -> None:
    """Raises: ValueError, when the items never make a `share`-th of a batch."""
    if (count := len(sequences(items, random.Random(0)))) * share < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, and the {len(items)} items to train on make {count}"
            f" sequences: use a batch_size of {count * share} at most, or more train_items"
        )


def check_room(
    tokenizer: BaichuanTokenizer, groups: Sequence[Sequence[Item]], max_length: int
) -> None:
    """Raises: ValueError, when the claims or questions about a document (one group of items each)
    leave it no room in `max_length`."""
    for group in groups:
        encode_document(tokenizer, [replace(item, doc="") for item in group], max_length)


def sequences(items: Sequence[Item], rng: random.Random) -> list[list[Item]]:
    """The items of each document together, at most CLAIMS_PER_SEQUENCE, in an order drawn from
    `rng`."""
    groups: dict[str, list[Item]] = {}
    for item in rng.sample(list(items), len(items)):
        groups.setdefault(item.group, []).append(item)
    parts = [
        group[i : i + CLAIMS_PER_SEQUENCE]
        for group in groups.values()
        for i in range(0, len(group), CLAIMS_PER_SEQUENCE)
    ]
    rng.shuffle(parts)
    return parts
