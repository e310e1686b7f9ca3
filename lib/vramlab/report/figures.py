"""The figures, each from a tidy table. Plain plotly: the report, the notebooks and the batch draw
the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from ..runs.folder import Run
from ..timeline.events import alive_rows
from . import tables

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
PHASES = {
    "init": "#8c8c8c",
    "forward": "#6baed6",
    "backward": "#fd8d3c",
    "recompute": "#fdd0a2",
    "update": "#9e9ac8",
    "eval": "#74c476",
}
SCORINGS = {"yesno": "yes/no answer", "likelihood": "likelihood of the claim"}
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}


def _figure(title: str, height: int = 440, **layout) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        height=height,
        margin={"l": 60, "r": 16, "t": 48, "b": 56},
        **layout,
        legend={"orientation": "h", "y": -0.2, "traceorder": "normal"},
    )
    return figure


def _menu(buttons: list[dict]) -> list[dict]:
    return [
        {
            "type": "dropdown",
            "buttons": buttons,
            "x": 1,
            "xanchor": "right",
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "#e8e8e8",
            "font": {"color": "#222"},
        }
    ]


def trade_off(runs: Sequence[Run]) -> go.Figure:
    """Peak memory against balanced accuracy, coloured by speed; a menu picks where and how the
    accuracy is measured."""
    summary = (
        tables.summary(runs)
        .query("outcome == 'ok'")
        .dropna(subset=["peak_mib"])
        .set_index("regime")
    )
    frame = tables.accuracy(runs)
    figure = _figure(
        "Peak memory, speed and balanced accuracy",
        480,
        xaxis_title="peak memory of a step, MiB (event meter)",
        yaxis_title="balanced accuracy, 95 % interval over documents",
        showlegend=False,
    )
    places, buttons = list(dict.fromkeys(frame["place"])), []
    choices = [(where, scoring) for scoring in SCORINGS for where in places]
    for index, (where, scoring) in enumerate(choices):
        cell = (
            frame[(frame["place"] == where) & (frame["scoring"] == scoring)]
            .set_index("judge")
            .reindex(summary.index)
        )
        figure.add_trace(_points(summary, cell, visible=index == 0))
        buttons.append(
            {
                "label": f"{where}: {SCORINGS[scoring]}",
                "method": "update",
                "args": [{"visible": [i == index for i in range(len(choices))]}],
            }
        )
    figure.add_hline(
        0.5,
        line_dash="dot",
        line_width=1,
        annotation_text="chance",
        annotation_position="bottom left",
    )
    figure.update_layout(updatemenus=_menu(buttons))
    return figure


def _points(summary: pd.DataFrame, cell: pd.DataFrame, visible: bool) -> go.Scatter:
    order = summary["peak_mib"].rank(method="first").astype(int)
    pace = summary.loc[
        summary["trainable_parameters"] > 0, "tokens_per_s"
    ]  # a forward alone would stretch the scale
    return go.Scatter(
        x=summary["peak_mib"],
        y=cell["value"],
        mode="markers+text",
        text=list(summary.index),
        visible=visible,
        textposition=["top center" if rank % 2 else "bottom center" for rank in order],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": cell["high"] - cell["value"],
            "arrayminus": cell["value"] - cell["low"],
            "thickness": 1,
            "width": 3,
        },
        marker={
            "size": 13,
            "color": summary["tokens_per_s"],
            "colorscale": "Viridis",
            "line": {"width": 1, "color": "#fff"},
            "cmin": pace.min(),
            "cmax": pace.max(),
            "colorbar": {
                "title": {"text": "tokens/s", "side": "right"},
                "thickness": 10,
                "len": 0.8,
            },
        },
        customdata=list(
            zip(summary["tokens_per_s"], cell["low"], cell["high"], cell["n"], strict=True)
        ),
        hovertemplate=(
            "%{text}<br>%{x:.1f} MiB<br>%{customdata[0]:,.0f} tokens/s<br>balanced accuracy"
            " %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}], n ="
            " %{customdata[3]}<extra></extra>"
        ),
    )


def ledger(runs: Sequence[Run]) -> go.Figure:
    """What is alive at each run's peak, by category."""
    frame = tables.ledger(runs)
    figure = _figure("What is alive at the peak", barmode="stack", yaxis_title="MiB")
    for category in [c for c in COLORS if c in set(frame["category"])]:
        cell = frame[frame["category"] == category]
        figure.add_bar(
            x=cell["regime"],
            y=cell["mib"],
            name=category,
            marker_color=COLORS[category],
            hovertemplate="%{x}: %{y:.2f} MiB<extra>" + category + "</extra>",
        )
    summary = tables.summary(runs).query("outcome == 'ok'")
    figure.add_scatter(
        x=summary["regime"],
        y=summary["process_peak_mib"],
        mode="markers",
        name="process peak (OS)",
        marker={"symbol": "line-ew-open", "size": 20, "color": "#888", "line": {"width": 3}},
        hovertemplate="%{x}: %{y:.2f} MiB<extra>process peak, OS</extra>",
    )
    return figure


