"""The chapters of the study of gradient approximation: its table and its plots, from figures and
records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from gradient_approximation import COMPARED, TABLE, probes_of, rows_of, seconds
from vramlab.report.style import finish_figure
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
"""Sites of a cosine's plot, evenly, where a model has more."""


def comparison(lab: Lab) -> pd.DataFrame:
    """The paper's table: parameters updated, time against full, accuracy; and what it leaves
    out."""
    found = []
    for name in lab.plan.settings["rows"]:
        said = {
            "row": name,
            "trained, % of all": _percent(lab.figures.get(f"trained.{name}")),
            "time, of full's": _words(lab.figures.get(f"time.{name}.{_shortest(lab)}")),
            "FLOPs at 7B, of full's": _words(lab.figures.get(f"flops.{name}")),
            "GiB at 7B": _words(lab.figures.get(f"peak.{name}.512")),
        }
        said |= {
            f"balanced accuracy, shift {shift}": _percent(
                lab.figures.get(f"accuracy.{name}.{shift}")
            )
            for shift in lab.plan.settings["places"]
        }
        found.append(
            {
                **said,
                "accuracy": _percent(lab.figures.get(f"right.{name}")),
                "cosine": _words(lab.figures.get(f"cosine.{name}")),
            }
        )
    return pd.DataFrame(found).set_index("row").rename_axis(None)


