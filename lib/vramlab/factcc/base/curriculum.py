"""What the base is taught, in the order in which it can be learned.

Checking a claim against a document is looking things up. `copies`: random words said again, where
one word back says what comes next. `echoes`: the words of a row recur, so only a longer look back
says it, as in a document whose sentences are alike. `invented_items`: documents in a language made
up for each, so that looking up does not hang on known phrases. `checked_batches`: claims with the
answer, and at each of their words whether they still agree with the document.
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
from ..prompt import IGNORED, Encoded, batch_encoded, check_items, encode_document, sequences
from ..transforms import ATTITUDE_SLOTS, EVENT_SLOTS

SHARED = {
    *DATES,
    *NUMBERS,
    *(n.capitalize() for n in NUMBERS),
    *PRONOUNS,
    *(p.capitalize() for p in PRONOUNS),
    "not",
    ".",
}


def copies(words: Tensor, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rows of distinct random words said again and again, with a period of 3 to 16 that differs by
    row, so that neither statistics nor a fixed distance help: only finding the last time helps.
    Learned from the second time on.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(40)[None]
    while True:
        period = torch.randint(3, 17, (batch, 1), generator=generator)
        ids = _choices(words, batch, 16, generator).gather(1, position % period)
        yield {"input_ids": ids, "labels": ids.where(position > period, IGNORED)}


def echoes(words: Tensor, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rows with a period of 8 to 30 in which a quarter to three quarters as many words recur at
    random."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(64)[None]
    while True:
        period = torch.randint(8, 31, (batch, 1), generator=generator)
        kinds = (
            (period * (0.25 + 0.5 * torch.rand(batch, 1, generator=generator))).long().clamp(min=3)
        )
        drawn = (torch.rand(batch, 30, generator=generator) * kinds).long()
        ids = _choices(words, batch, 30, generator).gather(1, drawn.gather(1, position % period))
        yield {"input_ids": ids, "labels": ids.where(position > period + 2, IGNORED)}


def _choices(words: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    return words[torch.rand(batch, len(words), generator=generator).topk(count).indices]


def invented_items(words: Sequence[str], documents: int, seed: int) -> list[Item]:
    """Four claims on each of `documents` documents, every document in a grammar of its own. No
    claim is a paraphrase: nothing says how an invented language says the same in other words."""
    rng, config, items = (
        random.Random(seed),
        GeneratorConfig(paraphrase=0.0, noise=0.0, claims=4),
        [],
    )
    for index in range(documents):
        items += document_items(
            _invented_grammar(words, rng),
            "general",
            "train",
            "none",
            f"invented-{seed}-{index}",
            config,
            rng,
        )
    return items


def _invented_grammar(words: Sequence[str], rng: random.Random) -> Grammar:
    drawn = rng.sample([word for word in words if word not in SHARED], 60)
    capital = [word for word in drawn if word[0].isupper()]
    names, places, objects = capital[:6], capital[6:10], drawn[-4:]
    rest = [word for word in drawn[:-4] if word not in capital[:10]]

    def template(slots: str) -> str:
        parts = [f"{{{slot}}}" for slot in slots] + rng.sample(rest, rng.randint(1, 4))
        rng.shuffle(parts)
        return " ".join([rng.choice(capital[10:] or capital), *parts, "."]).replace("{X} ", "{X}")

    return Grammar(
        tuple(names),
        tuple(places),
        tuple(objects),
        tuple(template(EVENT_SLOTS + "O") for _ in range(2)),
        tuple(template(ATTITUDE_SLOTS) for _ in range(2)),
    )


def checked_batches(
    tokenizer: BaichuanTokenizer, items: Sequence[Item], batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """`training_batches`, with `agrees` (batch, tokens): 1 at a claim's token while the claim still
    agrees with the document, 0 from its first wrong word on, nan where that is not known and
    outside claims. Raises: ValueError, when no batch is full.
    """
    check_items(items, batch_size)
    rng = random.Random(seed)
    while True:
        groups = sequences(items, rng)
        for start in range(0, len(groups) - batch_size + 1, batch_size):
            chosen = groups[start : start + batch_size]
            encoded = [encode_document(tokenizer, group, 512) for group in chosen]
            batch = batch_encoded(encoded)
            agrees = torch.full(batch["input_ids"].shape, torch.nan)
            for row, one, group in zip(agrees, encoded, chosen, strict=True):
                _mark(row, tokenizer, one, group)
            yield {**batch, "agrees": agrees}


def _mark(row: Tensor, tokenizer: BaichuanTokenizer, one: Encoded, group: Sequence[Item]) -> None:
    for span, item in zip(one.spans, group, strict=True):
        if item.label:
            row[span.start : span.stop] = 1.0
        elif item.wrong_until is not None:
            end = -1  # the claim's leading space is no character of the claim
            for place in range(span.start, span.stop):
                end += len(tokenizer.sp.id_to_piece(one.input_ids[place]))
                row[place] = float(end < item.wrong_until)
