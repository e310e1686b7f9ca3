"""The figures and tables of the study of the regimes, each from plain data of `regimes`. Each
figure says whether its numbers are predicted or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vramlab.report.forecast_tables import GIB
from vramlab.report.rank_figures import RESERVED
from vramlab.report.style import LIMIT_LINE, PREDICTED_COLORS, finish_figure

EVENTS = {
    "": "#bab0ac",
    "new projection": "#e15759",
    "switch": "#4e79a7",
    "anchor": "#b07aa1",
    "probe": "#76b7b2",
}
FAR = 4
"""A limit beyond this many times the longest bar would flatten all bars, so only the legend has
it."""


def outcome(cell: Mapping) -> Mapping:
    """The cell's outcome on its one card."""
    return next(iter(cell["cards"].values()))


def unit(cells: Mapping[str, Mapping]) -> tuple[str, int]:
    """(name, bytes) of the unit: GiB, or MiB where nothing reaches 0.1 GiB."""
    return (
        ("GiB", GIB)
        if max(outcome(cell)["reserved_bytes"] for cell in cells.values()) >= GIB / 10
        else ("MiB", 2**20)
    )


def ledger(cells: Mapping[str, Mapping], counts: Mapping) -> go.Figure:
    """What is alive at each row's peak, with the card's limit; beside it how often a parameter is
    updated."""
    names, (word, size) = list(cells), unit(cells)
    figure = make_subplots(
        1, 2, shared_yaxes=True, column_widths=[0.74, 0.26], horizontal_spacing=0.03
    )
    for category, color in PREDICTED_COLORS.items():
        sizes = [cell["ledger"].get(category, 0) for cell in cells.values()]
        if any(
            size_bytes >= cell["requested_bytes"] / 1000
            for size_bytes, cell in zip(sizes, cells.values(), strict=True)
        ):
            figure.add_bar(
                x=[round(size_bytes / size, 4) for size_bytes in sizes],
                y=names,
                orientation="h",
                name=category,
                marker_color=color,
                hovertemplate=f"%{{y}}: %{{x:.3f}} {word}<extra>{category}</extra>",
                row=1,
                col=1,
            )
    reserved = [outcome(cell)["reserved_bytes"] / size for cell in cells.values()]
    figure.add_scatter(
        x=reserved,
        y=names,
        mode="markers",
        name=RESERVED,
        row=1,
        col=1,
        marker={"symbol": "line-ns-open", "size": 18, "color": "#555", "line": {"width": 3}},
        hovertemplate=f"%{{y}}: %{{x:.3f}} {word} reserved<extra>predicted</extra>",
    )
    _limit(figure, next(iter(cells.values())), max(reserved), size, word)
    mean = [counts[name].mean for name in names]
    figure.add_bar(
        x=mean,
        y=names,
        orientation="h",
        showlegend=False,
        marker_color="#9c9c9c",
        row=1,
        col=2,
        text=[f"{value:,.4g}" for value in mean],
        hovertemplate="%{y}: %{x:.4g}<extra>updates</extra>",
        textposition=["inside" if value > 500 else "outside" for value in mean],
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text=f"{word} at the peak", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(
        title_text="updates a parameter, 1,000 steps", range=[0, 1080], row=1, col=2
    )
    figure.update_layout(barmode="stack")
    return finish_figure(
        figure, "What is alive at the peak, and what it buys", "predicted", 40 + 36 * len(names)
    )


def _limit(figure: go.Figure, cell: Mapping, longest: float, size: int, word: str) -> None:
    """The card's limit as a line, or in the legend only."""
    limit = cell["capacity_bytes"] / size
    far = limit > FAR * longest
    name = f"limit: {cell['card']}, {limit:,.1f} {word}" + (", off the scale" if far else "")
    figure.add_scatter(
        x=[None if far else limit] * 2,
        y=[0, 1],
        mode="lines",
        name=name,
        yaxis="y3",
        xaxis="x",
        line=LIMIT_LINE,
        hovertemplate="%{x:.2f}<extra>card</extra>",
    )
    figure.update_layout(
        yaxis3={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    )


def stalls(frame: pd.DataFrame) -> go.Figure:
    """Wall time of each step, one panel a row; a step that does something that not every step does
    is coloured."""
    rows = list(dict.fromkeys(frame["row"]))
    figure = make_subplots(1, len(rows), subplot_titles=rows, horizontal_spacing=0.06)
    labelled: set[str] = set()
    for column, name in enumerate(rows, 1):
        for event, steps in frame[frame["row"] == name].groupby("event"):
            label = event or "other steps"
            figure.add_bar(
                x=steps["step"].tolist(),
                y=(steps["step_s"] * 1000).round(2).tolist(),
                name=label,
                legendgroup=label,
                showlegend=label not in labelled,
                marker_color=EVENTS[event],
                row=1,
                col=column,
                hovertemplate="step %{x}: %{y:.1f} ms<extra>" + label + "</extra>",
            )
            labelled.add(label)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="step time, ms", col=1)
    figure.update_annotations(font_size=13)
    return finish_figure(figure, "Step time, tiny model", "measured on this CPU", 170)


def table(cells: Mapping[str, Mapping], counts: Mapping, quotes: Mapping) -> pd.DataFrame:
    """A row's published figure beside ours, and its updates beside its memory."""
    rows, (word, size) = [], unit(cells)
    for name, cell in cells.items():
        quote, count = quotes.get(name), counts[name]
        rows.append(
            {
                "row": name,
                "quoted": quote.figure if quote else "none confirmed",
                "quoted of": quote.of if quote else "",
                "quoted from": f"{quote.source} ({quote.by})" if quote else "",
                f"predicted, {word}": f"{outcome(cell)['allocated_bytes'] / size:.2f}",
                f"host, {word}": f"{cell['host_bytes'] / size:.2f}",
                "weights": cell["weights"],
                "updates": f"{count.mean:,.4g}",
                "least to most": f"{count.least:,} to {count.most:,}",
                "trained beside": f"{count.added:,}",
            }
        )
    return pd.DataFrame(rows).set_index("row").rename_axis(None)


def stall_words(frame: pd.DataFrame) -> list[str]:
    """For each row: how many times as long an uncommon step takes as the common ones between it and
    the next. Within a turn the same weights train, so only the switch differs."""
    sentences = []
    for name, steps in frame.groupby("row", sort=False):
        times, ratios = steps["step_s"] * 1000, {}
        for _, turn in steps[steps["step"] > 0].groupby((steps["event"] != "").cumsum()):
            first, after = turn.iloc[0], turn.iloc[1:]
            if first["event"] and len(after):
                ratios.setdefault(first["event"], []).append(
                    first["step_s"] / after["step_s"].median()
                )
        sentences += [
            f"`{name}`, {event}: {pd.Series(event_ratios).median():.2f} times as long as the steps"
            f" after it (median of {len(event_ratios)})."
            for event, event_ratios in ratios.items()
        ]
        if not ratios:
            sentences.append(
                f"`{name}`: {steps['event'].iloc[-1]} at every step, {times.min():.0f} to"
                f" {times.max():.0f} ms."
            )
    return sentences


def takeaway(cells: Mapping[str, Mapping], counts: Mapping) -> str:
    """The least memory of the rows drawn, and the least that still updates every parameter at every
    step, in Markdown."""
    word, size = unit(cells)
    peak = {name: outcome(cell)["allocated_bytes"] / size for name, cell in cells.items()}
    order = sorted(peak, key=peak.__getitem__)
    least, every = order[0], next((name for name in order if counts[name].least == 1000), None)
    sentence = (
        f"**{least}** needs least of the {len(order)} rows drawn, {peak[least]:.1f} {word}, and"
        f" updates a parameter {counts[least].mean:,.4g} times in 1,000 steps"
    )
    if every == least:
        return f"{sentence}, as often as can be. Predicted."
    rest = (
        f"the least that updates each at every step is **{every}**, {peak[every]:.1f} {word}"
        if every
        else "none updates each at every step"
    )
    return f"{sentence}; {rest}. Predicted."


def kept(names: Sequence[str], by_row: Mapping) -> dict:
    """The rows called `names` of `by_row`."""
    return {name: by_row[name] for name in names}
