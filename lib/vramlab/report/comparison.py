"""The figures that hold measurements and forecasts side by side: one curve's code and one legend
for whatever made the timeline.

A timeline is a frame as `Meter.frame` gives it. It may be measured on a CPU, recorded on a GPU,
made by our simulator in a recording's place, or a forecast; its name says which, and nothing else
tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import plotly.graph_objects as go

from ..runs.folder import Run
from ..timeline import events as timeline
from ..timeline.agreement import Agreement, Divergence
from ..timeline.byte_ledger import NOT_AVAILABLE, Ledger
from ..timeline.thin import highest_of_bins
from .figures import COLORS, PHASES, _figure, timelines
from .tables import MIB

KINDS = {
    "meter": "measured on a CPU",
    "recorder": "recorded on CUDA",
    "simulated": "recording by our simulator, no GPU",
}
LEDGER_COLORS = {
    **COLORS,
    "rounding": "#d3c7b8",
    "cached": "#a0cbe8",
    "context": "#79706e",
    "other processes": "#d4a6c8",
}
REST_COLOR = "#ff9da7"
SIDES = (("measured_bytes", "#4e79a7", "solid"), ("predicted_bytes", "#f28e2b", "dash"))


@dataclass(frozen=True)
class Shown:
    """A timeline under a name: what `figures` draws in place of a run."""

    name: str
    timeline: pd.DataFrame
    ok = has_timeline = True

    @cached_property
    def result(self) -> dict:
        return {"peak": timeline.peak_owners(self.timeline)}


def shown(run: Run) -> Shown:
    """A finished run's timeline, named by its regime and by how it came about."""
    return Shown(f"{run.name}: {kind(run.timeline)}", run.timeline)


def kind(frame: pd.DataFrame) -> str:
    """How a timeline came about, in words."""
    return KINDS[frame["source"].iloc[0]]


def tokens(run: Run) -> int:
    """Tokens a row in the metered steps: the longest batch's."""
    ids = run.timeline.query("category == 'inputs' and event == 'alloc'")["bytes"].iloc[0]
    return int(ids) // 8 // run.params["batch_size"]


def curves(lines: Sequence[Shown]) -> go.Figure:
    """Any of the timelines, stacked by category, picked from a menu."""
    return timelines(lines)


def overlay(found: Agreement, name: str, other: str, points: int = 500) -> go.Figure:
    """Two timelines of the same step on the same axes, and below their difference; `name` is the
    measured one's, `other` the forecast's. The first and the largest divergence are marked."""
    curve = _thinned(found.curve, points)
    figure = _figure(
        f"{name} and {other}",
        560,
        hovermode="x",
        xaxis={"title": "matched allocation of the step, in order", "anchor": "y3"},
        yaxis={"title": "MiB requested", "domain": [0.36, 0.76]},
        yaxis2={"title": "difference", "domain": [0.1, 0.28]},
        yaxis3={"domain": [0, 0.05], "visible": False, "fixedrange": True},
    )
    for (column, color, dash), label in zip(SIDES, (name, other), strict=True):
        figure.add_scatter(
            x=curve["at"],
            y=(curve[column] / MIB).round(4),
            name=label,
            mode="lines",
            line={"shape": "hv", "color": color, "dash": dash, "width": 2},
            hovertemplate="%{y:.2f} MiB",
        )
    for (column, color, _), label in zip(SIDES, (name, other), strict=True):
        if (reserved := column.replace("_bytes", "_reserved_bytes")) in curve:
            figure.add_scatter(
                x=curve["at"],
                y=(curve[reserved] / MIB).round(4),
                name=f"{label}, reserved",
                mode="lines",
                line={"shape": "hv", "color": color, "dash": "dot", "width": 1},
                hovertemplate="%{y:.2f} MiB",
            )
    figure.add_scatter(
        x=curve["at"],
        y=(curve["error_bytes"] / MIB).round(4),
        name="difference",
        yaxis="y2",
        mode="lines",
        line={"shape": "hv", "color": "#e15759"},
        hovertemplate="%{y:+.3f} MiB",
        showlegend=False,
    )
    for phase in dict.fromkeys(curve["phase"]):
        at = curve["at"][curve["phase"] == phase]
        figure.add_scatter(
            x=at,
            y=[1] * len(at),
            name=phase,
            yaxis="y3",
            mode="markers",
            hoverinfo="skip",
            marker={"color": PHASES[phase], "symbol": "square", "size": 9},
        )
    for one in {found.first(), max(found.divergences, key=lambda one: one.bytes, default=None)} - {
        None
    }:
        figure.add_vline(one.at, line_width=1, line_dash="dot", line_color="#888")
    figure.update_layout(
        annotations=[
            {
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": 1,
                "xanchor": "left",
                "yanchor": "top",
                "showarrow": False,
                "align": "left",
                "font": {"size": 11},
                "text": "<br>".join(agreement_words(found)),
            }
        ]
    )
    return figure