def timeline(run: Run) -> go.Figure:
    """One run's live bytes, stacked by category, phases below, the peak marked with its owners."""
    return timelines([run])


def timelines(runs: Sequence[Run]) -> go.Figure:
    """The timeline of any of the runs, picked from a menu."""
    traced = [run for run in runs if run.ok and run.has_timeline]
    shown = sorted(traced, key=lambda run: run.name != tables.REFERENCE)
    figure = _figure(
        "Live bytes through the metered steps",
        540,
        xaxis={"title": "allocation event, in order", "anchor": "y2"},
        yaxis={"title": "MiB", "domain": [0.12, 0.76]},
        hovermode="x",
        yaxis2={"domain": [0, 0.07], "visible": False, "fixedrange": True},
    )
    owners, buttons = [], []
    for index, run in enumerate(shown):
        traces = _stack(run, visible=index == 0)
        figure.add_traces(traces)
        owners += [index] * len(traces)
    for index, run in enumerate(shown):
        buttons.append(
            {
                "label": run.name,
                "method": "update",
                "args": [
                    {"visible": [owner == index for owner in owners]},
                    {"annotations": _peak_notes(run)},
                ],
            }
        )
    if shown:
        figure.update_layout(
            annotations=_peak_notes(shown[0]),
            updatemenus=_menu(buttons) if len(shown) > 1 else None,
        )
    return figure


def _stack(run: Run, visible: bool) -> list[go.Scatter]:
    frame = tables.curve(run)
    traces = [
        go.Scatter(
            x=frame["event"],
            y=frame[category].round(4),
            name=category,
            visible=visible,
            mode="lines",
            line={"width": 0, "shape": "hv"},
            fillcolor=COLORS[category],
            stackgroup="bytes",
            hovertemplate="%{y:.2f} MiB<extra>" + category + "</extra>",
        )
        for category in COLORS
        if category in frame
    ]
    for phase in dict.fromkeys(frame["phase"]):
        inside = (frame["phase"] == phase).astype(float)
        traces.append(
            go.Scatter(
                x=frame["event"],
                y=inside.where(inside > 0),
                name=phase,
                visible=visible,
                yaxis="y2",
                mode="markers",
                marker={"color": PHASES[phase], "symbol": "square", "size": 9},
                customdata=frame["step"],
                hovertemplate="step %{customdata}<extra>" + phase + "</extra>",
            )
        )
    return traces


def _peak_notes(run: Run) -> list[dict]:
    """An arrow at the peak, and above the plot what it is made of."""
    frame = tables.curve(run)
    at = frame["live"].idxmax()
    arrow = {
        "x": frame["event"][at],
        "y": frame["live"][at],
        "text": "",
        "showarrow": True,
        "ax": 0,
        "ay": -18,
        "arrowcolor": "#888",
    }
    words = {
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "top",
        "showarrow": False,
        "align": "left",
        "font": {"size": 11},
        "text": "<br>".join(peak_words(run)),
    }
    return [arrow, words]


def peak_words(run: Run) -> list[str]:
    """The peak, its largest categories and its largest owners, a line each."""
    peak = run.result["peak"]
    parts = ", ".join(
        f"{category} {size / tables.MIB:.1f}"
        for category, size in list(peak["categories"].items())[:3]
    )
    owners = [f"{_owner(owner)} {owner['bytes'] / tables.MIB:.1f}" for owner in peak["owners"][:3]]
    return [
        (
            f"<b>peak {peak['peak_bytes'] / tables.MIB:.1f} MiB, {peak['phase']} of step"
            f" {peak['step']}</b>"
        ),
        parts,
        *(f"largest: {owner}" if owner is owners[0] else owner for owner in owners),
    ]


def _owner(owner: dict) -> str:
    """A module's weight by its name; anything else by module and operation."""
    op = owner["op"].split(".")[1] if "." in owner["op"] else ""
    return f"{owner['module'] or 'the loss'} {op} ({owner['category']})".replace("  ", " ")


def matrix(runs: Sequence[Run]) -> go.Figure:
    """Balanced accuracy of every run in every place, and of the judges without a model; a menu
    picks the scoring."""
    figures = [matrix_of(runs, scoring) for scoring in SCORINGS]
    for other in figures[1:]:
        figures[0].add_trace(other.data[0].update(visible=False))
    figures[0].update_layout(
        updatemenus=_menu(
            [
                {
                    "label": label,
                    "method": "update",
                    "args": [{"visible": [i == index for i in range(len(SCORINGS))]}],
                }
                for index, label in enumerate(SCORINGS.values())
            ]
        )
    )
    return figures[0]


