"""The figures and tables of the study of the regimes, each from plain data of `study`. What kind a figure is stands on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .forecast_figures import COLORS, RESERVED
from .forecasts import GIB

EVENTS = {"": "#bab0ac", "new projection": "#e15759", "switch": "#4e79a7", "anchor": "#b07aa1", "probe": "#76b7b2"}


def badge(figure: go.Figure, kind: str) -> go.Figure:
    """The kind of the figure's numbers, in its corner."""
    return figure.add_annotation(text=kind, x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="bottom", yshift=24,
                                 showarrow=False, bgcolor="#fff3cd", bordercolor="#d6b656", borderpad=3, font={"size": 12, "color": "#333"})


def ledger(cells: Mapping[str, Mapping], counts: Mapping[str, object]) -> go.Figure:
    """What is alive at each row's peak, with the card's limit; beside it how often a parameter is updated."""
    names = list(cells)
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.74, 0.26], horizontal_spacing=0.03)
    for category, color in COLORS.items():
        sizes = [cell["ledger"].get(category, 0) for cell in cells.values()]
        if any(size >= cell["requested_bytes"] / 1000 for size, cell in zip(sizes, cells.values(), strict=True)):
            figure.add_bar(x=[round(size / GIB, 4) for size in sizes], y=names, orientation="h", name=category, marker_color=color,
                           hovertemplate="%{y}: %{x:.3f} GiB<extra>" + category + "</extra>", row=1, col=1)
    held = [next(iter(cell["cards"].values())) for cell in cells.values()]
    figure.add_scatter(x=[one["reserved_bytes"] / GIB for one in held], y=names, mode="markers", name=RESERVED,
                       marker={"symbol": "line-ns-open", "size": 18, "color": "#888", "line": {"width": 3}},
                       hovertemplate="%{y}: %{x:.3f} GiB reserved<extra>predicted</extra>", row=1, col=1)
    first = next(iter(cells.values()))
    limit = first["capacity_bytes"] / GIB
    figure.add_scatter(x=[limit, limit], y=[names[0], names[-1]], mode="lines", name=f"limit: {first['card']}", row=1, col=1,
                       line={"dash": "dash", "color": "#d62728", "width": 2}, hovertemplate="%{x:.2f} GiB<extra>card</extra>")
    mean = [counts[name].mean for name in names]
    figure.add_bar(x=mean, y=names, orientation="h", showlegend=False, marker_color="#9c9c9c", text=[f"{value:,.4g}" for value in mean],
                   textposition="auto", hovertemplate="%{y}: %{x:.4g}<extra>updates</extra>", row=1, col=2)
    figure.update_layout(barmode="stack", height=190 + 40 * len(names), margin={"l": 60, "r": 16, "t": 64, "b": 56},
                         title={"text": "What is alive at the peak, and what it buys", "x": 0, "xanchor": "left", "font": {"size": 15}},
                         legend={"orientation": "h", "y": -0.3, "yanchor": "top", "yref": "paper", "traceorder": "normal"})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="updates a parameter, 1,000 steps", range=[0, 1080], row=1, col=2)
    return badge(figure, "predicted")


def stalls(frame: pd.DataFrame) -> go.Figure:
    """Wall time of each step, one panel a row; a step that does something that not every step does is coloured."""
    rows = list(dict.fromkeys(frame["row"]))
    figure = make_subplots(1, len(rows), subplot_titles=rows, horizontal_spacing=0.06)
    seen: set[str] = set()
    for column, name in enumerate(rows, 1):
        for what, steps in frame[frame["row"] == name].groupby("event"):
            label = what or "other steps"
            figure.add_bar(x=steps["step"].tolist(), y=(steps["step_s"] * 1000).round(2).tolist(), name=label, legendgroup=label,
                           showlegend=label not in seen, marker_color=EVENTS[what], row=1, col=column,
                           hovertemplate="step %{x}: %{y:.1f} ms<extra>" + label + "</extra>")
            seen.add(label)
    figure.update_layout(height=340, margin={"l": 60, "r": 16, "t": 84, "b": 56}, legend={"orientation": "h", "y": -0.25},
                         title={"text": "Step time, tiny model", "x": 0, "xanchor": "left", "font": {"size": 15}})
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="step time, ms", col=1)
    return badge(figure, "measured on this CPU")


def table(cells: Mapping[str, Mapping], counts: Mapping[str, object], quotes: Mapping[str, object]) -> pd.DataFrame:
    """A row's published figure beside ours, and its updates beside its memory."""
    found = []
    for name, cell in cells.items():
        quote, count = quotes.get(name), counts[name]
        held = next(iter(cell["cards"].values()))
        found.append({"row": name, "quoted": quote.figure if quote else "none confirmed", "quoted of": quote.of if quote else "",
                      "quoted from": f"{quote.source} ({quote.by})" if quote else "", "predicted, GiB": held["allocated_bytes"] / GIB,
                      "weights": cell["weights"], "on the host, GiB": cell["host_bytes"] / GIB, "updates": count.mean,
                      "least to most": f"{count.least:,} to {count.most:,}", "trained beside": f"{count.added:,}"})
    return pd.DataFrame(found).set_index("row")


def stall_words(frame: pd.DataFrame) -> list[str]:
    """Of each row: how much longer its uncommon steps take than its others, as a ratio of medians."""
    said = []
    for name, steps in frame.groupby("row", sort=False):
        after = steps[steps["step"] > 0]
        plain = after[after["event"] == ""]["step_s"].median()
        for what, its in after[after["event"] != ""].groupby("event"):
            said.append(f"`{name}`: {what} at every step." if plain != plain else
                        f"`{name}`: a step with a {what} takes {its['step_s'].median() / plain:.2f} times one without "
                        f"(medians of {len(its)} and {sum(after['event'] == '')} steps).")
    return said


def takeaway(cells: Mapping[str, Mapping], counts: Mapping[str, object]) -> str:
    """The least memory of the rows drawn, and the least that still updates every parameter at every step, in Markdown."""
    peak = {name: next(iter(cell["cards"].values()))["allocated_bytes"] / GIB for name, cell in cells.items()}
    order = sorted(peak, key=peak.__getitem__)
    least = order[0]
    words = f"**{least}** needs least of the {len(order)} rows drawn, {peak[least]:.1f} GiB, and updates a parameter " \
            f"{counts[least].mean:,.4g} times in 1,000 steps"
    every = next((name for name in order if counts[name].least == 1000), None)
    if every == least:
        return f"{words}, as often as can be. Predicted."
    rest = f"; the least that updates each at every step is **{every}**, {peak[every]:.1f} GiB" if every else "; none updates each at every step"
    return f"{words}{rest}. Predicted."


def kept(names: Sequence[str], held: Mapping[str, object]) -> dict:
    """Those of `held` that are called `names`."""
    return {name: held[name] for name in names}