def _thinned(curve: pd.DataFrame, points: int) -> pd.DataFrame:
    """Of each bin the highest of either side and the largest difference, so that no peak is
    lost."""
    sizes = curve.assign(error_bytes=curve["error_bytes"].abs())
    keep = {
        at
        for column in ("measured_bytes", "predicted_bytes", "error_bytes")
        for at in highest_of_bins(sizes[column], points)
    }
    return curve.iloc[sorted(keep)].reset_index(drop=True)


def agreement_words(found: Agreement) -> list[str]:
    """Error at the peak and over time, the share that was matched, and the first and the largest
    divergence, a line each."""
    largest = max(found.divergences, key=lambda one: one.bytes, default=None)
    return [
        (
            f"<b>error at the peak {found.peak_error:+.3%}</b> of"
            f" {found.measured_peak_bytes / MIB:,.1f} MiB, at most {found.worst_error:.3%} of it"
            " over time"
        ),
        (
            f"matched {found.joined.share:.1%} of allocations, {found.joined.bytes_share:.1%} of"
            f" bytes ({found.joined.method}); {len(found.divergences)} divergences"
        ),
        *(
            f"{name}: {there / MIB:,.1f} MiB predicted, against {here / MIB:,.1f}:"
            f" {there / here - 1:+.3%}"
            for name, (here, there) in found.peaks.items()
        ),
        *(
            f"{label}: {divergence_words(one)}"
            for label, one in (("first", found.first()), ("largest", largest))
            if one
        ),
    ]


def divergence_words(one: Divergence) -> str:
    """Operation, module and bytes."""
    where = f" of {one.module}" if one.module else ""
    return f"{one.bytes:,} bytes, {one.op or 'an allocation'}{where} in {one.phase}, {one.what}"


def driver_ledgers(runs: Sequence[Run]) -> dict[str, Ledger]:
    """The ledger of each run that has one: of a card, whose driver was asked."""
    return {
        run.name: Ledger.from_json(run.result["ledger"]) for run in runs if run.result.get("ledger")
    }


def ledgers(named: Mapping[str, Ledger]) -> go.Figure:
    """What the driver reports, taken apart, a bar each; the rest is drawn too, and what was not
    measured is said."""
    figure = _figure(
        "What the driver reports, and what it is made of", barmode="relative", yaxis_title="MiB"
    )
    parts = dict.fromkeys(part for one in named.values() for part in one.parts)
    for part in parts:
        sizes = [one.parts.get(part) for one in named.values()]
        figure.add_bar(
            x=list(named),
            y=[None if size is None else size / MIB for size in sizes],
            name=part,
            marker_color=LEDGER_COLORS.get(part, "#888"),
            hovertemplate="%{x}: %{y:,.1f} MiB<extra>" + part + "</extra>",
        )
    figure.add_bar(
        x=list(named),
        y=[None if one.rest is None else one.rest / MIB for one in named.values()],
        name="the rest",
        marker={"color": REST_COLOR, "pattern": {"shape": "/"}},
        customdata=[one.rest_name for one in named.values()],
        hovertemplate="%{x}: %{y:,.1f} MiB<extra>%{customdata}</extra>",
    )
    figure.add_scatter(
        x=list(named),
        y=[None if one.used is None else one.used / MIB for one in named.values()],
        mode="markers",
        name="used (driver)",
        marker={"symbol": "line-ew-open", "size": 20, "color": "#888", "line": {"width": 3}},
        hovertemplate="%{x}: %{y:,.1f} MiB<extra>used, driver</extra>",
    )
    for name, one in named.items():
        if one.missing or one.used is None:
            lacks = [*one.missing, *(["used"] if one.used is None else [])]
            figure.add_annotation(
                x=name,
                y=0,
                yanchor="top",
                showarrow=False,
                font={"size": 10},
                text=f"{NOT_AVAILABLE}: {', '.join(lacks)}",
            )
    return figure


def ledger_table(named: Mapping[str, Ledger]) -> pd.DataFrame:
    """One row a part, one column a ledger, MiB as text; what was not measured is N/A."""
    columns = {
        name: {
            label.split(", with")[0]: NOT_AVAILABLE if size is None else f"{size / MIB:,.2f}"
            for label, size in one.rows()
        }
        for name, one in named.items()
    }
    return pd.DataFrame(columns).fillna("0.00")
