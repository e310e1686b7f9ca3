"""The ledger of claims: what papers claim, the rule that decides each claim, and the verdict of our
figures by that rule.

A rule is a list of conditions on named figures of the study. A claim is reproduced when all of them
hold, not reproduced when one fails, and cannot be tested here when one stays open: there is no such
figure, its interval contains both answers, it is of too few seeds, or the ledger gives a reason.
Nothing is decided by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import ROOT
from ..reading import matches, read_yaml, typed
from . import STUDIES
from .estimates import Figure

CLAIMS_FILE = ROOT / "params" / "claims.yml"
REPRODUCED, NOT_REPRODUCED, UNTESTED = "reproduced", "not reproduced", "cannot be tested here"
SEEDS, ITEMS, ALPHA = 5, 1000, 0.05
"""The least that a learned figure needs to decide anything, and the level of a corrected test."""
CONDITIONS = {
    "at_most": {"figure": str, "bound": float},
    "at_least": {"figure": str, "bound": float},
    "above": {"figure": str},
    "below": {"figure": str},
    "within": {"figure": str, "low": float, "high": float},
    "equal": {"figure": str, "to": float},
    "untestable": str,
}
"""Condition -> the type of its value in the ledger."""
HOW = ("paper", "abstract", "recalled", "third party", "")
"""Where a quoted figure was read. `recalled` is printed beside it."""


@dataclass(frozen=True)
class Claim:
    """A claim of a source paper."""

    id: str
    study: str
    source: str
    words: str
    """The claim in the source's sense, short."""
    statement: str
    """What has to be measured, and the outcome that the claim predicts."""
    rule: Sequence[Mapping[str, Any]]
    """[{condition: {figure, ...}}]: at_most / at_least / above / below {figure, bound}, within
    {figure, low, high}, equal {figure, to}, untestable: the reason."""
    runs: Sequence[str] = ()
    """Arms of the study's file that feed it."""
    quoted: Mapping[str, str] = field(default_factory=dict)
    """{figure, of, how}: the published figure as printed, its subject, and how it was read."""

    def __post_init__(self):
        wrong = [
            name for name, value in self.conditions if not matches(value, CONDITIONS.get(name, ()))
        ]
        known = self.study in STUDIES and self.quoted.get("how", "") in HOW
        if wrong or not self.rule or not known:
            raise ValueError(
                f"claim {self.id}:"
                f" {f'unknown condition {wrong}' if wrong else 'check study, rule and quoted.how'};"
                f" studies: {', '.join(STUDIES)}; conditions: {', '.join(CONDITIONS)}; how:"
                f" {', '.join(HOW)}"
            )

    @property
    def conditions(self) -> list[tuple[str, Any]]:
        """(name of the condition, its value) of every part of the rule."""
        return [item for part in self.rule for item in part.items()]

    @property
    def figures(self) -> list[str]:
        """The names of the figures that its rule needs."""
        return [value["figure"] for _, value in self.conditions if isinstance(value, Mapping)]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one claim."""

    claim: Claim
    word: str
    """REPRODUCED, NOT_REPRODUCED or UNTESTED."""
    why: str
    """Which figure decided, or what is missing."""
    figures: Mapping[str, Figure]


def read_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """Read the ledger. Raises: BadFile, for a field that is missing, unknown or of another type;
    ValueError, for a rule that cannot be applied."""
    return [
        typed(Claim, claim, f"{path}: {name}", id=name) for name, claim in read_yaml(path).items()
    ]


def decide(claim: Claim, figures: Mapping[str, Figure]) -> Verdict:
    """The verdict by the claim's rule."""
    answers = [_condition(name, value, figures) for name, value in claim.conditions]
    failed = [why for holds, why in answers if holds is False]
    undecided = [why for holds, why in answers if holds is None]
    word = NOT_REPRODUCED if failed else UNTESTED if undecided else REPRODUCED
    why = "; ".join(failed or undecided or [why for _, why in answers])
    needed = {name: figures[name] for name in claim.figures if name in figures}
    return Verdict(claim, word, why, needed)


def _condition(name: str, value: Any, figures: Mapping[str, Figure]) -> tuple[bool | None, str]:
    """Whether the condition holds (None: it cannot be decided), and why."""
    if name == "untestable":
        return None, value
    figure = figures.get(value["figure"])
    if figure is None:
        return None, f"{value['figure']}: no run has it"
    if shortage := _shortage(figure):
        return None, f"{value['figure']}: {shortage}"
    low, high = figure.low, figure.high
    if not math.isfinite(low):
        low = high = figure.value
    least, most = _bounds(name, value)
    why = f"{value['figure']} is {figure.words()}, {_in_words(name, value)}"
    if least <= low and high <= most and _is_significant(name, value, figure):
        return True, why
    if high < least or low > most:
        return False, why
    return None, f"{why}: the interval holds both answers"


def _shortage(figure: Figure) -> str:
    """What the figure lacks to decide anything; empty, when it lacks nothing."""
    if not math.isfinite(figure.value):
        return "it is no number"
    if figure.kind == "learned" and figure.seeds < SEEDS:
        return f"{figure.seeds} seed(s), {SEEDS} are needed"
    if figure.kind == "learned" and 0 < figure.n < ITEMS:
        return f"{figure.n} items, {ITEMS:,} are needed"
    return ""


def _bounds(name: str, value: Mapping) -> tuple[float, float]:
    """The least and the most that the condition allows."""
    bound = value.get("bound", 0.0)
    return {
        "at_most": (-math.inf, bound),
        "below": (-math.inf, math.nextafter(bound, -math.inf)),
        "at_least": (bound, math.inf),
        "above": (math.nextafter(bound, math.inf), math.inf),
        "within": (value.get("low"), value.get("high")),
        "equal": (value.get("to"), value.get("to")),
    }[name]


def _is_significant(name: str, value: Mapping, figure: Figure) -> bool:
    """A difference that is to be above or below 0 also has to pass its corrected test."""
    tests_sign = name in ("above", "below") and not value.get("bound", 0.0)
    return not (tests_sign and math.isfinite(figure.p_holm)) or figure.p_holm < ALPHA


def _in_words(name: str, value: Mapping) -> str:
    if name == "within":
        return f"to be within {value['low']:,} and {value['high']:,}"
    return f"to be {name.replace('_', ' ')} {value.get('to', value.get('bound', 0)):,}"


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row for each claim, as the page *What the papers said, what we saw* shows them."""
    rows = []
    for verdict in verdicts:
        claim, figures = verdict.claim, list(verdict.figures.values())
        quoted = ""
        if claim.quoted:
            source = filter(None, [claim.quoted["of"], claim.quoted.get("how", "")])
            quoted = f"{claim.quoted['figure']} ({'; '.join(source)})"
        learned = [figure for figure in figures if figure.seeds]
        rows.append(
            {
                "study": claim.study,
                "claim": claim.words,
                "source": claim.source,
                "quoted": quoted,
                "ours": "; ".join(figure.words() for figure in figures),
                "verdict": verdict.word,
                "why": verdict.why,
                "how": ", ".join(dict.fromkeys(figure.kind for figure in figures)),
                "n": max((figure.n for figure in learned), default=0) or None,
                "seeds": min((figure.seeds for figure in learned), default=0) or None,
                "equal": ", ".join(
                    dict.fromkeys(figure.equal for figure in figures if figure.equal)
                ),
            }
        )
    return pd.DataFrame(rows)
