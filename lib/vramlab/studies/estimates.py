"""One computed number with its uncertainty, and the statistics that make it.

Accuracy of several seeds on the same items varies in two ways: another seed would train another
model, other items would be other questions. `two_level` resamples both. Few seeds are few:
intervals are Student's t with one less degree of freedom than there are seeds, around the
bootstrap's standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from ..factcc.statistics import LEVEL, holm, wilson

RESAMPLES = 2000
BOTH = f"{LEVEL:.0%}: seeds and items"
SEEDS = f"{LEVEL:.0%}: seeds"
ITEMS = f"{LEVEL:.0%}: items only, one seed"
SHARE = f"{LEVEL:.0%}: Wilson, of a share"


class NotRun(LookupError):
    """The runs that a figure needs have not been made. The figure is left out, and a claim that
    needs it cannot be tested."""


@dataclass(frozen=True)
class Figure:
    """A number, its origin, and its uncertainty."""

    value: float
    kind: str
    """`learned` (accuracy or loss of trained models), `measured` (seconds or bytes, on the device
    the runs name), `predicted` (a forecast) or `computed` (arithmetic)."""
    unit: str = ""
    low: float = math.nan
    high: float = math.nan
    contains: str = ""
    """What the interval accounts for; empty: there is none, the number is exact or stands alone."""
    n: int = 0
    """Items of each seed, where there are items."""
    seeds: int = 0
    p: float = math.nan
    """Two-sided, of the difference being 0."""
    p_holm: float = math.nan
    """Corrected over the comparisons of its family."""
    equal: str = ""
    """Of a comparison: the budget that both sides had, tokens, seconds or updates."""

    def words(self) -> str:
        """Value, unit, interval."""
        if self.unit == "bytes":
            return f"{self.value:,.0f} bytes"
        interval = f" [{self.low:,.4g}, {self.high:,.4g}]" if math.isfinite(self.low) else ""
        return f"{self.value:,.4g} {self.unit}".rstrip() + interval

    def to_json(self) -> dict:
        """Plain data; a number that is not finite is None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @staticmethod
    def from_json(content: Mapping) -> Figure:
        """The figure that `to_json` wrote."""
        fields: dict[str, Any] = {k: math.nan if v is None else v for k, v in content.items()}
        return Figure(**fields)


@cache
def _shares(count: int, stream: int) -> np.ndarray:
    """The share of each of `count` units in each resample, (RESAMPLES, count); the same for every
    comparison, so that they pair."""
    rng = np.random.default_rng([count, stream])
    counts = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return (counts / count).astype(np.float32)


def two_level(right: np.ndarray, labels: np.ndarray, other: np.ndarray | None = None) -> Figure:
    """Balanced accuracy of several seeds, or with `other` the difference to it, seed by seed and
    item by item.

    `right`, `other`: (seeds, items), whether a call was right; `labels`: (items,), 1 is consistent.
    There is one item for each document. Items are resampled within their label, the same for all
    seeds of a resample. Seeds are the outer level; their part of the variance is enlarged by
    S / (S - 1), because a resample of S seeds underestimates it by that factor. Raises: ValueError,
    where a label is missing.
    """
    values = right.astype(float) - (0.0 if other is None else other.astype(float))
    count = len(values)
    seeds = 1 / count + (_shares(count, 2) - 1 / count) * math.sqrt(count / max(1, count - 1))
    point, resampled = 0.0, np.zeros(RESAMPLES)
    for label in (0, 1):
        chosen = values[:, np.asarray(labels) == label]
        if not chosen.shape[1]:
            raise ValueError(f"no item has label {label}: balanced accuracy needs both")
        resampled += ((seeds @ chosen) * _shares(chosen.shape[1], label)).sum(1) / 2
        point += float(chosen.mean()) / 2
    figure = _around(point, float(resampled.std(ddof=1)), count - 1 if count > 1 else math.inf)
    figure = replace(figure, n=values.shape[1], seeds=count, contains=BOTH if count > 1 else ITEMS)
    return figure if other is not None else replace(figure, p=math.nan)


def by_seed(
    values: Sequence[float],
    other: Sequence[float] | None = None,
    kind: str = "learned",
    unit: str = "",
) -> Figure:
    """The mean over seeds, or of the paired differences; Student's t. One seed has no interval."""
    each = np.asarray(values, float) - (0.0 if other is None else np.asarray(other, float))
    error = float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    figure = replace(
        _around(float(each.mean()), error, len(each) - 1),
        kind=kind,
        unit=unit,
        seeds=len(each),
        contains=SEEDS if len(each) > 1 else "",
    )
    return figure if other is not None else replace(figure, p=math.nan)


def ratio_by_seed(
    values: Sequence[float], other: Sequence[float], kind: str = "measured"
) -> Figure:
    """The geometric mean of the paired ratios, with the interval of its logarithm."""
    logs = by_seed(np.log(np.asarray(values, float)), np.log(np.asarray(other, float)), kind)
    return replace(
        logs,
        value=math.exp(logs.value),
        low=math.exp(logs.low),
        high=math.exp(logs.high),
        unit="times",
    )


def available(figures: Mapping[str, Callable[[], Figure]]) -> Iterator[tuple[str, Figure]]:
    """Compute the figures whose runs have been made; those that raise NotRun are left out."""
    for name, compute in figures.items():
        with suppress(NotRun):
            yield name, compute()


def share(count: int, of: int) -> Figure:
    """`count` of `of` runs, with Wilson's interval."""
    low, high = wilson(count, of)
    return Figure(count / of, "learned", low=low, high=high, contains=SHARE, seeds=of)


def corrected(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """The family of comparisons with Holm's p; those without a p stay as they are."""
    tested = [name for name, figure in figures.items() if math.isfinite(figure.p)]
    ps = dict(zip(tested, holm([figures[name].p for name in tested]), strict=True))
    return {
        name: replace(figure, p_holm=ps[name]) if name in ps else figure
        for name, figure in figures.items()
    }


def _around(value: float, error: float, freedom: float) -> Figure:
    """Value with the interval and the two-sided p of Student's t; an error of 0 is certainty."""
    if not math.isfinite(error):
        return Figure(value, "learned")
    width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Figure(value, "learned", low=value - width, high=value + width, p=p)
