"""From an item to token ids, and from items to training batches.

One sequence is a document and the claims made about it, each with its answer:

    [195] " " document ("\\nClaim:" " " claim [196] answer)*

[195] and [196] are Baichuan-2's user and assistant marks; the document and each claim are encoded
by themselves, so that their spans are exact. A scored sequence has one claim. When it is too long,
the document loses its end, never the claim.

A question (`Item.asks`) stands in the same place, in the form that BoolQ is prompted in, the rest
between the marks too:

    [195] " " passage ("\nQuestion:" " " question "?\nAnswer:" [196] answer)*
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..baichuan import BaichuanTokenizer
from .items import Item

CLAIM = "\nClaim:"
QUESTION, ANSWER = "\nQuestion:", "?\nAnswer:"
OBJECTIVES = ("answer", "answer+claim", "lm")
"""What is learned: the answers only, or the answers and the words of consistent claims. Never the
words of a corrupted claim: a model that learns to write those learns to hedge its copying. `lm` is
pre-training: every token that follows another."""
IGNORED = -100
CLAIMS_PER_SEQUENCE = 4
HALF = 2
"""Of a batch that is enough at the end of an epoch: one of so many."""


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
    document: tuple[int, int]
    truncated: bool


def answer_ids(tokenizer: BaichuanTokenizer) -> tuple[int, int]:
    """(id of "no", id of "yes"): the first piece of each.

    Raises: ValueError, when they begin with the same piece and so cannot be told apart.
    """
    no, yes = tokenizer.encode_text("no")[0], tokenizer.encode_text("yes")[0]
    if no == yes:
        raise ValueError(
            f"the tokenizer writes 'yes' and 'no' with the same first piece {no}: train it on text"
            " with both"
        )
    return no, yes


def encode_item(tokenizer: BaichuanTokenizer, item: Item, max_length: int) -> Encoded:
    """One item as it is scored: no answer behind [196]."""
    encoded = encode_document(tokenizer, [item], max_length)
    return Encoded(encoded.input_ids[:-1], encoded.spans, encoded.document, encoded.truncated)


def encode_document(
    tokenizer: BaichuanTokenizer, items: Sequence[Item], max_length: int
) -> Encoded:
    """Items of one document as one sequence of at most `max_length` tokens.

    Raises: ValueError, when the claims alone do not fit.
    """
    answers = answer_ids(tokenizer)
    tails = [
        (*(tokenizer.encode_text(text) for text in _around(item)), item.label) for item in items
    ]
    room = (
        max_length - 1 - sum(len(lead) + len(claim) + len(end) + 2 for lead, claim, end, _ in tails)
    )
    if room < 1:
        kind = "questions" if items[0].asks else "claims"
        raise ValueError(
            f"item {items[0].uid}: its {len(items)} {kind} leave no room for the document in"
            f" max_length {max_length}: raise max_length to {max_length - room + 64} or more"
        )
    document = tokenizer.encode_text(" " + items[0].doc)
    ids, spans = [tokenizer.user_id, *document[:room]], []
    document_end = len(ids)
    for lead, claim, end, label in tails:
        start = len(ids) + len(lead)
        ids += [*lead, *claim, *end, tokenizer.assistant_id, answers[label]]
        spans.append(Span(start, start + len(claim), start + len(claim) + len(end), label))
    return Encoded(ids, tuple(spans), (1, document_end), len(document) > room)


def _around(item: Item) -> tuple[str, str, str]:
    """What leads to the claim, the claim, what follows it."""
    return (QUESTION, " " + item.claim, ANSWER) if item.asks else (CLAIM, " " + item.claim, "")


def encode_prompt(
    tokenizer: BaichuanTokenizer, item: Item, max_length: int, new_tokens: int
) -> tuple[list[int], bool]:
    """(ids after which a claim about the item's document is written, whether the document lost its
    end), such that `new_tokens` more make `max_length` at most.

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
    where nothing is learned."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: use one of {', '.join(OBJECTIVES)}")
    longest = max(len(one.input_ids) for one in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, one in enumerate(encoded):
        tokens = torch.tensor(one.input_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        if objective == "lm":
            labels[row, : len(tokens)] = tokens
            continue
        for span in one.spans:
            if span.answer + 1 < len(tokens):
                labels[row, span.answer + 1] = tokens[span.answer + 1]
            if span.label and objective == "answer+claim":
                labels[row, span.start : span.stop] = tokens[span.start : span.stop]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_batches(
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    seed: int,
    objective: str = "answer+claim",
) -> Iterator[dict[str, Tensor]]:
    """Batches for ever: `batch_size` sequences each, claims of one document together, reshuffled
    every epoch by `seed`. The last of an epoch may have half as many. Raises: ValueError, when
    there are fewer."""
    check_items(items, batch_size, HALF)
    rng = random.Random(seed)
    while True:
        waiting: list[Encoded] = []
        for group in sequences(items, rng):
            waiting.append(encode_document(tokenizer, group, max_length))
            if len(waiting) == batch_size:
                yield batch_encoded(waiting, objective)
                waiting = []
        if waiting and len(waiting) * HALF >= batch_size:
            yield batch_encoded(waiting, objective)


def check_items(items: Sequence[Item], batch_size: int, share: int = 1) -> None:
    """Raises: ValueError, when the items never make a batch, or a `share`-th of one where that is
    enough."""
    if (count := len(sequences(items, random.Random(0)))) * share < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, and the {len(items)} items to train on make {count}"
            f" sequences: use a batch_size of {count * share} at most, or more train_items"
        )


def check_room(
    tokenizer: BaichuanTokenizer, groups: Sequence[Sequence[Item]], max_length: int
) -> None:
    """Raises: ValueError, when what is asked about a document, which is each group of items, leaves
    it no room in `max_length`."""
    for group in groups:
        encode_document(tokenizer, [replace(item, doc="") for item in group], max_length)


def sequences(items: Sequence[Item], rng: random.Random) -> list[list[Item]]:
    """The items of each document together, CLAIMS_PER_SEQUENCE at most, in an order drawn from
    `rng`."""
    groups: dict[str, list[Item]] = {}
    for item in rng.sample(list(items), len(items)):
        groups.setdefault(item.group, []).append(item)
    cut = [
        group[i : i + CLAIMS_PER_SEQUENCE]
        for group in groups.values()
        for i in range(0, len(group), CLAIMS_PER_SEQUENCE)
    ]
    rng.shuffle(cut)
    return cut
