"""What a written claim says, read back with the grammar that the document was made by: the truth,
with no judge in between.

A sentence of a domain is one of its templates with a word of the right kind in every slot, so it
can be read back to what it states: who, how many, of what, where and when, or what of whom is said
to be. A claim is consistent when its document states the same in one of its sentences, in whatever
template.
"""

from __future__ import annotations

import re
from functools import cache
from string import Formatter

from .grammar import DATES, GRAMMARS, NUMBERS, PRONOUNS, Grammar
from .items import Item

VERDICTS = ("consistent", "inconsistent", "unparsable")

Statement = frozenset
"""(slot, word) pairs: what a sentence states, whichever template says it."""


def verdict(item: Item, claim: str) -> str | None:
    """One of VERDICTS for `claim` about the item's whole document; None where the document is not
    the generator's.

    `unparsable`: no sentence of the domain, a true one with a word dropped or added included.
    """
    known = GRAMMARS.get(item.domain)
    said = [state(known, sentence) for sentence in sentences(item.doc)] if known else []
    if not said or None in said:
        return None
    found = state(known, claim)
    return "unparsable" if found is None else "consistent" if found in said else "inconsistent"


def sentences(text: str) -> list[str]:
    """A generated document's sentences: each ends in a full stop that stands alone."""
    return re.split(r"(?<= \.) ", text)


def state(grammar: Grammar, sentence: str) -> Statement | None:
    """What `sentence` states; None when it is not exactly one of the grammar's."""
    lowered = (
        sentence[:1].lower() + sentence[1:]
    )  # a slot that begins a sentence is capitalised, whatever its word
    for pattern in _patterns(grammar):
        if found := pattern.fullmatch(sentence) or pattern.fullmatch(lowered):
            return frozenset(found.groupdict().items())
    return None


@cache
def _patterns(grammar: Grammar) -> list[re.Pattern]:
    """One a template, its slots named groups. Held-out words and templates are part of the domain
    too."""
    words = {
        "S": grammar.names,
        "P": grammar.places,
        "O": grammar.objects,
        "N": NUMBERS,
        "D": DATES,
        "R": PRONOUNS,
        "X": ("not ", ""),
    }
    return [
        re.compile(
            "".join(
                re.escape(text)
                + (f"(?P<{slot}>{'|'.join(map(re.escape, words[slot]))})" if slot else "")
                for text, slot, _, _ in Formatter().parse(template)
            )
        )
        for template in (*grammar.event, *grammar.attitude)
    ]
