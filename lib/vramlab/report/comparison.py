"""The figures that hold measurements and forecasts side by side, with one code and one legend for
whatever made the timeline.

A timeline is a frame as `Meter.frame` returns it. It may be measured on a CPU, recorded on a GPU,
made by our simulator in a recording's place, or a forecast; only its name says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import plotly.graph_objects as go

from ..runs.folder import Run
from ..timeline import events
from ..timeline.agreement import Agreement, Divergence
from ..timeline.byte_ledger import NOT_AVAILABLE, Ledger
from ..timeline.thin import highest_of_bins
from .style import COLORS, CORNER, new_figure, phase_band
from .tables import MIB, mib

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


@dataclass(frozen=True)
class NamedTimeline:
    """A timeline under a name, which `figures.timelines` draws in place of a run."""

    name: str
    timeline: pd.DataFrame
    ok = has_timeline = True

    @cached_property
    def result(self) -> dict:
        return {"peak": events.peak_owners(self.timeline)}


def run_timeline(run: Run) -> NamedTimeline:
    """A finished run's timeline, named by its regime and by how it was obtained."""
    return NamedTimeline(f"{run.name}: {kind(run.timeline)}", run.timeline)


def kind(frame: pd.DataFrame) -> str:
    """How a timeline was obtained, in words."""
    return KINDS[frame["source"].iloc[0]]


def tokens(run: Run) -> int:
    """Tokens a row in the metered steps: those of the longest batch."""
    ids = run.timeline.query("category == 'inputs' and event == 'alloc'")["bytes"].iloc[0]
    return int(ids) // 8 // run.params["batch_size"]


