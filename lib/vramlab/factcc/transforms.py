"""FactCC's text transformations, on records whose slots are known, so that no tagger can be wrong.

Kryscinski 2020, arXiv:1910.12840, section 3.1: entity, number, date and pronoun swap, negation,
paraphrase, noise. There a tagger finds the spans; here the record holds them. Each swap keeps the
slot's distribution: the claim alone carries no information about its label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .grammar import PRONOUNS

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
    """The facts of one subject: one event and one attitude. Fields are slots, see `grammar`."""

    S: str
    N: str
    O: str  # noqa: E741 - the slot's name
    P: str
    D: str
    R: str
    X: str

    def sentence(self, template: str) -> str:
        """`template` filled with the record's values, its first letter a capital."""
        text = template.format(**vars(self))
        return text[0].upper() + text[1:]


def swap(
    record: Record,
    slot: str,
    slots: str,
    others: Sequence[Record],
    values: Sequence[str],
    extrinsic: bool,
    rng: random.Random,
) -> Record:
    """`record` with a wrong value in `slot`, one of `values`, for a sentence that states `slots`.

    An intrinsic value is that of another record of the same document (`others`), an extrinsic one
    stands nowhere in the document. The value is also extrinsic where every other
    record agrees in all remaining slots: with an intrinsic one the sentence would be true of that
    record. Negation and pronouns have few values and take any other one.
    """
    true = getattr(record, slot)
    candidates = [value for value in values if value != true]
    if slot not in "XR":
        intrinsic = [
            getattr(other, slot)
            for other in others
            if any(getattr(other, name) != getattr(record, name) for name in slots if name != slot)
        ]
        present = {getattr(other, slot) for other in others}
        absent = [value for value in candidates if value not in present]
        candidates = intrinsic if intrinsic and not extrinsic else absent
    return replace(record, **{slot: rng.choice(candidates)})


def add_noise(sentence: str, keep: str, rng: random.Random) -> str:
    """Drop or double one word of `sentence`: FactCC's noise, which does not change the label.

    The word is in small letters and is neither `keep` (the slot under test), a pronoun nor "not".
    Consistent and inconsistent claims are equally likely to be changed.
    """
    words = sentence.split(" ")
    removable = [
        i
        for i, word in enumerate(words)
        if word.isalpha() and word.islower() and word not in (keep, "not", *PRONOUNS)
    ]
    if removable:
        index = rng.choice(removable)
        words[index : index + 1] = [] if rng.random() < 0.8 else [words[index]] * 2
    return " ".join(words)