def matrix_of(runs: Sequence[Run], scoring: str) -> go.Figure:
    """One scoring's matrix: rows are runs, then the judges without a model; columns are places."""
    frame = tables.accuracy(runs)
    places, names = list(dict.fromkeys(frame["place"])), [run.name for run in runs if run.ok]
    bars = [judge for judge in dict.fromkeys(frame["judge"]) if judge not in names]
    figure = _figure(
        "Balanced accuracy in and out of the training domain",
        120 + 34 * (len(names) + len(bars)),
        yaxis={"autorange": "reversed"},
    )
    rows = frame[(frame["scoring"] == scoring) | frame["judge"].isin(bars)]
    cells = {(row.judge, row.place): row for row in rows.itertuples()}
    grid = [[cells.get((judge, where)) for where in places] for judge in (*names, *bars)]
    figure.add_heatmap(
        x=places,
        y=[*names, *bars],
        zmin=0.1,
        zmax=0.9,
        colorscale="RdBu",
        xgap=2,
        ygap=2,
        showscale=False,
        z=[[None if cell is None else round(cell.value, 4) for cell in row] for row in grid],
        text=[["" if cell is None else f"{cell.value:.2f}" for cell in row] for row in grid],
        texttemplate="%{text}",
        customdata=[
            [(0, 0, 0) if cell is None else (cell.low, cell.high, cell.n) for cell in row]
            for row in grid
        ],
        hovertemplate=(
            "%{y}, %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n ="
            " %{customdata[2]}<extra></extra>"
        ),
    )
    return figure


def alive_at(frame: pd.DataFrame, event: int, most: int = 12) -> go.Figure:
    """What is alive after event number `event` of a timeline, grouped by module and category,
    largest first."""
    owners = alive_rows(frame, event).groupby(["module", "category"], observed=True)["bytes"]
    alive = owners.sum().sort_values(ascending=False).head(most)[::-1]
    at = frame.iloc[event]
    figure = _figure(
        f"Alive after event {event}: {at['live_bytes'] / tables.MIB:.2f} MiB, step {at['step']},"
        f" {at['phase']}",
        420,
        xaxis_title="MiB",
    )
    figure.add_bar(
        y=[f"{module or 'the model'} · {category}" for module, category in alive.index],
        x=alive / tables.MIB,
        orientation="h",
        marker_color=[COLORS[category] for _, category in alive.index],
        hovertemplate="%{y}: %{x:.3f} MiB<extra></extra>",
    )
    figure.update_yaxes(automargin=True)
    return figure


def differences(runs: Sequence[Run]) -> go.Figure:
    """Each run minus full fine-tuning on the same items, with the paired interval."""
    frame = tables.against_reference(runs)
    figure = _figure(
        f"Balanced accuracy minus {tables.REFERENCE}'s, same items",
        460,
        xaxis_title="difference, 95 % interval",
        yaxis={"autorange": "reversed"},
    )
    if not len(frame):
        return figure
    buttons, count = [], 0
    for scoring in SCORINGS:
        for where in dict.fromkeys(frame["place"]):
            cell = frame[(frame["scoring"] == scoring) & (frame["place"] == where)]
            figure.add_scatter(
                x=cell["difference"],
                y=cell["regime"],
                mode="markers",
                visible=count == 0,
                showlegend=False,
                marker={"size": 10, "color": "#4e79a7"},
                customdata=cell[["holm_p", "n"]],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": cell["high"] - cell["difference"],
                    "arrayminus": cell["difference"] - cell["low"],
                },
                hovertemplate=(
                    "%{y}: %{x:+.3f}, Holm p = %{customdata[0]:.3g}, n ="
                    " %{customdata[1]}<extra></extra>"
                ),
            )
            buttons.append({"label": f"{where}: {SCORINGS[scoring]}", "count": count})
            count += 1
    for button in buttons:
        index = button.pop("count")
        button |= {"method": "update", "args": [{"visible": [i == index for i in range(count)]}]}
    figure.add_vline(0, line_width=1, line_dash="dot")
    figure.update_layout(updatemenus=_menu(buttons))
    return figure


def speed(runs: Sequence[Run]) -> go.Figure:
    """Median time of a step by phase."""
    frame = tables.summary(runs).query("outcome == 'ok'")
    figure = _figure("Time of a step", barmode="stack", yaxis_title="ms, median")
    for phase in ("forward", "backward", "update"):
        figure.add_bar(
            x=frame["regime"],
            y=frame[f"{phase}_ms"],
            name=phase,
            marker_color=PHASES[phase],
            hovertemplate="%{x}: %{y:.1f} ms<extra>" + phase + "</extra>",
        )
    return figure


def losses(runs: Sequence[Run]) -> go.Figure:
    """Training loss, mean of ten steps."""
    figure = _figure(
        "Training loss, mean of ten steps", xaxis_title="step", yaxis_title="nats a labelled token"
    )
    for run in (run for run in runs if run.ok):
        smooth = run.steps["loss"].rolling(10, min_periods=1).mean().round(4)
        figure.add_scatter(x=run.steps["step"], y=smooth, name=run.name, mode="lines")
    return figure


def dressed(figure: go.Figure, title: str, kind: str, plot_px: int) -> go.Figure:
    """Margins and a legend that keep their distance at any height, and in the corner the kind of
    the figure's numbers."""
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
