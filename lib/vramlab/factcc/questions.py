"""Seeded passages and yes/no questions about them, shaped like BoolQ (Clark 2019,
arXiv:1905.10044).

A passage is built like a claim's document: records, each told in an event sentence and an attitude
sentence, shuffled. Questions are about two of the records; the others, of other subjects, only make
the passage longer. A question asks in its own words whether one sentence's statement holds, with
one slot made wrong where the answer is no. As in `generator`, the slot is drawn before the answer,
and a wrong value as a true one, so neither the question alone nor the passage alone carries
information about the answer.

As in BoolQ a question begins with a small letter and has no question mark. Unlike there, names keep
their capital: the small model's vocabulary has one piece for each name and none for it in small
letters, which would make looking up a name a task of spelling.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from .generator import (
    check,
    distinct_records,
    first_wrong,
    independent_record,
    shifted,
    tell,
)
from .grammar import GRAMMARS, QUESTIONS, Grammar
from .items import READING, Item
from .transforms import ATTITUDE_SLOTS, EVENT_SLOTS, SWAPS, Record

QUESTIONED = 2
"""Records of a passage that questions are about; an intrinsic swap needs two."""
QUESTIONS_PER_PASSAGE = 3
"""Of a training passage."""


@dataclass(frozen=True)
class QuestionConfig:
    """Settings of generated passages and questions."""

    records: int = 2
    """Records per passage, each two sentences of about ten words. With more, the model has to look
    further back."""
    extrinsic: float = 0.3
    """Share of wrong values that stand nowhere in the passage, as long as a value is left that does
    not."""
    questions: int = 1
    """Questions per passage. With 1 items are independent; training may use more."""

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
    """`n` items of `domain`, whose `claim` is the question and whose `label` is 1 where the answer
    is yes. Arguments and shifts as in `generator.generate_items`; at shift moderate the passage
    uses held-out templates, the question known ones.

    Raises: ValueError, naming the value and the known ones.
    """
    config = config or QuestionConfig()
    check(domain, split, shift)
    if config.records < QUESTIONED:
        raise ValueError(
            f"records is {config.records}: a wrong value comes from another record, use"
            f" {QUESTIONED} or more"
        )
    rng = random.Random(f"{READING}/{domain}/{split}/{seed}/{shift}/{config.hash()}")
    grammar = shifted(GRAMMARS[domain], shift)
    items: list[Item] = []
    while len(items) < n:
        group = f"{READING}-{domain}-{split}-{seed}-{shift}-{len(items) // config.questions}"
        records = _records(grammar, config.records, rng)
        _, passage = tell(grammar, records, shift, rng)
        items += [
            Item(
                uid=f"{group}-{index}",
                source=READING,
                domain=domain,
                split=split,
                doc=passage,
                shift=shift,
                group=group,
                **_question(grammar, domain, records, config.extrinsic, rng),
            )
            for index in range(config.questions)
        ]
    return items[:n]


def _records(grammar: Grammar, count: int, rng: random.Random) -> list[Record]:
    """The records of a passage; questions are about the first ones."""
    records = distinct_records(grammar, QUESTIONED, rng)
    subjects = {record.S for record in records}
    others = replace(grammar, names=tuple(n for n in grammar.names if n not in subjects))
    return records + [independent_record(others, rng) for _ in range(count - QUESTIONED)]


def _question(
    grammar: Grammar, domain: str, records: Sequence[Record], extrinsic: float, rng: random.Random
) -> dict:
    """The fields of an item that differ between the questions of a passage."""
    # before the label: both answers ask for the same slots of the same sentences
    slot = rng.choice("SPNDRX")
    kind = rng.choice([k for k, slots in enumerate((EVENT_SLOTS, ATTITUDE_SLOTS)) if slot in slots])
    index, label = rng.randrange(QUESTIONED), rng.randrange(2)
    template = rng.choice(QUESTIONS[domain][kind])
    question = template.format(**vars(records[index]))
    if label:
        return {"claim": question, "label": label, "transform": "", "wrong_until": None}
    slots = (EVENT_SLOTS + "O", ATTITUDE_SLOTS)[kind]
    values = grammar.slot_values()[slot]
    wrong = template.format(**vars(_swap(records, index, slot, slots, values, extrinsic, rng)))
    return {
        "claim": wrong,
        "label": label,
        "transform": SWAPS[slot],
        "wrong_until": first_wrong(question, wrong),
    }


def _swap(
    records: Sequence[Record],
    index: int,
    slot: str,
    slots: str,
    values: Sequence[str],
    extrinsic: float,
    rng: random.Random,
) -> Record:
    """The record at `index` with another value in `slot`, such that no record of the passage agrees
    with it in all `slots`."""

    def stated(record: Record) -> tuple[str, ...]:
        return tuple(getattr(record, name) for name in slots)

    true = {stated(record) for record in records}
    candidates = [replace(records[index], **{slot: value}) for value in values]
    wrong = [record for record in candidates if stated(record) not in true]
    if slot in "XR":
        return rng.choice(wrong)
    present = {getattr(record, slot) for record in records}
    intrinsic = getattr(records[1 - index], slot)
    near = [record for record in wrong if getattr(record, slot) == intrinsic]
    far = [record for record in wrong if getattr(record, slot) not in present]
    return rng.choice((far if rng.random() < extrinsic else near) or wrong)
