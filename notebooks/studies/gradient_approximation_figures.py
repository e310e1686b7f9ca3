"""The chapters of the study of gradient approximation: its table and its plots, from figures and
records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from gradient_approximation import COMPARED, TABLE, probes_of, rows_of, seconds
from vramlab.report.style import finish_figure, interval_bars
from vramlab.runs.parameters import KNOWN_PARAMETERS
from vramlab.studies.estimates import Figure, NotRun
from vramlab.studies.study import Lab

COLORS = {
    "full": "#e15759",
    "literal": "#4e79a7",
    "residual": "#59a14f",
    "identity": "#bab0ac",
    "random": "#79706e",
    "anchored identity": "#b07aa1",
    "lora": "#f28e2b",
}
LEARNED = "learned on this CPU; bars: 95 %, seeds and items"
SHOWN_SITES = 12
"""Where a model has more sites, the plot of cosines shows about this many, evenly spaced."""


def comparison(study: Lab) -> pd.DataFrame:
    """The paper's table: parameters updated, time against full, accuracy; and what it leaves
    out."""
    rows = []
    for name in study.plan.settings["rows"]:
        row = {
            "row": name,
            "trained, % of all": _percent(study.figures.get(f"trained.{name}")),
            "time, of full's": _words(study.figures.get(f"time.{name}.{_shortest(study)}")),
            "FLOPs at 7B, of full's": _words(study.figures.get(f"flops.{name}")),
            "GiB at 7B": _words(study.figures.get(f"peak.{name}.512")),
        }
        row |= {
            f"balanced accuracy, shift {shift}": _percent(
                study.figures.get(f"accuracy.{name}.{shift}")
            )
            for shift in study.plan.settings["places"]
        }
        rows.append(
            {
                **row,
                "accuracy": _percent(study.figures.get(f"right.{name}")),
                "cosine": _words(study.figures.get(f"cosine.{name}")),
            }
        )
    return pd.DataFrame(rows).set_index("row").rename_axis(None)


def _shortest(study: Lab) -> int:
    return (
        int(min(seconds(study).index.get_level_values("seq"), default=0))
        if len(seconds(study))
        else 0
    )


def _words(figure: Figure | None) -> str:
    """Three digits, no unit: the column's head has it."""
    if figure is None:
        return ""
    return f"{figure.value:.3g}" + (
        f" [{figure.low:.3g}, {figure.high:.3g}]" if figure.low == figure.low else ""
    )


def _percent(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure.value:.1f}" + (
        f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]" if figure.low == figure.low else ""
    )


def pairs(study: Lab) -> pd.DataFrame:
    """Every comparison that was named before the runs, in points of balanced accuracy."""
    rows = [
        {
            "comparison": pair.name,
            "points": _percent(figure),
            "p": f"{figure.p:.2g}",
            "p, Holm": f"{figure.p_holm:.2g}",
            "seeds": figure.seeds,
            "items": figure.n,
            "equal": figure.equal,
        }
        for pair in study.plan.pairs
        if (figure := study.figures.get(f"difference.{pair.name}"))
    ]
    return pd.DataFrame(rows)


