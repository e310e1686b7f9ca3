"""The figures of finished runs, each from a tidy table. Plain plotly: the report, the notebooks and
the batch draw the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..runs.folder import Run
from ..timeline.events import alive_rows
from . import tables
from .style import (
    COLORS,
    CORNER,
    PHASES,
    add_choices,
    add_menu,
    menu,
    new_figure,
    phase_band,
    stacked_area,
    visibility_buttons,
)
from .tables import MIB, SCORINGS
from .takeaways import peak_sentences


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
    figure = new_figure(
        "Peak memory, speed and balanced accuracy",
        480,
        xaxis_title="peak memory of a step, MiB (event meter)",
        yaxis_title="balanced accuracy, 95 % interval over documents",
        showlegend=False,
    )
    choices = [(scoring, where) for scoring in SCORINGS for where in frame["place"].unique()]

    def points(choice: tuple[str, str], visible: bool) -> list[go.Scatter]:
        rows = frame[(frame["scoring"] == choice[0]) & (frame["place"] == choice[1])]
        return [_points(summary, rows.set_index("judge").reindex(summary.index), visible)]

    owners = add_choices(figure, choices, points)
    figure.add_hline(
        0.5,
        line_dash="dot",
        line_width=1,
        annotation_text="chance",
        annotation_position="bottom left",
    )
    return add_menu(figure, [f"{where}: {SCORINGS[name]}" for name, where in choices], owners)


def _points(summary: pd.DataFrame, scores: pd.DataFrame, visible: bool) -> go.Scatter:
    order = summary["peak_mib"].rank(method="first").astype(int)
    # without the rows that train nothing: the speed of a forward alone would stretch the scale
    pace = summary.loc[summary["trainable_parameters"] > 0, "tokens_per_s"]
    return go.Scatter(
        x=summary["peak_mib"],
        y=scores["value"],
        mode="markers+text",
        text=list(summary.index),
        visible=visible,
        textposition=["top center" if rank % 2 else "bottom center" for rank in order],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": scores["high"] - scores["value"],
            "arrayminus": scores["value"] - scores["low"],
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
            zip(summary["tokens_per_s"], scores["low"], scores["high"], scores["n"], strict=True)
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
    figure = new_figure("What is alive at the peak", barmode="stack", yaxis_title="MiB")
    for category, color in COLORS.items():
        rows = frame[frame["category"] == category]
        if len(rows):
            figure.add_bar(
                x=rows["regime"],
                y=rows["mib"],
                name=category,
                marker_color=color,
                hovertemplate="%{x}: %{y:.2f} MiB<extra>" + category + "</extra>",
            )
    summary = tables.summary(runs).query("outcome == 'ok'")
    return figure.add_scatter(
        x=summary["regime"],
        y=summary["process_peak_mib"],
        mode="markers",
        name="process peak (OS)",
        marker={"symbol": "line-ew-open", "size": 20, "color": "#888", "line": {"width": 3}},
        hovertemplate="%{x}: %{y:.2f} MiB<extra>process peak, OS</extra>",
    )


def timelines(runs: Sequence[Run]) -> go.Figure:
    """Live bytes of each run that has a timeline, stacked by category, with the phases below and
    the peak marked with its owners; a menu picks the run, full fine-tuning first."""
    traced = [run for run in runs if run.ok and run.has_timeline]
    traced.sort(key=lambda run: run.name != tables.REFERENCE)
    figure = new_figure(
        "Live bytes through the metered steps",
        540,
        xaxis={"title": "allocation event, in order", "anchor": "y2"},
        yaxis={"title": "MiB", "domain": [0.12, 0.76]},
        hovermode="x",
        yaxis2={"domain": [0, 0.07], "visible": False, "fixedrange": True},
    )
    buttons = visibility_buttons(
        [run.name for run in traced], add_choices(figure, traced, _stack_and_phases)
    )
    for run, button in zip(traced, buttons, strict=True):
        button["args"].append({"annotations": _peak_notes(run)})
    if traced:
        figure.update_layout(
            annotations=_peak_notes(traced[0]),
            updatemenus=[menu(buttons)] if len(traced) > 1 else None,
        )
    return figure


def _stack_and_phases(run: Run, visible: bool) -> list[go.Scatter]:
    frame = tables.curve(run)
    more = {"x": frame["event"], "visible": visible}
    stack = [
        stacked_area(category, color, y=frame[category].round(4), unit="MiB", **more)
        for category, color in COLORS.items()
        if category in frame
    ]
    bands = [
        phase_band(
            phase,
            y=np.where(frame["phase"] == phase, 1.0, np.nan),
            yaxis="y2",
            customdata=frame["step"],
            hovertemplate="step %{customdata}<extra>" + phase + "</extra>",
            **more,
        )
        for phase in dict.fromkeys(frame["phase"])
    ]
    return [*stack, *bands]


def _peak_notes(run: Run) -> list[dict]:
    """An arrow at the peak, and in the corner its largest categories and owners."""
    frame = tables.curve(run)
    peak = frame.loc[frame["live"].idxmax()]
    arrow = {
        "x": peak["event"],
        "y": peak["live"],
        "text": "",
        "showarrow": True,
        "ax": 0,
        "ay": -18,
        "arrowcolor": "#888",
    }
    return [arrow, {**CORNER, "text": "<br>".join(peak_sentences(run))}]


def matrix(runs: Sequence[Run]) -> go.Figure:
    """Balanced accuracy of every run in every place, and of the judges without a model; a menu
    picks the scoring."""
    figure, *others = (matrix_of(runs, scoring) for scoring in SCORINGS)
    for other in others:
        figure.add_trace(other.data[0].update(visible=False))
    return add_menu(figure, list(SCORINGS.values()), range(len(SCORINGS)))


def matrix_of(runs: Sequence[Run], scoring: str) -> go.Figure:
    """One scoring's matrix: rows are runs, then the judges without a model; columns are places."""
    frame = tables.accuracy(runs)
    places, names = list(dict.fromkeys(frame["place"])), [run.name for run in runs if run.ok]
    judges = [judge for judge in dict.fromkeys(frame["judge"]) if judge not in names]
    rows = frame[(frame["scoring"] == scoring) | frame["judge"].isin(judges)]
    cells = {(row.judge, row.place): row for row in rows.itertuples()}
    grid = [[cells.get((name, where)) for where in places] for name in (*names, *judges)]
    figure = new_figure(
        "Balanced accuracy in and out of the training domain",
        120 + 34 * len(grid),
        yaxis={"autorange": "reversed"},
    )
    return figure.add_heatmap(
        x=places,
        y=[*names, *judges],
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


def alive_at(frame: pd.DataFrame, event: int, most: int = 12) -> go.Figure:
    """What is alive after event number `event` of a timeline, grouped by module and category: the
    `most` largest, largest first."""
    sizes = alive_rows(frame, event).groupby(["module", "category"], observed=True)["bytes"].sum()
    alive = sizes.sort_values(ascending=False, kind="stable").head(most)[::-1]
    row = frame.iloc[event]
    figure = new_figure(
        f"Alive after event {event}: {row['live_bytes'] / MIB:.2f} MiB, step {row['step']},"
        f" {row['phase']}",
        420,
        xaxis_title="MiB",
    )
    figure.add_bar(
        y=[f"{module or 'the model'} · {category}" for module, category in alive.index],
        x=alive / MIB,
        orientation="h",
        marker_color=[COLORS[category] for _, category in alive.index],
        hovertemplate="%{y}: %{x:.3f} MiB<extra></extra>",
    )
    return figure.update_yaxes(automargin=True)


def differences(runs: Sequence[Run]) -> go.Figure:
    """Each run minus full fine-tuning on the same items, with the paired interval; a menu picks the
    scoring and the place."""
    frame = tables.against_reference(runs)
    figure = new_figure(
        f"Balanced accuracy minus {tables.REFERENCE}'s, same items",
        460,
        xaxis_title="difference, 95 % interval",
        yaxis={"autorange": "reversed"},
    )
    if frame.empty:
        return figure
    choices = [
        (where, scoring, rows)
        for scoring in SCORINGS
        for where, rows in frame[frame["scoring"] == scoring].groupby("place", sort=False)
    ]
    owners = add_choices(figure, choices, _paired_points)
    figure.add_vline(0, line_width=1, line_dash="dot")
    return add_menu(
        figure, [f"{where}: {SCORINGS[scoring]}" for where, scoring, _ in choices], owners
    )


def _paired_points(choice: tuple[str, str, pd.DataFrame], visible: bool) -> list[go.Scatter]:
    rows = choice[-1]
    return [
        go.Scatter(
            x=rows["difference"],
            y=rows["regime"],
            mode="markers",
            visible=visible,
            showlegend=False,
            marker={"size": 10, "color": "#4e79a7"},
            customdata=rows[["holm_p", "n"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rows["high"] - rows["difference"],
                "arrayminus": rows["difference"] - rows["low"],
            },
            hovertemplate=(
                "%{y}: %{x:+.3f}, Holm p = %{customdata[0]:.3g}, n ="
                " %{customdata[1]}<extra></extra>"
            ),
        )
    ]


def speed(runs: Sequence[Run]) -> go.Figure:
    """Median time of a step by phase."""
    frame = tables.summary(runs).query("outcome == 'ok'")
    figure = new_figure("Time of a step", barmode="stack", yaxis_title="ms, median")
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
    figure = new_figure(
        "Training loss, mean of ten steps", xaxis_title="step", yaxis_title="nats a labelled token"
    )
    for run in (run for run in runs if run.ok):
        smooth = run.steps["loss"].rolling(10, min_periods=1).mean().round(4)
        figure.add_scatter(x=run.steps["step"], y=smooth, name=run.name, mode="lines")
    return figure
