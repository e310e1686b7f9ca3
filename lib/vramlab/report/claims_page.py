"""The section *What the papers said, what we saw*: every claim of params/claims.yml, study by
study, with its verdict and what decided it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from ..studies import STUDIES, claims, gallery
from ..studies.claims import NOT_REPRODUCED, REPRODUCED, UNTESTED, Verdict
from ..studies.estimates import Figure
from .rendering import Section, render

COLORS = {REPRODUCED: "#59a14f", NOT_REPRODUCED: "#e15759", UNTESTED: "#bab0ac"}
BADGES = {REPRODUCED: "yes", NOT_REPRODUCED: "no", UNTESTED: "open"}
"""verdict -> class of its badge"""


def section() -> Section:
    """Every claim, decided from the runs in the gallery."""
    verdicts = gallery.verdicts()
    return Section(
        "What the papers said, what we saw",
        "Every claim of params/claims.yml, decided by its rule from the runs under outputs/gallery."
        " Quoted figures are the papers' own, of other models and machines; a verdict is never from"
        " one seed.",
        figure(verdicts),
        claims.table(verdicts),
        sentences=sentences(verdicts),
        extra=markup(verdicts),
    )


def by_study(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Study -> its verdicts, empty for a study without claims."""
    return {
        study: [verdict for verdict in verdicts if verdict.claim.study == study]
        for study in STUDIES
    }


def figure(verdicts: Sequence[Verdict]) -> go.Figure:
    """The number of claims by study and verdict; hovering over a bar lists its claims."""
    bars = go.Figure()
    for word, color in COLORS.items():
        claimed = {
            study: [verdict.claim.words for verdict in decided if verdict.word == word]
            for study, decided in by_study(verdicts).items()
        }
        bars.add_bar(
            y=[study.replace("_", " ") for study in claimed],
            x=[len(texts) for texts in claimed.values()],
            name=word,
            orientation="h",
            marker_color=color,
            customdata=["<br>".join(texts) for texts in claimed.values()],
            hovertemplate="%{customdata}<extra>" + word + "</extra>",
        )
    bars.update_layout(
        barmode="stack",
        height=300,
        margin={"l": 150, "r": 10, "t": 10, "b": 110},
        legend={"orientation": "h", "y": -0.35, "yanchor": "top", "traceorder": "normal"},
    )
    bars.update_xaxes(title_text="claims", dtick=5)
    return bars.update_yaxes(autorange="reversed")


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """How many claims have each verdict, in all and study by study."""
    studies = {study: decided for study, decided in by_study(verdicts).items() if decided}
    return [
        f"{len(verdicts)} claims: {_counts(verdicts)}.",
        *(f"{study}: {_counts(decided)}." for study, decided in studies.items()),
    ]


def _counts(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.word for verdict in verdicts)
    return ", ".join(f"{counts[word]} {word}" for word in COLORS if counts[word])


def markup(verdicts: Sequence[Verdict], folder: Path = gallery.GALLERY) -> str:
    """HTML: a table for each study that has claims, under a line that says what was run for it."""
    studies = [
        {
            "name": study.replace("_", " "),
            "made": _provenance(folder / study),
            "verdicts": decided,
        }
        for study, decided in by_study(verdicts).items()
        if decided
    ]
    return render("claims", studies=studies, badges=BADGES, basis=basis)


def _provenance(folder: Path) -> str:
    made_with = gallery.read_made(folder)
    if not made_with:
        return "Not run yet: `make studies`."
    environment = made_with["made_with"]
    return (
        f"{made_with['cells']} runs and measurements of params/studies/{made_with['file']},"
        f" {environment['device']['name']}, {environment['started_at'][:10]}"
    )


def basis(estimate: Figure) -> str:
    """What an estimate rests on: seeds, items, interval, corrected p and what was kept equal, as
    far as it has them."""
    parts = [
        f"{estimate.seeds} seeds" if estimate.seeds else "",
        f"{estimate.n:,} items" if estimate.n else "",
        estimate.contains,
        f"p {estimate.p_holm:.2g} by Holm" if estimate.p_holm == estimate.p_holm else "",
        f"equal {estimate.equal}" if estimate.equal else "",
    ]
    return "; ".join(filter(None, parts))
