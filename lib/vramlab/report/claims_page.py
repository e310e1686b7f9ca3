"""The page *What the papers said, what we saw*: every claim of the ledger, study by study, with its
verdict and what decided it."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from ..studies import STUDIES
from ..studies.claims import NOT_REPRODUCED, REPRODUCED, UNTESTED, Verdict
from ..studies.gallery import GALLERY, read_made

COLORS = {REPRODUCED: "#59a14f", NOT_REPRODUCED: "#e15759", UNTESTED: "#bab0ac"}
MARKS = {REPRODUCED: "yes", NOT_REPRODUCED: "no", UNTESTED: "open"}
"""verdict -> class of its badge"""


def figure(verdicts: Sequence[Verdict]) -> go.Figure:
    """Claims by study and verdict; a part of a bar tells its claims."""
    drawn = go.Figure()
    for word, color in COLORS.items():
        its = {
            name: [
                verdict.claim.words
                for verdict in verdicts
                if (verdict.claim.study, verdict.word) == (name, word)
            ]
            for name in STUDIES
        }
        drawn.add_bar(
            y=[name.replace("_", " ") for name in its],
            x=[len(claims) for claims in its.values()],
            name=word,
            orientation="h",
            marker_color=color,
            customdata=["<br>".join(claims) for claims in its.values()],
            hovertemplate="%{customdata}<extra>" + word + "</extra>",
        )
    drawn.update_layout(
        barmode="stack",
        height=300,
        margin={"l": 150, "r": 10, "t": 10, "b": 110},
        legend={"orientation": "h", "y": -0.35, "yanchor": "top", "traceorder": "normal"},
    )
    drawn.update_xaxes(title_text="claims", dtick=5)
    drawn.update_yaxes(autorange="reversed")
    return drawn


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """How many of each verdict, in all and study by study."""

    def counted(its: Sequence[Verdict]) -> str:
        counts = Counter(verdict.word for verdict in its)
        return ", ".join(f"{counts[word]} {word}" for word in MARKS if counts[word])

    studies = [
        (name, [verdict for verdict in verdicts if verdict.claim.study == name]) for name in STUDIES
    ]
    return [
        f"{len(verdicts)} claims: {counted(verdicts)}.",
        *(f"{name}: {counted(its)}." for name, its in studies if its),
    ]


def markup(verdicts: Sequence[Verdict], gallery: Path = GALLERY) -> str:
    """A table a study. A study that was not run says so; its claims say what is missing."""
    parts = []
    for name in STUDIES:
        its = [verdict for verdict in verdicts if verdict.claim.study == name]
        if its:
            parts += [
                (
                    f"<h3>{_text(name.replace('_', ' '))}</h3><p"
                    f" class=soft>{_text(_made(gallery / name))}</p>"
                ),
                (
                    "<div class=scroll><table class=claims><thead><tr><th>the"
                    " paper</th><th>quoted</th><th>ours</th><th>verdict</th></tr></thead><tbody>"
                ),
                *(_row(verdict) for verdict in its),
                "</tbody></table></div>",
            ]
    return "\n".join(parts)


def _made(folder: Path) -> str:
    made = read_made(folder)
    if not made:
        return "Not run yet: `make studies`."
    env = made["made_with"]
    return (
        f"{made['cells']} runs and measurements of params/studies/{made['file']},"
        f" {env['device']['name']}, {env['started_at'][:10]}"
    )


def _row(verdict: Verdict) -> str:
    claim, how = verdict.claim, verdict.claim.quoted.get("how", "")
    quoted = (
        f"{_text(claim.quoted['figure'])}<br><span"
        f" class=soft>{_text(claim.quoted['of'])}{', ' + how if how else ''}</span>"
        if claim.quoted
        else ""
    )
    ours = "<br>".join(
        f"{_text(figure.words())} <span class=badge>{_text(figure.kind)}</span>{_basis(figure)}"
        for figure in verdict.figures.values()
    )
    return (
        f"<tr><td class=words>{_text(claim.words)}<br><span class=soft>{_text(claim.source)}."
        f" Decided by: {_text(claim.statement)}</span></td><td class=words>{quoted}</td><td"
        f" class=words>{ours}</td><td class=words><span class='verdict"
        f" {MARKS[verdict.word]}'>{_text(verdict.word)}</span><br><span"
        f" class=soft>{_text(verdict.why)}</span></td></tr>"
    )


def _basis(figure) -> str:
    said = [
        f"{figure.seeds} seeds" if figure.seeds else "",
        f"{figure.n:,} items" if figure.n else "",
        figure.contains,
        f"p {figure.p_holm:.2g} by Holm" if figure.p_holm == figure.p_holm else "",
        f"equal {figure.equal}" if figure.equal else "",
    ]
    words = "; ".join(word for word in said if word)
    return f" <span class=soft>({_text(words)})</span>" if words else ""


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