def against(
    study: Lab,
    prefix: str,
    names: Sequence[str],
    title: str,
    x: str,
    first: Mapping[str, Figure] | None = None,
    y: str = "balanced accuracy",
) -> go.Figure | None:
    """Estimates `<prefix>.<name>.<number>` against their number, one line a name. `first` has more
    of them, by `<name>.<number>`."""
    figure = go.Figure()
    estimates = {
        **{
            name.removeprefix(f"{prefix}."): estimate
            for name, estimate in study.figures.items()
            if name.startswith(f"{prefix}.")
        },
        **(first or {}),
    }
    for name in names:
        points = sorted(
            (int(key.rpartition(".")[2]), estimate)
            for key, estimate in estimates.items()
            if key.rpartition(".")[0] == name
        )
        if points:
            figure.add_scatter(
                x=[at for at, _ in points],
                y=[round(estimate.value, 4) for _, estimate in points],
                name=name,
                mode="lines+markers",
                line={"color": COLORS[name]},
                error_y=interval_bars([estimate for _, estimate in points], thickness=1),
                hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{name}</extra>",
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return finish_figure(figure, title, LEARNED, 280)


def baselines(
    study: Lab, figure: go.Figure | None, names: Sequence[str], prefix: str = "accuracy.{}.none"
) -> go.Figure | None:
    """Rows that have no such axis, as level lines."""
    for name in names:
        estimate = study.figures.get(prefix.format(name))
        if figure is not None and estimate:
            figure.add_hline(
                y=estimate.value,
                line={"color": COLORS[name], "dash": "dash"},
                annotation_text=name,
                annotation_font_size=11,
            )
    return figure


def depth(study: Lab) -> tuple[go.Figure | None, go.Figure | None]:
    """Accuracy and cosine against the layers of the approximator."""
    built, level = tuple(study.plan.settings["depths"]), ("identity", "random")
    accuracy = against(study, "depth", built, "Depth of the approximator", "layers")
    cosine = against(
        study,
        "depth_cosine",
        built,
        "Depth, and how near the guess is to the gradient",
        "layers",
        y="cosine",
    )
    return baselines(study, accuracy, level), baselines(study, cosine, level, "cosine.{}")


def grid(study: Lab, arm: str, title: str, x: str) -> go.Figure | None:
    """One of the arms that vary one parameter, together with the table's runs at their value."""
    parameter = study.plan.settings["grids"][arm]
    at = study.plan.arms[TABLE][0].params.get(parameter, KNOWN_PARAMETERS[parameter])
    from_table = {
        f"{name}.{at}": estimate
        for name in COMPARED
        if (estimate := study.figures.get(f"accuracy.{name}.none"))
    }
    return against(study, arm, COMPARED, title, x, from_table)


def length(study: Lab, arm: str = "length") -> go.Figure | None:
    """Accuracy against the tokens of a training sequence."""
    parameter = study.plan.settings["grids"][arm]
    figure = grid(
        study, arm, "Longer passages, as many tokens a step", "tokens of a training sequence, mean"
    )
    if figure is not None:
        tokens = {}
        for _, rows in study.records.runs[study.records.runs["arm"].isin([TABLE, arm])].groupby(
            parameter
        ):
            tokens_seen = (
                study.records.steps[study.records.steps["run_id"].isin(rows["run_id"])]
                .groupby("run_id")["tokens_seen"]
                .max()
            )
            runs = rows.drop_duplicates("run_id").set_index("run_id")
            tokens[int(rows[parameter].iloc[0])] = (
                tokens_seen / (runs["steps"] * runs["batch_size"])
            ).mean()
        figure.update_xaxes(
            tickvals=list(tokens), ticktext=[f"{count:.0f}" for count in tokens.values()]
        )
    return figure


def shift(study: Lab) -> go.Figure | None:
    """Accuracy by how far the questions are from the training data."""
    figure, places = go.Figure(), list(study.plan.settings["places"])
    for name in ("zero_shot", *COMPARED, "lora"):
        points = [
            (place, estimate)
            for place in places
            if (estimate := study.figures.get(f"accuracy.{name}.{place}"))
        ]
        if points:
            figure.add_bar(
                x=[place for place, _ in points],
                y=[round(estimate.value, 4) for _, estimate in points],
                name=name,
                marker_color=COLORS.get(name, "#d4a6c8"),
                error_y=interval_bars([estimate for _, estimate in points], thickness=1),
            )
    if not figure.data:
        return None
    figure.update_layout(barmode="group")
    figure.update_xaxes(title_text="shift")
    figure.update_yaxes(title_text="balanced accuracy", range=[0.4, 1])
    return finish_figure(figure, "New passages, new words, another domain", LEARNED, 280)


def curves(study: Lab) -> go.Figure | None:
    """Training loss at equal tokens and at equal seconds, the mean over seeds of a moving mean of
    five kept steps."""
    figure = make_subplots(
        1,
        2,
        subplot_titles=["equal tokens", "equal seconds"],
        shared_yaxes=True,
        horizontal_spacing=0.04,
    )
    for name in (*COMPARED, "lora"):
        try:
            rows = rows_of(study, TABLE, name)
        except NotRun:
            continue
        steps = study.records.steps
        means = (
            steps[steps["run_id"].isin(rows["run_id"])]
            .groupby("step")[["loss", "tokens_seen", "t_s"]]
            .mean()
        )
        for column, at in enumerate(("tokens_seen", "t_s"), 1):
            figure.add_scatter(
                x=means[at].round(3).tolist(),
                y=means["loss"].rolling(5, min_periods=1).mean().round(4).tolist(),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": COLORS[name]},
                row=1,
                col=column,
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text="tokens", col=1)
    figure.update_xaxes(title_text="seconds of training", col=2)
    figure.update_yaxes(title_text="training loss", col=1)
    return finish_figure(figure, "Loss", "learned and measured on this CPU, mean of seeds", 260)


def cosines(study: Lab) -> go.Figure | None:
    """Cosine of guess and true gradient by site, bottom to top, and over training."""
    figure = make_subplots(
        1,
        2,
        subplot_titles=["by site, bottom to top", "over training, all sites"],
        horizontal_spacing=0.1,
    )
    for name in ("residual", "anchored identity", "identity", "random", "literal"):
        try:
            probes = probes_of(study, rows_of(study, TABLE, name))
        except NotRun:
            continue
        line = {
            "name": name,
            "legendgroup": name,
            "line": {"color": COLORS[name]},
            "mode": "lines+markers",
        }
        sites = (
            probes[probes["site"].str.startswith("layers.")]
            .groupby("site", sort=False)["cosine"]
            .mean()
        )
        sites = sites.iloc[:: max(1, -(-len(sites) // SHOWN_SITES))]
        figure.add_scatter(
            x=sites.index.str.removeprefix("layers.").tolist(),
            y=sites.round(4).tolist(),
            showlegend=False,
            row=1,
            col=1,
            **line,
        )
        steps = probes[probes["site"] == "all"].groupby("step")["cosine"].mean()
        figure.add_scatter(x=steps.index.tolist(), y=steps.round(4).tolist(), row=1, col=2, **line)
    if not figure.data:
        return None
    figure.update_xaxes(title_text="step", col=2)
    figure.update_yaxes(title_text="cosine", range=[-0.2, 1.05])
    return finish_figure(
        figure,
        "How near the guess is to the gradient",
        "measured on the batch of the step, mean of seeds",
        280,
    )


def times(study: Lab) -> go.Figure | None:
    """Step time over full's against length."""
    figure = go.Figure()
    for name in (*COMPARED, "lora"):
        points = sorted(
            (int(key.rpartition(".")[2]), estimate)
            for key, estimate in study.figures.items()
            if key.rpartition(".")[0] == f"time.{name}"
        )
        if points:
            figure.add_scatter(
                x=[at for at, _ in points],
                y=[round(estimate.value, 4) for _, estimate in points],
                name=name,
                mode="lines+markers",
                line={"color": COLORS[name]},
                error_y=interval_bars([estimate for _, estimate in points], thickness=1),
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text="tokens of a row")
    figure.update_yaxes(title_text="step time, of full's", rangemode="tozero")
    return finish_figure(
        figure, "Step time against length", "measured on this CPU; bars: 95 %, repeats", 260
    )


def memory(study: Lab) -> pd.DataFrame:
    """Forecast of a step at 7B, GiB, by length."""
    rows = [
        {"row": name, "tokens": int(seq), "GiB": estimate.value}
        for key, estimate in study.figures.items()
        if key.startswith("peak.")
        for _, name, seq in [key.split(".")]
    ]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).pivot(index="row", columns="tokens", values="GiB").round(2)


def answer(study: Lab) -> str:
    """The study in one paragraph, from the figures that there are."""
    figures, sentences = study.figures, []
    for name in ("literal", "residual"):
        if f"difference.{name} against full" in figures and f"accuracy.{name}.none" in figures:
            sentences.append(
                f"`{name}` reaches {_percent(figures[f'accuracy.{name}.none'])} % against full"
                f" fine-tuning's {_percent(figures['accuracy.full.none'])} on as many tokens, and"
                f" the base's own {_percent(figures.get('accuracy.zero_shot.none'))}"
            )
        if f"flops.{name}" in figures:
            sentences.append(
                f"its step is {figures[f'flops.{name}'].value:.2f} of full's work at 7B, where"
                f" identity feedback, without a module, is {figures['flops.identity'].value:.2f}"
            )
        if f"cosine.{name}" in figures:
            sentences.append(
                f"its guess has a cosine of {_words(figures[f'cosine.{name}'])} with the gradient"
            )
    return "; ".join(sentences) + ("." if sentences else "")
