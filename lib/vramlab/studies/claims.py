"""The ledger of claims: what papers said, what would decide it, and the verdict that our figures
give by that rule.

A rule is a list of conditions on named figures (`studies.<study>.figures`); a claim is reproduced
when all hold, not reproduced when one fails, and cannot be tested here when one cannot be told: no
such figure, an interval that holds both answers, one seed, or a reason given in the ledger. Nothing
is decided by hand.
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
"""What a learned figure needs to decide anything, and the level of a corrected test."""
CONDITIONS = {
    "at_most": {"figure": str, "bound": float},
    "at_least": {"figure": str, "bound": float},
    "above": {"figure": str},
    "below": {"figure": str},
    "within": {"figure": str, "low": float, "high": float},
    "equal": {"figure": str, "to": float},
    "untestable": str,
}
"""condition -> what it takes"""
HOW = ("paper", "abstract", "recalled", "third party", "")
"""Where a quoted figure was read; `recalled` is said beside it."""


@dataclass(frozen=True)
class Claim:
    """One claim of one source."""

    id: str
    study: str
    source: str
    words: str
    """The claim in the source's sense, short."""
    statement: str
    """What would have to be measured, and how it would look if the claim held."""
    rule: Sequence[Mapping[str, Any]]
    """[{condition: {figure, ...}}]: at_most / at_least / above / below {figure, bound}, within
    {figure, low, high}, equal {figure, to}, untestable: the reason."""
    runs: Sequence[str] = ()
    """Arms of the study's file that feed it."""
    quoted: Mapping[str, str] = field(default_factory=dict)
    """{figure, of, how}: the published figure as it was written, and of what; `how` it was read."""

    def __post_init__(self):
        wrong = [
            name
            for part in self.rule
            for name, condition in part.items()
            if not matches(condition, CONDITIONS.get(name, ()))
        ]
        if (
            wrong
            or self.study not in STUDIES
            or not self.rule
            or self.quoted.get("how", "") not in HOW
        ):
            raise ValueError(
                f"claim {self.id}:"
                f" {f'unknown condition {wrong}' if wrong else 'check study, rule and quoted.how'};"
                f" studies: {', '.join(STUDIES)}; conditions: {', '.join(CONDITIONS)}; how:"
                f" {', '.join(HOW)}"
            )

    @property
    def figures(self) -> list[str]:
        """The names its rule looks at."""
        return [
            said["figure"]
            for part in self.rule
            for said in part.values()
            if isinstance(said, Mapping)
        ]


@dataclass(frozen=True)
class Verdict:
    """`word` is one of the three; `why` says which figure decided, or what is missing."""

    claim: Claim
    word: str
    why: str
    figures: Mapping[str, Figure]


def read_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """The ledger. Raises: BadFile, for a field that is missing, unknown or of another type;
    ValueError, for a rule that means nothing."""
    return [
        typed(Claim, claim, f"{path}: {name}", id=name) for name, claim in read_yaml(path).items()
    ]


def decide(claim: Claim, figures: Mapping[str, Figure]) -> Verdict:
    """The verdict by the claim's rule."""
    told = [_condition(name, said, figures) for part in claim.rule for name, said in part.items()]
    failed, open_ = (
        [why for holds, why in told if holds is False],
        [why for holds, why in told if holds is None],
    )
    word = NOT_REPRODUCED if failed else UNTESTED if open_ else REPRODUCED
    why = "; ".join(failed or open_ or [why for _, why in told])
    return Verdict(
        claim, word, why, {name: figures[name] for name in claim.figures if name in figures}
    )


def _condition(name: str, said, figures: Mapping[str, Figure]) -> tuple[bool | None, str]:
    """Whether it holds (None: cannot be told), and why."""
    if name == "untestable":
        return None, said
    figure = figures.get(said["figure"])
    if figure is None:
        return None, f"{said['figure']}: no run has it"
    if short := _too_little(figure):
        return None, f"{said['figure']}: {short}"
    low, high = _range(figure)
    bounds = _bounds(name, said)
    why = f"{said['figure']} is {figure.words()}, {_asked(name, said)}"
    if bounds[0] <= low and high <= bounds[1] and _significant(name, said, figure):
        return True, why
    if high < bounds[0] or low > bounds[1]:
        return False, why
    return None, f"{why}: the interval holds both answers"


def _range(figure: Figure) -> tuple[float, float]:
    return (figure.low, figure.high) if math.isfinite(figure.low) else (figure.value, figure.value)


def _too_little(figure: Figure) -> str:
    if not math.isfinite(figure.value):
        return "it is no number"
    if figure.kind == "learned" and figure.seeds < SEEDS:
        return f"{figure.seeds} seed(s), {SEEDS} are needed"
    if figure.kind == "learned" and 0 < figure.n < ITEMS:
        return f"{figure.n} items, {ITEMS:,} are needed"
    return ""


def _bounds(name: str, said: Mapping) -> tuple[float, float]:
    bound = said.get("bound", 0.0)
    return {
        "at_most": (-math.inf, bound),
        "below": (-math.inf, math.nextafter(bound, -math.inf)),
        "at_least": (bound, math.inf),
        "above": (math.nextafter(bound, math.inf), math.inf),
        "within": (said.get("low"), said.get("high")),
        "equal": (said.get("to"), said.get("to")),
    }[name]


def _significant(name: str, said: Mapping, figure: Figure) -> bool:
    """A difference that is to be above or below 0 has to pass its corrected test too."""
    tested = (
        name in ("above", "below") and not said.get("bound", 0.0) and math.isfinite(figure.p_holm)
    )
    return not tested or figure.p_holm < ALPHA


def _asked(name: str, said: Mapping) -> str:
    if name == "within":
        return f"to be within {said['low']:,} and {said['high']:,}"
    return f"to be {name.replace('_', ' ')} {said.get('to', said.get('bound', 0)):,}"


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row a claim: the page *What the papers said, what we saw*."""
    rows = []
    for verdict in verdicts:
        claim, figures = verdict.claim, list(verdict.figures.values())
        how = claim.quoted.get("how", "")
        quoted = (
            claim.quoted
            and f"{claim.quoted['figure']} ({claim.quoted['of']}{'; ' + how if how else ''})"
        )
        learned = [figure for figure in figures if figure.seeds]
        rows.append(
            {
                "study": claim.study,
                "claim": claim.words,
                "source": claim.source,
                "quoted": quoted or "",
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
