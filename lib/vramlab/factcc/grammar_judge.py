"""Whether a written claim is true, read back with the grammar that made its document: the truth, no
judge's opinion.

A sentence of a domain is one of its templates with a word of the right kind in every slot, so it
can be parsed into what it states: who, how many, of what, where and when, or who will do what. A
claim is consistent when one of the document's sentences states the same, in whatever template.
"""

from __future__ import annotations

import re
from functools import cache
from string import Formatter

from .grammar import GRAMMARS, Grammar
from .items import Item

VERDICTS = ("consistent", "inconsistent", "unparsable")

Statement = frozenset
"""(slot, word) pairs: what a sentence states, whichever template it uses."""


def verdict(item: Item, claim: str) -> str | None:
    """One of VERDICTS for `claim` about the item's whole document; None where the generator did not
    make the document.

    `unparsable`: not a sentence of the domain, such as a true one with a word dropped or added.
    """
    grammar = GRAMMARS.get(item.domain)
    if grammar is None:
        return None
    # each sentence of a generated document ends in a full stop that stands alone
    document = [parse(grammar, sentence) for sentence in re.split(r"(?<= \.) ", item.doc)]
    if None in document:
        return None
    statement = parse(grammar, claim)
    return (
        "unparsable"
        if statement is None
        else "consistent"
        if statement in document
        else "inconsistent"
    )


def parse(grammar: Grammar, sentence: str) -> Statement | None:
    """What `sentence` states; None when it is not exactly one of the grammar's."""
    # a word that begins a sentence is capitalised, whatever its slot
    lowered = sentence[:1].lower() + sentence[1:]
    for pattern in _patterns(grammar):
        if match := pattern.fullmatch(sentence) or pattern.fullmatch(lowered):
            return frozenset(match.groupdict().items())
    return None


@cache
def _patterns(grammar: Grammar) -> list[re.Pattern]:
    """One pattern per template, its slots named groups. Held-out words and templates belong to the
    domain too."""
    words = grammar.slot_values()

    def pattern(text: str, slot: str | None) -> str:
        choices = "|".join(map(re.escape, words[slot])) if slot else ""
        return re.escape(text) + (f"(?P<{slot}>{choices})" if slot else "")

    return [
        re.compile("".join(pattern(text, slot) for text, slot, *_ in Formatter().parse(template)))
        for template in (*grammar.event, *grammar.attitude)
    ]
