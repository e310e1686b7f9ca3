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

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_origin, get_type_hints

from .. import reading
from ..reading import quoted as quoted
from ..reading import unknown as unknown


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


def faults(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for each field of `kind` that may not hold its value in `values`. A list may not
    be empty."""
    hints = field_types(kind)
    empty = [
        name for name in values if values[name] in ([], ()) and get_origin(hints[name]) is tuple
    ]
    return reading.faults(values, hints, prefix) + [
        f"{prefix}{name} is empty: use {reading.usable(hints[name])}" for name in empty
    ]
