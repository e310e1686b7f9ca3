"""Seeded passages and yes/no questions about them, shaped like BoolQ (Clark 2019,
arXiv:1905.10044).

A passage is what a claim's document is: records, each said as an event and an attitude, the
sentences shuffled. Two records are asked about; the others, of other subjects, only make the
passage longer. A question asks whether what one sentence says is so, in words of its own, with one
slot made wrong where the answer is no. As in `generator`, the slot is drawn before the answer and a
wrong value as a true one is, so neither the question alone nor the passage alone says anything
about the answer.

As in BoolQ a question begins with a small letter and has no mark. Unlike there, names keep their
capital: the small model's vocabulary has one piece for each name and none for it in small letters,
which would make looking up a name a task of spelling.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from .generator import check, distinct_records, drawn_record, first_wrong, shifted
from .grammar import GRAMMARS, QUESTIONS, Grammar
from .items import READING, Item
from .transforms import ATTITUDE_SLOTS, EVENT_SLOTS, SWAPS, Record, pools

ASKED = 2
"""Records of a passage that are asked about; an intrinsic swap needs two."""
QUESTIONS_PER_PASSAGE = 3
"""Of a training passage."""


@dataclass(frozen=True)
class QuestionConfig:
    """What generated passages and questions are made of."""

    records: int = 2
    """Records a passage, each two sentences of some ten words. The more, the longer the look
    back."""
    extrinsic: float = 0.3
    """Share of wrong values that no record asked about has; nowhere in the passage, unless it is so
    long that it has all."""
    questions: int = 1
    """Questions a passage. 1 makes items independent; training may use more."""

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def generate_questions(
    domain: str,
    split: str,
    n: int,
    seed: int,
    shift: str = "none",
    config: QuestionConfig | None = None,
) -> list[Item]:
    """`n` items of `domain`, their `claim` being the question and `label` 1 where the answer is
    yes. Arguments and shifts as in `generator.generate_items`; at shift moderate the passage is
    told in held-out templates, the question in known ones.

    Raises: ValueError, naming the value and the known ones.
    """
    config = config or QuestionConfig()
    check(domain, split, shift)
    if config.records < ASKED:
        raise ValueError(
            f"records is {config.records}: a wrong value comes from another record, use {ASKED} or"
            " more"
        )
    rng = random.Random(f"{READING}/{domain}/{split}/{seed}/{shift}/{config.hash()}")
    grammar = shifted(GRAMMARS[domain], shift)
    items: list[Item] = []
    while len(items) < n:
        group = f"{READING}-{domain}-{split}-{seed}-{shift}-{len(items) // config.questions}"
        records, passage = _passage(grammar, shift == "moderate", config.records, rng)
        for index in range(config.questions):
            question, label, how, wrong_until = _question(
                grammar, domain, records, config.extrinsic, rng
            )
            items.append(
                Item(
                    f"{group}-{index}",
                    READING,
                    domain,
                    split,
                    passage,
                    question,
                    label,
                    how,
                    shift,
                    group,
                    wrong_until,
                )
            )
    return items[:n]


def _passage(
    grammar: Grammar, moved: bool, count: int, rng: random.Random
) -> tuple[list[Record], str]:
    """Records, those asked about first, and the text that says them all."""
    records = distinct_records(grammar, ASKED, rng)
    others = replace(
        grammar,
        names=tuple(name for name in grammar.names if name not in {record.S for record in records}),
    )
    records += [drawn_record(others, rng) for _ in range(count - ASKED)]
    sentences = [
        record.say(templates[0] if moved else rng.choice(templates))
        for record in records
        for templates in (grammar.event, grammar.attitude)
    ]
    rng.shuffle(sentences)
    return records, " ".join(sentences)


def _question(
    grammar: Grammar, domain: str, records: Sequence[Record], extrinsic: float, rng: random.Random
) -> tuple[str, int, str, int | None]:
    """(question, label, what was made wrong, where its first wrong word ends)"""
    slot = rng.choice(
        "SPNDRX"
    )  # before the label: both answers ask for the same slots of the same sentences
    kind = rng.choice([kind for kind in range(2) if slot in (EVENT_SLOTS, ATTITUDE_SLOTS)[kind]])
    which, label, template = (
        rng.randrange(ASKED),
        rng.randrange(2),
        rng.choice(QUESTIONS[domain][kind]),
    )
    true = template.format(**vars(records[which]))
    if label:
        return true, label, "", None
    slots = (EVENT_SLOTS + "O", ATTITUDE_SLOTS)[kind]
    wrong = _made_wrong(
        records, which, slot, slots, pools(grammar.names, grammar.places), extrinsic, rng
    )
    question = template.format(**vars(wrong))
    return question, label, SWAPS[slot], first_wrong(true, question)


def _made_wrong(
    records: Sequence[Record],
    which: int,
    slot: str,
    slots: str,
    values: dict[str, Sequence[str]],
    extrinsic: float,
    rng: random.Random,
) -> Record:
    """The record with another value in `slot`, such that no record of the passage has all of its
    `slots`."""
    true, there = (
        records[which],
        {tuple(getattr(record, name) for name in slots) for record in records},
    )
    wrong = [
        other
        for value in values[slot]
        if tuple(getattr(other := replace(true, **{slot: value}), name) for name in slots)
        not in there
    ]
    if slot in "XR":
        return rng.choice(wrong)
    near = [other for other in wrong if getattr(other, slot) == getattr(records[1 - which], slot)]
    far = [
        other
        for other in wrong
        if getattr(other, slot) not in {getattr(record, slot) for record in records}
    ]
    chosen = far if rng.random() < extrinsic else near
    return rng.choice(chosen or wrong)
