"""Seeded documents and claims in four domains: what FactCC's training data is to CNN/DM, without
its copyright.

A document is a few records, each told in an event sentence and an attitude sentence. A claim is one
of its sentences, verbatim or in another template, with one slot made wrong when the label is 0. The
slot under test is drawn before the label, and all values of a slot are equally likely, so neither
the claim alone nor the document alone carries information about the label.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from .grammar import GRAMMARS, HELD_OUT_NAMES, HELD_OUT_PLACES, HELD_OUT_TEMPLATES, Grammar
from .items import SHIFTS, SPLITS, Item
from .transforms import ATTITUDE_SLOTS, EVENT_SLOTS, SWAPS, Record, add_noise, swap


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of generated claims. A model of a quarter million parameters can learn the
    defaults."""

    records: int = 2
    """Records per document, two sentences each; more is harder."""
    paraphrase: float = 0.3
    """Share of claims in another template than the document's."""
    extrinsic: float = 0.3
    """Share of wrong values that occur nowhere in the document."""
    noise: float = 0.05
    """Share of claims, of both labels, with a word dropped or doubled."""
    claims: int = 1
    """Claims per document. With 1 items are independent; training may use more."""

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Sentence(NamedTuple):
    """A sentence of a document: what it states, its template, and all templates of its kind."""

    record: Record
    slots: str
    template: str
    templates: tuple[str, ...]


def generate_items(
    domain: str,
    split: str,
    n: int,
    seed: int,
    shift: str = "none",
    config: GeneratorConfig | None = None,
) -> list[Item]:
    """`n` items of `domain`. The same arguments give the same items; another split, seed or shift
    gives other documents.

    `shift` is none, mild or moderate. Severe is another domain with shift none, which only the
    caller can know. Raises: ValueError, naming the value and the known ones.
    """
    config = config or GeneratorConfig()
    check(domain, split, shift)
    if not 2 <= config.records <= (most := most_records(domain, shift)):
        raise ValueError(
            f"records is {config.records}: a wrong value comes from another record and no two share"
            f" a name, place or day, use 2 to {most} for claims of {domain} at shift {shift};"
            " questions take any number from 2"
        )
    grammar = shifted(GRAMMARS[domain], shift)
    config = replace(config, paraphrase=1.0) if shift == "moderate" else config
    rng = random.Random(f"{domain}/{split}/{seed}/{shift}/{config.hash()}")
    items: list[Item] = []
    while len(items) < n:
        group = f"{domain}-{split}-{seed}-{shift}-{len(items) // config.claims}"
        fields = {"domain": domain, "split": split, "shift": shift, "group": group}
        items += document_items(grammar, fields, config, rng)
    return items[:n]


def most_records(domain: str, shift: str) -> int:
    """How many records of a document can differ in name, number, place and day."""
    values = shifted(GRAMMARS[domain], shift).slot_values()
    return min(len(values[slot]) for slot in "SPND")


def check(domain: str, split: str, shift: str) -> None:
    """Raises: ValueError, naming the value and the known ones."""
    for name, value, known in (
        ("domain", domain, GRAMMARS),
        ("split", split, SPLITS),
        ("shift", shift, SHIFTS[:3]),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: the generator has {', '.join(known)}")


def shifted(grammar: Grammar, shift: str) -> Grammar:
    """The part of the grammar that a shift level may use.

    Shifted levels use only held-out names and places, training only the others. At moderate the
    held-out template comes first: documents use it, claims are paraphrased in the known ones.
    """
    names, places = grammar.names[:-HELD_OUT_NAMES], grammar.places[:-HELD_OUT_PLACES]
    if shift != "none":
        names, places = grammar.names[-HELD_OUT_NAMES:], grammar.places[-HELD_OUT_PLACES:]
    event, attitude = (
        (templates[-HELD_OUT_TEMPLATES:] if shift == "moderate" else ())
        + templates[:-HELD_OUT_TEMPLATES]
        for templates in (grammar.event, grammar.attitude)
    )
    return replace(grammar, names=names, places=places, event=event, attitude=attitude)


def distinct_records(grammar: Grammar, count: int, rng: random.Random) -> list[Record]:
    """Records of which no two share a name, a number, a place or a day."""
    values = grammar.slot_values()
    distinct = {slot: rng.sample(values[slot], count) for slot in "SPND"}
    return [
        Record(
            **{slot: distinct[slot][i] for slot in "SPND"},
            O=rng.choice(values["O"]),
            R=rng.choice(values["R"]),
            X=rng.choice(values["X"]),
        )
        for i in range(count)
    ]


def independent_record(grammar: Grammar, rng: random.Random) -> Record:
    """A record whose slots are drawn independently."""
    values = grammar.slot_values()
    return Record(**{slot: rng.choice(values[slot]) for slot in "SNOPDRX"})


def tell(
    grammar: Grammar, records: Sequence[Record], shift: str, rng: random.Random
) -> tuple[list[Sentence], str]:
    """An event and an attitude sentence for each record, shuffled, and their text.

    At shift moderate they use the first template of each kind, else any.
    """
    sentences = [
        Sentence(
            record, slots, templates[0] if shift == "moderate" else rng.choice(templates), templates
        )
        for record in records
        for slots, templates in ((EVENT_SLOTS, grammar.event), (ATTITUDE_SLOTS, grammar.attitude))
    ]
    rng.shuffle(sentences)
    return sentences, " ".join(s.record.sentence(s.template) for s in sentences)


def document_items(
    grammar: Grammar, fields: Mapping[str, Any], config: GeneratorConfig, rng: random.Random
) -> list[Item]:
    """The `config.claims` items of one new document. `fields` are the domain, split, shift and
    group of each."""
    records = distinct_records(grammar, config.records, rng)
    sentences, doc = tell(grammar, records, fields["shift"], rng)
    return [
        Item(
            uid=f"{fields['group']}-{index}",
            source="generated",
            doc=doc,
            **fields,
            **_claim(grammar, records, sentences, config, rng),
        )
        for index in range(config.claims)
    ]


def _claim(
    grammar: Grammar,
    records: Sequence[Record],
    sentences: Sequence[Sentence],
    config: GeneratorConfig,
    rng: random.Random,
) -> dict:
    """A claim about one of the sentences: the fields of an item that differ between the claims of
    a document."""
    # before the label: both labels test the same slots of the same sentences
    slot = rng.choice("SPNDRX")
    record, slots, template, templates = rng.choice([s for s in sentences if slot in s.slots])
    label, transform, wrong_until = rng.randrange(2), "verbatim", None
    if rng.random() < config.paraphrase:
        template, transform = rng.choice([t for t in templates if t != template]), "paraphrase"
    claim = record.sentence(template)
    if not label:
        others = [other for other in records if other is not record]
        extrinsic = rng.random() < config.extrinsic
        record = swap(record, slot, slots, others, grammar.slot_values()[slot], extrinsic, rng)
        true, claim, transform = claim, record.sentence(template), SWAPS[slot]
        wrong_until = first_wrong(true, claim)
    if rng.random() < config.noise:
        claim, wrong_until = add_noise(claim, getattr(record, slot), rng), None
        transform += "+noise"
    return {"claim": claim, "label": label, "transform": transform, "wrong_until": wrong_until}


def first_wrong(true: str, claim: str) -> int:
    """The end, in characters, of the first word in which `claim` differs from `true`."""
    words = claim.split(" ")
    pairs = enumerate(zip(words, true.split(" "), strict=False))
    first = next(i for i, (word, wanted) in pairs if word != wanted)
    return len(" ".join(words[: first + 1]))
