"""FactCC's text transformations, on records whose slots are known, so that no tagger can be wrong.

Kryscinski 2020, arXiv:1910.12840, section 3.1: entity, number, date and pronoun swap, negation,
paraphrase, noise. There a tagger finds the spans; here the record says where they are. Each swap
keeps the slot's distribution: the claim alone carries no information about its label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .grammar import DATES, NUMBERS, PRONOUNS

SWAPS = {
    "S": "entity_swap",
    "P": "entity_swap",
    "N": "number_swap",
    "D": "date_swap",
    "R": "pronoun_swap",
    "X": "negation",
}
"""Slot -> the transformation that corrupts it."""

EVENT_SLOTS, ATTITUDE_SLOTS = "SPND", "SRX"


@dataclass(frozen=True)
class Record:
    """What is true: one event and one attitude of one subject."""

    S: str
    N: str
    O: str  # noqa: E741 - the slot's name
    P: str
    D: str
    R: str
    X: str

    def say(self, template: str) -> str:
        """The record in the words of `template`."""
        text = template.format(**vars(self))
        return text[0].upper() + text[1:]


def swap(
    record: Record,
    slot: str,
    slots: str,
    others: Sequence[Record],
    pools: dict[str, Sequence[str]],
    extrinsic: bool,
    rng: random.Random,
) -> Record:
    """`record` with a wrong value in `slot` of a sentence of `slots`: of another record of its
    document (intrinsic), or from the pool and nowhere in the document (extrinsic), also where the
    other record says the very same of its subject: the sentence would be true of that one. Negation
    and pronouns, which have few values, take any other one."""
    true = getattr(record, slot)
    if slot in "XR":
        return replace(
            record, **{slot: rng.choice([value for value in pools[slot] if value != true])}
        )
    inside = [getattr(other, slot) for other in others]
    outside = [value for value in pools[slot] if value != true and value not in inside]
    wrong = [
        getattr(other, slot)
        for other in others
        if any(getattr(other, name) != getattr(record, name) for name in slots if name != slot)
    ]
    return replace(record, **{slot: rng.choice(wrong if wrong and not extrinsic else outside)})


def pools(names: Sequence[str], places: Sequence[str]) -> dict[str, Sequence[str]]:
    """Every slot's values, each drawn uniformly."""
    return {"S": names, "P": places, "N": NUMBERS, "D": DATES, "R": PRONOUNS, "X": ("", "not ")}


def noise(sentence: str, keep: str, rng: random.Random) -> str:
    """One word outside `keep` (the slot under test), a name's slot or not, dropped or said twice:
    FactCC's noise, which does not change the label. Each is as likely for consistent and
    inconsistent claims."""
    words = sentence.split(" ")
    loose = [
        i
        for i, word in enumerate(words)
        if word.isalpha() and word.islower() and word not in (keep, "not", *PRONOUNS)
    ]
    if not loose:
        return sentence
    index = rng.choice(loose)
    words[index : index + 1] = [] if rng.random() < 0.8 else [words[index]] * 2
    return " ".join(words)
