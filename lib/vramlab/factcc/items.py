"""The one record that every source of consistency items is read into."""

from __future__ import annotations

from dataclasses import dataclass

DOMAINS: tuple[str, ...] = ("general", "news", "law", "medicine")
"""Domains of the generator; sources read from disk bring their own."""

SHIFTS = ("none", "mild", "moderate", "severe")
"""How far an item is from the training data. none: new documents only; mild: new names and places
too; moderate: new templates too, every claim paraphrased; severe: another domain."""

SPLITS = ("train", "val", "test")

READING = "reading"
"""The source of generated yes/no questions."""
QUESTION_SOURCES = (READING, "boolq")
"""Sources whose claim is a yes/no question, written without its question mark."""


@dataclass(frozen=True)
class Item:
    """A claim or a question about a document. `label` is 1 when the document supports the claim or
    the answer is yes, else 0."""

    uid: str
    source: str
    domain: str
    split: str
    doc: str
    claim: str
    label: int
    transform: str
    """How the claim was made: verbatim, paraphrase, entity_swap, ..., with `+noise` appended where
    noise was added; empty when not known."""
    shift: str
    group: str
    """The document's id: items of one group are not independent, and statistics resample groups."""
    wrong_until: int | None = None
    """The character of the claim at which its first wrong word ends, where known (FactCC's
    augmentation span)."""

    @property
    def asks(self) -> bool:
        """Whether the claim is a question."""
        return self.source in QUESTION_SOURCES
