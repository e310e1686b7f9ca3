"""What a field of an axis' value may hold: the field's annotation says it, and a row is checked
against it when it is read.

    rank: Count = 8                                     a whole number, 1 or more
    share: Annotated[float, Range(1e-3, 1)] = 0.25      a number from 0.001 to 1
    order: Literal["ascending", "random"] = "random"    one of these words

Numbers have to be finite, and `true` is no number. What other fields or axes exclude is in
`illegal`, what the model excludes where the value meets the model. All of them raise
`IllegalRegime`.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class IllegalRegime(ValueError):
    """The row cannot mean anything, or not for this model; the message lists every reason with the
    way out."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes, both ends included."""

    least: float
    most: float = sys.float_info.max

    def __str__(self) -> str:
        return (
            f"{self.least:,} or more"
            if self.most == sys.float_info.max
            else f"{self.least:,} to {self.most:,}"
        )


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
"""0 where there is none, or never."""
Width = Annotated[int, Range(1, 1 << 16)]
"""A side of a matrix that the field makes: a larger one is a slip, and would only run out of
memory."""
Limit = Annotated[float, Range(0, 1e12)]
Seed = Annotated[int, Range(0, (1 << 32) - 1)]
Decay = Annotated[float, Range(0, 0.999999)]
"""What a running mean keeps of itself: 1 would keep all and learn nothing."""
Eps = Annotated[float, Range(1e-20, 1)]
"""Added to a root that is divided by; in fp32 a smaller one than 1e-20 would not keep a quotient
finite."""
WeightDecay = Annotated[float, Range(0, 10)]


@cache
def annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a field with this annotation takes the value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0]) and arguments[1].least <= value <= arguments[1].most
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return (
            isinstance(value, list | tuple)
            and bool(value)
            and all(fits(item, arguments[0]) for item in value)
        )
    return isinstance(value, int | float if annotation is float else annotation) and isinstance(
        value, bool
    ) is (annotation is bool)


def usable(annotation: Any) -> str:
    """What a field with this annotation takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{WORDS[arguments[0]]}, {arguments[1]}"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    return f"a list, each item {usable(arguments[0])}" if origin is tuple else WORDS[annotation]


def quoted(value: Any) -> str:
    """The value as it is written, cut short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def unknown(given: Iterable[Any], known: Sequence[str], owner: str) -> list[str]:
    """One sentence for each name in `given` that `owner` does not have, with the nearest one that
    it has."""
    return [
        f"{owner} has no {quoted(name)}: use"
        f" {', '.join(get_close_matches(str(name)[:80], known, 1) or known) or 'no fields'}"
        for name in given
        if name not in known
    ]


def faults(kind: type, given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for each field of `kind` in `given` that cannot hold its value."""
    return [
        f"{prefix}{name} is {quoted(value)}: use {usable(annotations(kind)[name])}"
        for name, value in given.items()
        if not fits(value, annotations(kind)[name])
    ]
