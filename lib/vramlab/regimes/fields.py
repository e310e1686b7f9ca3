"""Checks what the fields of an axis value may hold: a row is checked against the annotations of the
fields when it is read.

    rank: Count = 8                                     a whole number, 1 or more
    share: Annotated[float, Range(1e-3, 1)] = 0.25      a number from 0.001 to 1
    order: Literal["ascending", "random"] = "random"    one of these words

Numbers have to be finite, and `true` is not a number. Combinations of fields and axes are checked
in `forbidden`, and what the model excludes where the value meets the model. All of them raise
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
    """The row is meaningless, or meaningless for this model. The message lists every reason, with
    the way out."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, both ends included."""

    least: float
    most: float = sys.float_info.max

    def __str__(self) -> str:
        unlimited = self.most == sys.float_info.max
        return f"{self.least:,} or more" if unlimited else f"{self.least:,} to {self.most:,}"


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
"""0 means none, or never."""
Width = Annotated[int, Range(1, 1 << 16)]
"""The side of a matrix that the field creates. A larger one is a mistake, and would only run out of
memory."""
Limit = Annotated[float, Range(0, 1e12)]
Seed = Annotated[int, Range(0, (1 << 32) - 1)]
Decay = Annotated[float, Range(0, 0.999999)]
"""The share of itself that a running mean keeps: with 1 it would never change."""
Eps = Annotated[float, Range(1e-20, 1)]
"""Added to the root in a denominator. In fp32 less than 1e-20 would not keep a quotient finite."""
WeightDecay = Annotated[float, Range(0, 10)]


@cache
def field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a field with this annotation may hold the value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0]) and arguments[1].least <= value <= arguments[1].most
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else ()
        return bool(items) and all(fits(item, arguments[0]) for item in items)
    kind = int | float if annotation is float else annotation
    return isinstance(value, kind) and isinstance(value, bool) is (annotation is bool)


def usable(annotation: Any) -> str:
    """The values that a field with this annotation may hold, as text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{WORDS[arguments[0]]}, {arguments[1]}"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    return f"a list, each item {usable(arguments[0])}" if origin is tuple else WORDS[annotation]


def quoted(value: Any) -> str:
    """The value as Python writes it, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def unknown(names: Iterable[Any], known: Sequence[str], owner: str) -> list[str]:
    """One sentence for each of `names` that `owner` does not have, with the nearest name that it
    has."""
    return [
        f"{owner} has no {quoted(name)}: use"
        f" {', '.join(get_close_matches(str(name)[:80], known, 1) or known) or 'no fields'}"
        for name in names
        if name not in known
    ]


def faults(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for each field of `kind` that may not hold its value in `values`."""
    return [
        f"{prefix}{name} is {quoted(value)}: use {usable(field_types(kind)[name])}"
        for name, value in values.items()
        if not fits(value, field_types(kind)[name])
    ]