def _shortest(lab: Lab) -> int:
    return (
        int(min(seconds(lab).index.get_level_values("seq"), default=0)) if len(seconds(lab)) else 0
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


def pairs(lab: Lab) -> pd.DataFrame:
    """Every comparison that was named before the runs, in points of balanced accuracy."""
    found = [
        {
            "comparison": pair.name,
            "points": _percent(figure),
            "p": f"{figure.p:.2g}",
            "p, Holm": f"{figure.p_holm:.2g}",
            "seeds": figure.seeds,
            "items": figure.n,
            "equal": figure.equal,
        }
        for pair in lab.plan.pairs
        if (figure := lab.figures.get(f"difference.{pair.name}"))
    ]
    return pd.DataFrame(found)


def against(
    lab: Lab,
    prefix: str,
    names: Sequence[str],
    title: str,
    x: str,
    first: Mapping[str, Figure] | None = None,
    y: str = "balanced accuracy",
) -> go.Figure | None:
    """Figures `<prefix>.<name>.<number>` against their number, one line a name; `first`, of the
    table, where a name has one at `number` (key `<name>.<number>`), is drawn with them."""
    figure = go.Figure()
    every = {
        **{
            name.removeprefix(f"{prefix}."): its
            for name, its in lab.figures.items()
            if name.startswith(f"{prefix}.")
        },
        **(first or {}),
    }
    for name in names:
        its = sorted(
            (int(key.rpartition(".")[2]), said)
            for key, said in every.items()
            if key.rpartition(".")[0] == name
        )
        if its:
            figure.add_scatter(
                x=[at for at, _ in its],
                y=[round(said.value, 4) for _, said in its],
                name=name,
                mode="lines+markers",
                line={"color": COLORS[name]},
                error_y=_bars([said for _, said in its]),
                hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{name}</extra>",
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return finish_figure(figure, title, LEARNED, 280)


def _bars(said: Sequence[Figure]) -> dict:
    return {
        "type": "data",
        "symmetric": False,
        "array": [its.high - its.value for its in said],
        "arrayminus": [its.value - its.low for its in said],
        "thickness": 1,
    }


def baselines(
    lab: Lab, figure: go.Figure | None, names: Sequence[str], prefix: str = "accuracy.{}.none"
) -> go.Figure | None:
    """Rows that have no such axis, as level lines."""
    for name in names:
        said = lab.figures.get(prefix.format(name))
        if figure is not None and said:
            figure.add_hline(
                y=said.value,
                line={"color": COLORS[name], "dash": "dash"},
                annotation_text=name,
                annotation_font_size=11,
            )
    return figure


def depth(lab: Lab) -> tuple[go.Figure | None, go.Figure | None]:
    """Accuracy and cosine against the layers of the approximator."""
    built, level = tuple(lab.plan.settings["depths"]), ("identity", "random")
    accuracy = against(lab, "depth", built, "Depth of the approximator", "layers")
    cosine = against(
        lab,
        "depth_cosine",
        built,
        "Depth, and how near the guess is to the gradient",
        "layers",
        y="cosine",
    )
    return baselines(lab, accuracy, level), baselines(lab, cosine, level, "cosine.{}")


def grid(lab: Lab, arm: str, title: str, x: str) -> go.Figure | None:
    """One of the arms that vary one parameter, with the table's runs at the value they have."""
    parameter = lab.plan.settings["grids"][arm]
    at = lab.plan.arms[TABLE][0].params.get(parameter, KNOWN_PARAMETERS[parameter])
    from_table = {
        f"{name}.{at}": said
        for name in COMPARED
        if (said := lab.figures.get(f"accuracy.{name}.none"))
    }
    return against(lab, arm, COMPARED, title, x, from_table)


def length(lab: Lab, arm: str = "length") -> go.Figure | None:
    """Accuracy against the tokens of a training sequence."""
    parameter = lab.plan.settings["grids"][arm]
    figure = grid(
        lab, arm, "Longer passages, as many tokens a step", "tokens of a training sequence, mean"
    )
    if figure is not None:
        tokens = {}
        for _, rows in lab.records.runs[lab.records.runs["arm"].isin([TABLE, arm])].groupby(
            parameter
        ):
            seen = (
                lab.records.steps[lab.records.steps["run_id"].isin(rows["run_id"])]
                .groupby("run_id")["tokens_seen"]
                .max()
            )
            its = rows.drop_duplicates("run_id").set_index("run_id")
            tokens[int(rows[parameter].iloc[0])] = (
                seen / (its["steps"] * its["batch_size"])
            ).mean()
        figure.update_xaxes(
            tickvals=list(tokens), ticktext=[f"{count:.0f}" for count in tokens.values()]
        )
    return figure


def shift(lab: Lab) -> go.Figure | None:
    """Accuracy by how far the questions are from the training data."""
    figure, places = go.Figure(), list(lab.plan.settings["places"])
    for name in ("zero_shot", *COMPARED, "lora"):
        its = [
            (place, said)
            for place in places
            if (said := lab.figures.get(f"accuracy.{name}.{place}"))
        ]
        if its:
            figure.add_bar(
                x=[place for place, _ in its],
                y=[round(said.value, 4) for _, said in its],
                name=name,
                marker_color=COLORS.get(name, "#d4a6c8"),
                error_y=_bars([said for _, said in its]),
            )
    if not figure.data:
        return None
    figure.update_layout(barmode="group")
    figure.update_xaxes(title_text="shift")
    figure.update_yaxes(title_text="balanced accuracy", range=[0.4, 1])
    return finish_figure(figure, "New passages, new words, another domain", LEARNED, 280)


def curves(lab: Lab) -> go.Figure | None:
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
            rows = rows_of(lab, TABLE, name)
        except NotRun:
            continue
        steps = lab.records.steps
        its = (
            steps[steps["run_id"].isin(rows["run_id"])]
            .groupby("step")[["loss", "tokens_seen", "t_s"]]
            .mean()
        )
        for column, at in enumerate(("tokens_seen", "t_s"), 1):
            figure.add_scatter(
                x=its[at].round(3).tolist(),
                y=its["loss"].rolling(5, min_periods=1).mean().round(4).tolist(),
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


def cosines(lab: Lab) -> go.Figure | None:
    """Cosine of guess and true gradient by site, bottom to top, and over training."""
    figure = make_subplots(
        1,
        2,
        subplot_titles=["by site, bottom to top", "over training, all sites"],
        horizontal_spacing=0.1,
    )
    for name in ("residual", "anchored identity", "identity", "random", "literal"):
        try:
            its = probes_of(lab, rows_of(lab, TABLE, name))
        except NotRun:
            continue
        line = {
            "name": name,
            "legendgroup": name,
            "line": {"color": COLORS[name]},
            "mode": "lines+markers",
        }
        sites = (
            its[its["site"].str.startswith("layers.")].groupby("site", sort=False)["cosine"].mean()
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
        steps = its[its["site"] == "all"].groupby("step")["cosine"].mean()
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


def times(lab: Lab) -> go.Figure | None:
    """Step time over full's against length."""
    figure = go.Figure()
    for name in (*COMPARED, "lora"):
        its = sorted(
            (int(key.rpartition(".")[2]), said)
            for key, said in lab.figures.items()
            if key.rpartition(".")[0] == f"time.{name}"
        )
        if its:
            figure.add_scatter(
                x=[at for at, _ in its],
                y=[round(said.value, 4) for _, said in its],
                name=name,
                mode="lines+markers",
                line={"color": COLORS[name]},
                error_y=_bars([said for _, said in its]),
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text="tokens of a row")
    figure.update_yaxes(title_text="step time, of full's", rangemode="tozero")
    return finish_figure(
        figure, "Step time against length", "measured on this CPU; bars: 95 %, repeats", 260
    )


def memory(lab: Lab) -> pd.DataFrame:
    """Forecast of a step at 7B, GiB, by length."""
    found = [
        {"row": name, "tokens": int(seq), "GiB": said.value}
        for key, said in lab.figures.items()
        if key.startswith("peak.")
        for _, name, seq in [key.split(".")]
    ]
    if not found:
        return pd.DataFrame()
    return pd.DataFrame(found).pivot(index="row", columns="tokens", values="GiB").round(2)


def answer(lab: Lab) -> str:
    """The study in one paragraph, from the figures that there are."""
    found, said = lab.figures, []
    for name in ("literal", "residual"):
        if f"difference.{name} against full" in found and f"accuracy.{name}.none" in found:
            said.append(
                f"`{name}` reaches {_percent(found[f'accuracy.{name}.none'])} % against full"
                f" fine-tuning's {_percent(found['accuracy.full.none'])} on as many tokens, and the"
                f" base's own {_percent(found.get('accuracy.zero_shot.none'))}"
            )
        if f"flops.{name}" in found:
            said.append(
                f"its step is {found[f'flops.{name}'].value:.2f} of full's work at 7B, where"
                f" identity feedback, without a module, is {found['flops.identity'].value:.2f}"
            )
        if f"cosine.{name}" in found:
            said.append(
                f"its guess has a cosine of {_words(found[f'cosine.{name}'])} with the gradient"
            )
    return "; ".join(said) + ("." if said else "")