def overlay(agreement: Agreement, name: str, other: str, points: int = 500) -> go.Figure:
    """Two timelines of the same step on the same axes, and below their difference; `name` is the
    measured one's, `other` the forecast's. The first and the largest divergence are marked."""
    curve = _thinned(agreement.curve, points)
    figure = new_figure(
        f"{name} and {other}",
        560,
        hovermode="x",
        xaxis={"title": "matched allocation of the step, in order", "anchor": "y3"},
        yaxis={"title": "MiB requested", "domain": [0.36, 0.76]},
        yaxis2={"title": "difference", "domain": [0.1, 0.28]},
        yaxis3={"domain": [0, 0.05], "visible": False, "fixedrange": True},
    )
    solid, dashed = ({"color": "#4e79a7", "dash": "solid"}, {"color": "#f28e2b", "dash": "dash"})
    lines = [
        ("measured_bytes", name, {**solid, "width": 2}),
        ("predicted_bytes", other, {**dashed, "width": 2}),
        ("measured_reserved_bytes", f"{name}, reserved", {**solid, "dash": "dot", "width": 1}),
        ("predicted_reserved_bytes", f"{other}, reserved", {**dashed, "dash": "dot", "width": 1}),
    ]
    for column, label, style in lines:
        if column in curve:
            figure.add_scatter(
                x=curve["at"],
                y=(curve[column] / MIB).round(4),
                name=label,
                mode="lines",
                line={"shape": "hv", **style},
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
    for phase, moments in curve.groupby("phase", sort=False)["at"]:
        figure.add_trace(
            phase_band(phase, moments, [1] * len(moments), yaxis="y3", hoverinfo="skip")
        )
    for divergence in dict.fromkeys(_marked(agreement).values()):
        figure.add_vline(divergence.at, line_width=1, line_dash="dot", line_color="#888")
    text = "<br>".join(agreement_sentences(agreement))
    return figure.update_layout(annotations=[{**CORNER, "text": text}])


def _thinned(curve: pd.DataFrame, points: int) -> pd.DataFrame:
    """Of each bin the highest of either side and the largest difference, so that no peak is
    lost."""
    sizes = (curve["measured_bytes"], curve["predicted_bytes"], curve["error_bytes"].abs())
    kept = {int(at) for size in sizes for at in highest_of_bins(size, points)}
    return curve.iloc[sorted(kept)].reset_index(drop=True)


def _marked(agreement: Agreement) -> dict[str, Divergence]:
    """The first and the largest divergence; empty where the timelines agree."""
    marked = {"first": agreement.first(), "largest": agreement.largest()}
    return {label: divergence for label, divergence in marked.items() if divergence}


def agreement_sentences(agreement: Agreement) -> list[str]:
    """Error at the peak and over time, the share that was matched, and the first and the largest
    divergence, a line each."""
    joined = agreement.joined
    return [
        (
            f"<b>error at the peak {agreement.peak_error:+.3%}</b> of"
            f" {agreement.measured_peak_bytes / MIB:,.1f} MiB, at most {agreement.worst_error:.3%}"
            " of it over time"
        ),
        (
            f"matched {joined.share:.1%} of allocations, {joined.bytes_share:.1%} of"
            f" bytes ({joined.method}); {len(agreement.divergences)} divergences"
        ),
        *(
            f"{name}: {predicted / MIB:,.1f} MiB predicted, against {measured / MIB:,.1f}:"
            f" {predicted / measured - 1:+.3%}"
            for name, (measured, predicted) in agreement.peaks.items()
        ),
        *(
            f"{label}: {divergence_label(divergence)}"
            for label, divergence in _marked(agreement).items()
        ),
    ]


def divergence_label(divergence: Divergence) -> str:
    """Operation, module and bytes."""
    where = f" of {divergence.module}" if divergence.module else ""
    return (
        f"{divergence.bytes:,} bytes, {divergence.op or 'an allocation'}{where} in"
        f" {divergence.phase}, {divergence.what}"
    )


def driver_ledgers(runs: Sequence[Run]) -> dict[str, Ledger]:
    """The ledger of each run that has one: a run on a card, whose driver was read."""
    return {
        run.name: Ledger.from_json(run.result["ledger"]) for run in runs if run.result.get("ledger")
    }


def ledgers(by_name: Mapping[str, Ledger]) -> go.Figure:
    """What the driver reports, taken apart, a bar each; the rest is drawn too, and unmeasured parts
    are named."""
    figure = new_figure(
        "What the driver reports, and what it is made of", barmode="relative", yaxis_title="MiB"
    )
    columns = list(by_name.values())
    for part in dict.fromkeys(part for ledger in columns for part in ledger.parts):
        figure.add_bar(
            x=list(by_name),
            y=[mib(ledger.parts.get(part)) for ledger in columns],
            name=part,
            marker_color=LEDGER_COLORS.get(part, "#888"),
            hovertemplate="%{x}: %{y:,.1f} MiB<extra>" + part + "</extra>",
        )
    figure.add_bar(
        x=list(by_name),
        y=[mib(ledger.rest) for ledger in columns],
        name="the rest",
        marker={"color": REST_COLOR, "pattern": {"shape": "/"}},
        customdata=[ledger.rest_name for ledger in columns],
        hovertemplate="%{x}: %{y:,.1f} MiB<extra>%{customdata}</extra>",
    )
    figure.add_scatter(
        x=list(by_name),
        y=[mib(ledger.used) for ledger in columns],
        mode="markers",
        name="used (driver)",
        marker={"symbol": "line-ew-open", "size": 20, "color": "#888", "line": {"width": 3}},
        hovertemplate="%{x}: %{y:,.1f} MiB<extra>used, driver</extra>",
    )
    for name, ledger in by_name.items():
        missing = [*ledger.missing, *(["used"] if ledger.used is None else [])]
        if missing:
            figure.add_annotation(
                x=name,
                y=0,
                yanchor="top",
                showarrow=False,
                font={"size": 10},
                text=f"{NOT_AVAILABLE}: {', '.join(missing)}",
            )
    return figure


def ledger_table(by_name: Mapping[str, Ledger]) -> pd.DataFrame:
    """One row a part, one column a ledger, MiB as text; an unmeasured part is N/A."""
    columns = {
        name: {
            part.split(", with")[0]: NOT_AVAILABLE if size is None else f"{size / MIB:,.2f}"
            for part, size in ledger.rows()
        }
        for name, ledger in by_name.items()
    }
    return pd.DataFrame(columns).fillna("0.00")
