"""Seeded documents and claims in four domains: what FactCC's training data is to CNN/DM, without
its copyright.

A document is a few records, each said as an event and an attitude. A claim is one of its sentences,
word for word or in another template, with one slot made wrong when the label is 0. The slot under
test is drawn before the label, and every slot's values are drawn alike, so neither the claim alone
nor the document alone says anything about the label.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, replace

from .grammar import GRAMMARS, HELD_OUT_NAMES, HELD_OUT_PLACES, HELD_OUT_TEMPLATES, Grammar
from .items import SHIFTS, SPLITS, Item
from .transforms import ATTITUDE_SLOTS, EVENT_SLOTS, SWAPS, Record, noise, pools, swap


@dataclass(frozen=True)
class GeneratorConfig:
    """What a generated data set is made of. The defaults can be learned by a model of a quarter
    million parameters."""

    records: int = 2
    """Records a document, each two sentences; more is harder."""
    paraphrase: float = 0.3
    """Share of claims said in another template than the document's."""
    extrinsic: float = 0.3
    """Share of wrong values that occur nowhere in the document."""
    noise: float = 0.05
    """Share of claims, of both labels, with a word dropped or doubled."""
    claims: int = 1
    """Claims a document. 1 makes items independent; training may use more."""

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Sentence:
    record: int
    slots: str
    template: str


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

    `shift` is none, mild or moderate; severe is another domain with shift none, which only the
    caller can know. Raises: ValueError, naming the value and the known ones.
    """
    config = config or GeneratorConfig()
    check(domain, split, shift)
    grammar = shifted(GRAMMARS[domain], shift)
    if not 2 <= config.records <= (most := most_records(domain, shift)):
        raise ValueError(
            f"records is {config.records}: a wrong value comes from another record and no two share"
            f" a name, place or day, use 2 to {most} for claims of {domain} at shift {shift};"
            " questions take any number from 2"
        )
    config = replace(config, paraphrase=1.0) if shift == "moderate" else config
    rng = random.Random(f"{domain}/{split}/{seed}/{shift}/{config.hash()}")
    items: list[Item] = []
    while len(items) < n:
        group = f"{domain}-{split}-{seed}-{shift}-{len(items) // config.claims}"
        items += document_items(grammar, domain, split, shift, group, config, rng)
    return items[:n]


def most_records(domain: str, shift: str) -> int:
    """How many records of a document can differ in name, number, place and day."""
    grammar = shifted(GRAMMARS[domain], shift)
    return min(len(pools(grammar.names, grammar.places)[slot]) for slot in "SPND")


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
    """The part of the grammar that a shift level may use; no level shares a held-out part with
    training."""
    held = shift != "none"
    moved = shift == "moderate"

    def part(values: tuple[str, ...], count: int, last: bool) -> tuple[str, ...]:
        return values[-count:] if last else values[:-count]

    return replace(
        grammar,
        names=part(grammar.names, HELD_OUT_NAMES, held),
        places=part(grammar.places, HELD_OUT_PLACES, held),
        # a moved document is told in held-out templates, and its claims in others the model has
        # seen
        event=_order(grammar.event, moved),
        attitude=_order(grammar.attitude, moved),
    )


def _order(templates: tuple[str, ...], moved: bool) -> tuple[str, ...]:
    known, held = templates[:-HELD_OUT_TEMPLATES], templates[-HELD_OUT_TEMPLATES:]
    return held + known if moved else known


def distinct_records(grammar: Grammar, count: int, rng: random.Random) -> list[Record]:
    """Records of which no two share a name, a number, a place or a day."""
    values = pools(grammar.names, grammar.places)
    distinct = {slot: rng.sample(values[slot], count) for slot in "SPND"}
    return [
        Record(
            **{slot: distinct[slot][i] for slot in "SPND"},
            O=rng.choice(grammar.objects),
            R=rng.choice(values["R"]),
            X=rng.choice(values["X"]),
        )
        for i in range(count)
    ]


def drawn_record(grammar: Grammar, rng: random.Random) -> Record:
    """A record whose every slot is drawn by itself."""
    values = {**pools(grammar.names, grammar.places), "O": grammar.objects}
    return Record(**{slot: rng.choice(values[slot]) for slot in "SNOPDRX"})


def document_items(
    grammar: Grammar,
    domain: str,
    split: str,
    shift: str,
    group: str,
    config: GeneratorConfig,
    rng: random.Random,
) -> list[Item]:
    """The `config.claims` items of one new document in `grammar`; the other arguments are written
    on them."""
    records = distinct_records(grammar, config.records, rng)
    moved = shift == "moderate"
    sentences = [
        _Sentence(i, slots, templates[0] if moved else rng.choice(templates))
        for i in range(len(records))
        for slots, templates in ((EVENT_SLOTS, grammar.event), (ATTITUDE_SLOTS, grammar.attitude))
    ]
    rng.shuffle(sentences)
    doc = " ".join(records[s.record].say(s.template) for s in sentences)
    return [
        _claim(
            grammar, domain, split, shift, f"{group}", index, doc, records, sentences, config, rng
        )
        for index in range(config.claims)
    ]


def _claim(
    grammar: Grammar,
    domain: str,
    split: str,
    shift: str,
    group: str,
    index: int,
    doc: str,
    records: list[Record],
    sentences: list[_Sentence],
    config: GeneratorConfig,
    rng: random.Random,
) -> Item:
    slot = rng.choice(
        "SPNDRX"
    )  # before the label: both labels test the same slots of the same sentences
    sentence = rng.choice([s for s in sentences if slot in s.slots])
    record, label = records[sentence.record], rng.randrange(2)
    template, how = sentence.template, "verbatim"
    if rng.random() < config.paraphrase:
        same = grammar.event if sentence.slots == EVENT_SLOTS else grammar.attitude
        template, how = rng.choice([t for t in same if t != sentence.template]), "paraphrase"
    true, wrong_until = record.say(template), None
    if not label:
        others = [other for other in records if other is not record]
        values, far = pools(grammar.names, grammar.places), rng.random() < config.extrinsic
        record = swap(record, slot, sentence.slots, others, values, far, rng)
        how = SWAPS[slot]
    claim = record.say(template)
    if not label:
        wrong_until = first_wrong(true, claim)
    if rng.random() < config.noise:
        claim, how, wrong_until = noise(claim, getattr(record, slot), rng), how + "+noise", None
    return Item(
        f"{group}-{index}",
        "generated",
        domain,
        split,
        doc,
        claim,
        label,
        how,
        shift,
        group,
        wrong_until,
    )


def first_wrong(true: str, claim: str) -> int:
    """The end of the first word in which `claim` leaves `true`."""
    end = 0
    for word, wanted in zip(claim.split(" "), true.split(" "), strict=False):
        end += len(word)
        if word != wanted:
            break
        end += 1
    return end
