"""What all figures share: the colours of categories and phases, titles and margins, menus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from ..studies.estimates import Figure

COLORS = {
    "weights": "#4e79a7",
    "gradients": "#e15759",
    "optimizer": "#b07aa1",
    "activations": "#59a14f",
    "temporaries": "#f28e2b",
    "buffers": "#bab0ac",
    "inputs": "#9c755f",
    "workspace": "#edc948",
    "collectives": "#76b7b2",
}
PREDICTED_COLORS = {**COLORS, "workspace": "#bab0ac"}
PHASES = {
    "init": "#8c8c8c",
    "forward": "#6baed6",
    "backward": "#fd8d3c",
    "recompute": "#fdd0a2",
    "update": "#9e9ac8",
    "eval": "#74c476",
}
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
"""plotly's configuration of every figure on a page: nothing is sent anywhere."""
CORNER = {
    "xref": "paper",
    "yref": "paper",
    "x": 0,
    "y": 1,
    "xanchor": "left",
    "yanchor": "top",
    "showarrow": False,
    "align": "left",
    "font": {"size": 11},
}
"""An annotation in the upper left corner of a plot."""
LIMIT_LINE = {"dash": "dash", "color": "#d62728", "width": 2}
"""The line of what a card has for the allocator."""


def new_figure(title: str, height: int = 440, **layout) -> go.Figure:
    """An empty figure with a title at the left and a legend below."""
    figure = go.Figure()
    return figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        height=height,
        margin={"l": 60, "r": 16, "t": 48, "b": 56},
        **layout,
        legend={"orientation": "h", "y": -0.2, "traceorder": "normal"},
    )


def menu(buttons: Sequence[dict], y: float = 1.02) -> dict:
    """A drop-down menu at the right, `y` of the plot's height above its foot."""
    return {
        "type": "dropdown",
        "buttons": buttons,
        "x": 1,
        "xanchor": "right",
        "y": y,
        "yanchor": "bottom",
        "bgcolor": "#e8e8e8",
        "font": {"color": "#222"},
    }


def add_choices(
    figure: go.Figure,
    choices: Iterable[Any],
    to_traces: Callable[[Any, bool], Sequence],
) -> list[int | None]:
    """Add `to_traces(choice, visible)` of each choice, of which the first is visible, and return
    the number of the choice that owns each trace."""
    owners: list[int | None] = []
    for index, choice in enumerate(choices):
        traces = to_traces(choice, index == 0)
        figure.add_traces(traces)
        owners += [index] * len(traces)
    return owners


def visibility_buttons(labels: Sequence[str], owners: Sequence[int | None]) -> list[dict]:
    """One button a label. It shows the traces that it owns and those that nobody owns (None)."""
    return [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [owner in (None, index) for owner in owners]}],
        }
        for index, label in enumerate(labels)
    ]


def add_menu(figure: go.Figure, labels: Sequence[str], owners: Sequence[int | None]) -> go.Figure:
    """Add a menu that picks one of the choices, unless there is only one."""
    buttons = visibility_buttons(labels, owners)
    return figure.update_layout(updatemenus=[menu(buttons)] if len(buttons) > 1 else [])


def stacked_area(
    category: str, color: str, x: Sequence, y: Sequence, unit: str, **more
) -> go.Scatter:
    """A category's bytes over a timeline, stacked on those before it."""
    return go.Scatter(
        x=x,
        y=y,
        name=category,
        mode="lines",
        line={"width": 0, "shape": "hv"},
        fillcolor=color,
        stackgroup="bytes",
        hovertemplate=f"%{{y:.2f}} {unit}<extra>{category}</extra>",
        **more,
    )


def phase_band(phase: str, x: Sequence, y: Sequence, **more) -> go.Scatter:
    """Squares in a row where a timeline is in that phase."""
    return go.Scatter(
        x=x,
        y=y,
        name=phase,
        mode="markers",
        marker={"color": PHASES.get(phase, "#888"), "symbol": "square", "size": 9},
        **more,
    )


def interval_bars(estimates: Sequence[Figure], **more) -> dict:
    """Error bars of a study's estimates, from `low` to `high`."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [estimate.high - estimate.value for estimate in estimates],
        "arrayminus": [estimate.value - estimate.low for estimate in estimates],
        **more,
    }


def finish_figure(figure: go.Figure, title: str, kind: str, plot_px: int) -> go.Figure:
    """Margins and a legend that keep their distance at any height, and in the corner the kind of
    the figure's numbers (predicted, measured, learned)."""
    top, bottom = 84, 110
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        height=top + plot_px + bottom,
        margin={"l": 60, "r": 16, "t": top, "b": bottom},
        legend={"orientation": "h", "y": -52 / plot_px, "yanchor": "top", "traceorder": "normal"},
    )
    return figure.add_annotation(
        text=kind,
        x=1,
        y=1,
        xref="paper",
        yref="paper",
        xanchor="right",
        yanchor="bottom",
        yshift=38,
        showarrow=False,
        bgcolor="#fff3cd",
        bordercolor="#d6b656",
        borderpad=3,
        font={"size": 12, "color": "#333"},
    )
