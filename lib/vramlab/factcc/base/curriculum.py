"""The material of the base's training, in the order in which it can be learned.

Checking a claim against a document is looking things up. `copies`: repeated random words, where the
previous word is enough to find the next one. `echoes`: words recur within a row, so that only
several words find the next one, as in a document whose sentences are alike. `invented_items`: each
document has a language of its own, so that looking up does not depend on known phrases.
`checked_batches`: claims with the answer, and for each of their words whether the claim still
agrees with the document.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...baichuan import BaichuanTokenizer
from ..generator import GeneratorConfig, document_items
from ..grammar import DATES, NUMBERS, PRONOUNS, Grammar
from ..items import Item
from ..prompt import IGNORED, Encoded, batch_encoded, batched_sequences, encode_document
from ..transforms import ATTITUDE_SLOTS, EVENT_SLOTS

SHARED = {
    *DATES,
    *NUMBERS,
    *(number.capitalize() for number in NUMBERS),
    *PRONOUNS,
    *(pronoun.capitalize() for pronoun in PRONOUNS),
    "not",
    ".",
}
"""Words of all domains; an invented language has others."""


def copies(words: Tensor, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rows of distinct random words that repeat with a period of 3 to 16, another for each row.

    Neither statistics nor a fixed distance help: only finding the previous occurrence does. The
    first period is not learned.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(40)[None]
    while True:
        period = torch.randint(3, 17, (batch, 1), generator=generator)
        ids = _choices(words, batch, 16, generator).gather(1, position % period)
        yield {"input_ids": ids, "labels": ids.where(position > period, IGNORED)}


def echoes(words: Tensor, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rows that repeat with a period of 8 to 30, drawn from a quarter to three quarters as many
    different words."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(64)[None]
    while True:
        period = torch.randint(8, 31, (batch, 1), generator=generator)
        share = 0.25 + 0.5 * torch.rand(batch, 1, generator=generator)
        kinds = (period * share).long().clamp(min=3)
        order = (torch.rand(batch, 30, generator=generator) * kinds).long()
        ids = _choices(words, batch, 30, generator).gather(1, order.gather(1, position % period))
        yield {"input_ids": ids, "labels": ids.where(position > period + 2, IGNORED)}


def _choices(words: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct words for each row, (batch, count)."""
    return words[torch.rand(batch, len(words), generator=generator).topk(count).indices]


def invented_items(words: Sequence[str], documents: int, seed: int) -> list[Item]:
    """Four claims on each of `documents` documents, every document in a grammar of its own. No
    claim is a paraphrase: an invented language has no known other words for the same."""
    rng, config = random.Random(seed), GeneratorConfig(paraphrase=0.0, noise=0.0, claims=4)
    items = []
    for index in range(documents):
        grammar = _invented_grammar(words, rng)
        fields = {"domain": "general", "split": "train", "shift": "none"}
        items += document_items(
            grammar, {**fields, "group": f"invented-{seed}-{index}"}, config, rng
        )
    return items


def _invented_grammar(words: Sequence[str], rng: random.Random) -> Grammar:
    vocabulary = rng.sample([word for word in words if word not in SHARED], 60)
    capital = [word for word in vocabulary if word[0].isupper()]
    rest = [word for word in vocabulary[:-4] if word not in capital[:10]]

    def template(slots: str) -> str:
        parts = [f"{{{slot}}}" for slot in slots] + rng.sample(rest, rng.randint(1, 4))
        rng.shuffle(parts)
        return " ".join([rng.choice(capital[10:] or capital), *parts, "."]).replace("{X} ", "{X}")

    return Grammar(
        names=tuple(capital[:6]),
        places=tuple(capital[6:10]),
        objects=tuple(vocabulary[-4:]),
        event=tuple(template(EVENT_SLOTS + "O") for _ in range(2)),
        attitude=tuple(template(ATTITUDE_SLOTS) for _ in range(2)),
    )


def checked_batches(
    tokenizer: BaichuanTokenizer, items: Sequence[Item], batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """`training_batches`, with `agrees` (batch, tokens): 1 at a claim's token while the claim still
    agrees with the document, 0 from its first wrong word on, nan outside claims and where the first
    wrong word is unknown. Raises: ValueError, when no batch is full.
    """
    for groups in batched_sequences(items, batch_size, seed):
        encoded = [encode_document(tokenizer, group, 512) for group in groups]
        batch = batch_encoded(encoded)
        agrees = torch.full(batch["input_ids"].shape, torch.nan)
        for row, sequence, group in zip(agrees, encoded, groups, strict=True):
            _mark(row, tokenizer, sequence, group)
        yield {**batch, "agrees": agrees}


def _mark(
    row: Tensor, tokenizer: BaichuanTokenizer, encoded: Encoded, group: Sequence[Item]
) -> None:
    """Write into `row` (tokens,) whether each token of a claim still agrees with the document."""
    for span, item in zip(encoded.spans, group, strict=True):
        if item.label:
            row[span.start : span.stop] = 1.0
        elif item.wrong_until is not None:
            end = -1  # the claim's leading space is no character of the claim
            for position in range(span.start, span.stop):
                end += len(tokenizer.sp.id_to_piece(encoded.input_ids[position]))
                row[position] = float(end < item.wrong_until)
