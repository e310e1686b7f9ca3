"""The chapters of Baichuan 2's study, drawn from the records alone. Each figure says of which kind
its numbers are."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from baichuan2 import GIB, HEADS, LAST, ladder, power_law, pretraining
from vramlab.report.style import finish_figure
from vramlab.studies.study import Lab

COLORS = {"NormHead": "#4e79a7", "linear": "#e15759"}
FORMS = {"relative": "#4e79a7", "bf16 steps": "#f28e2b", "absolute": "#e15759"}
ROUNDED = {"none": "#bab0ac", "tables": "#4e79a7", "angles": "#f28e2b", "positions": "#e15759"}
LEARNED = "learned, this CPU"


def curves(study: Lab) -> go.Figure:
    """Cross-entropy by step, one panel a learning rate; every seed a line, without the max-z term
    in loss or model."""
    table = pretraining(study)
    rates = sorted(table["lr"].unique())
    figure = make_subplots(
        1,
        len(rates),
        shared_yaxes=True,
        subplot_titles=[f"lr {rate:g}" for rate in rates],
        horizontal_spacing=0.02,
    )
    steps = study.records.steps.groupby("run_id")
    for _, run in table[~table["max_z"]].iterrows():
        run_steps, head = (
            steps.get_group(run["run_id"]).sort_values("step"),
            HEADS[run["norm_head"]],
        )
        first = run["lr"] == rates[0] and run["seed"] == table["seed"].min()
        figure.add_scatter(
            x=run_steps["step"].tolist(),
            y=run_steps["cross_entropy"].round(3).tolist(),
            mode="lines",
            name=head,
            legendgroup=head,
            showlegend=bool(first),
            line={"color": COLORS[head], "width": 1},
            row=1,
            col=1 + rates.index(run["lr"]),
            hovertemplate=f"{head}, seed {run['seed']}, step %{{x}}: %{{y}}<extra></extra>",
        )
    floor = float(study.records.tables["frequencies"]["cross_entropy"].mean())
    figure.add_hline(y=floor, line={"dash": "dash", "color": "#555", "width": 1})
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text="cross-entropy, nats (log)", col=1)
    figure.update_xaxes(title_text="step")
    figure.update_annotations(font_size=13)
    return finish_figure(
        figure, "Pre-training from random weights; dashed: the frequencies of tokens", LEARNED, 260
    )


def ends(study: Lab) -> go.Figure:
    """Where runs ended by learning rate, and their highest logit: the mean over seeds, with each
    seed as a dot."""
    table = pretraining(study)
    figure = make_subplots(
        1,
        2,
        subplot_titles=["cross-entropy at the end, nats", "highest logit at the end"],
        horizontal_spacing=0.09,
    )
    for (norm, max_z), runs in table.groupby(["norm_head", "max_z"]):
        name = HEADS[norm] + (", max-z" if max_z else "")
        for column, quantity in ((1, "final"), (2, "logit")):
            mean = runs.groupby("lr")[quantity].mean()
            style = {"color": COLORS[HEADS[norm]], "dash": "dot" if max_z else "solid"}
            figure.add_scatter(
                x=mean.index.tolist(),
                y=mean.round(3).tolist(),
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line=style,
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=runs["lr"].tolist(),
                y=runs[quantity].round(3).tolist(),
                mode="markers",
                legendgroup=name,
                showlegend=False,
                marker={
                    "color": COLORS[HEADS[norm]],
                    "size": 5,
                    "symbol": "circle-open" if max_z else "circle",
                },
                hovertemplate=f"{name}, lr %{{x}}: %{{y}}<extra>one seed</extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title_text="learning rate")
    figure.update_annotations(font_size=13)
    return finish_figure(figure, "What a learning rate ends in", LEARNED, 260)


def stability(study: Lab) -> pd.DataFrame:
    """One row a head, max-z and learning rate, the mean over seeds: the table behind the curves."""
    table = pretraining(study).assign(head=lambda rows: rows["norm_head"].map(HEADS))
    return (
        table.groupby(["head", "max_z", "lr"])
        .agg(
            seeds=("seed", "nunique"),
            diverged=("diverged", "sum"),
            final=("final", "mean"),
            spikes=("spikes", "mean"),
            jump=("jump", "max"),
            logit=("logit", "mean"),
        )
        .round(3)
    )


def pairs(study: Lab) -> pd.DataFrame:
    """The comparisons named before the runs."""
    estimates = {
        name.removeprefix("stability.pair."): figure
        for name, figure in study.figures.items()
        if "stability.pair." in name
    }
    return pd.DataFrame(
        {
            "difference": {name: figure.words() for name, figure in estimates.items()},
            "p, Holm": {name: f"{figure.p_holm:.2g}" for name, figure in estimates.items()},
            "seeds": {name: figure.seeds for name, figure in estimates.items()},
        }
    )


def rungs(study: Lab) -> go.Figure:
    """The trained rungs against the power law fitted to all but the largest."""
    table = ladder(study)
    figure = go.Figure(
        go.Scatter(
            x=table["counted"].tolist(),
            y=table["final"].round(4).tolist(),
            mode="markers",
            name="a run",
            marker={"color": "#4e79a7", "size": 7},
        )
    )
    below = table[table["counted"] < table["counted"].max()]
    a, b = power_law(below["counted"].to_numpy(float), below["final"].to_numpy())
    sizes = sorted(table["counted"].unique())
    figure.add_scatter(
        x=sizes,
        y=[a * size**-b for size in sizes],
        mode="lines",
        name="fitted to all but the largest",
        line={"color": "#e15759", "dash": "dash"},
    )
    figure.update_xaxes(type="log", title_text="parameters beside embedding and head")
    figure.update_yaxes(title_text=f"cross-entropy, last {LAST:.0%} of the steps, nats")
    return finish_figure(figure, "The ladder, an eighth as wide, on the same tokens", LEARNED, 260)


def shapes(study: Lab) -> pd.DataFrame:
    """The ladder as published: counted parameters beside the quoted ones, and the forecast of a
    step."""
    tables, quoted = study.records.tables, study.plan.settings["table_10"]
    sizes = tables["shapes"].merge(
        tables["forecasts"][["model", "peak_allocated_bytes", "flops"]], on="model", how="left"
    )
    return pd.DataFrame(
        {
            "counted, M": (sizes["counted"] / 1e6).round(2),
            "quoted, M": sizes["model"].map(quoted),
            "embedding and head, %": (200 * sizes["head_parameters"] / sizes["parameters"]).round(
                1
            ),
            "predicted peak, GiB": (sizes["peak_allocated_bytes"] / GIB).round(2),
            "TFLOP a step": (sizes["flops"] / 1e12).round(1),
        }
    ).set_index(sizes["model"].rename(None))


def domains(study: Lab) -> pd.DataFrame:
    """Balanced accuracy, one row a training domain, one column a domain scored on, with the gain
    over the base and its interval."""
    columns: dict[str, dict[str, str]] = {}
    for name, figure in study.figures.items():
        if name.startswith("domains.") and name.endswith(".gain"):
            _, domain, other, _ = name.split(".")
            reached = study.figures[f"domains.{domain}.{other}"].value
            columns.setdefault(f"on {other}", {})[f"trained on {domain}"] = (
                f"{reached:.3f}, gain {figure.words()}"
            )
    return pd.DataFrame(columns)


def collisions(study: Lab) -> go.Figure:
    """How many of the distances have a number of their own in bf16, by head, the steepest slope
    first."""
    table = study.records.tables["collisions"]
    longest = table[table["length"] == table["length"].max()].sort_values("slope", ascending=False)
    figure = make_subplots(
        1,
        2,
        subplot_titles=["different numbers", "first distance that collides"],
        horizontal_spacing=0.09,
    )
    for form, color in FORMS.items():
        rows = longest[longest["form"] == form]
        for column, quantity in ((1, "distinct"), (2, "first_collision")):
            figure.add_scatter(
                x=rows["slope"].tolist(),
                y=rows[quantity].tolist(),
                mode="lines+markers",
                name=form,
                legendgroup=form,
                showlegend=column == 1,
                line={"color": color},
                marker={"size": 4},
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title_text="slope of the head")
    figure.update_yaxes(rangemode="tozero")
    figure.update_annotations(font_size=13)
    return finish_figure(
        figure, f"ALiBi's {longest['length'].iloc[0]:,} distances in bf16", "computed", 240
    )


def attention(study: Lab) -> go.Figure:
    """The share of the last query's attention that moves to other keys, by head; scores beside
    positions are normal."""
    table = study.records.tables["attention"]
    table = (
        table[table["scores"] == "normal"].groupby(["form", "slope"])["moved"].mean().reset_index()
    )
    figure = go.Figure()
    for form, color in FORMS.items():
        rows = table[table["form"] == form]
        figure.add_scatter(
            x=rows["slope"].tolist(),
            y=rows["moved"].tolist(),
            mode="lines+markers",
            name=form,
            line={"color": color},
        )
    figure.update_xaxes(type="log", title_text="slope of the head")
    figure.update_yaxes(type="log", title_text="share of attention moved (log)")
    return finish_figure(
        figure,
        "What a rounded ALiBi table does to attention",
        "computed, mean over drawn scores",
        240,
    )


def rotary(study: Lab) -> go.Figure:
    """Share of answers that change when all positions move up, by what is rounded to bf16."""
    table, figure = study.records.tables["rotary"], go.Figure()
    for rounded, color in ROUNDED.items():
        rows = table[table["rounded"] == rounded].sort_values("offset")
        figure.add_scatter(
            x=[str(offset) for offset in rows["offset"]],
            y=rows["changed"].tolist(),
            mode="lines+markers",
            name=rounded,
            line={"color": color},
        )
    figure.update_xaxes(title_text="every position moved up by", type="category")
    figure.update_yaxes(title_text="share of answers that change", range=[-0.02, 0.6])
    return finish_figure(
        figure, "Rotary positions in bf16: what is rounded", "computed, the trained tiny model", 240
    )


def head(study: Lab) -> go.Figure:
    """The head's own bytes, formed naively and fused, beside the linear head's, trained and
    frozen."""
    table = study.records.tables["head"]
    models = list(dict.fromkeys(table["model"]))
    figure = make_subplots(
        1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05
    )
    for column, model in enumerate(models, 1):
        for trained, color in ((True, "#4e79a7"), (False, "#a0cbe8")):
            rows = table[(table["model"] == model) & (table["trained"] == trained)]
            figure.add_bar(
                x=rows["head"].tolist(),
                y=(rows["extra_bytes"] / GIB).round(3).tolist(),
                name="trained" if trained else "frozen",
                legendgroup=str(trained),
                showlegend=column == 1,
                marker_color=color,
                row=1,
                col=column,
            )
    figure.update_yaxes(title_text="GiB beside weight and input", col=1)
    figure.update_annotations(font_size=13)
    return finish_figure(figure, "What forming the loss takes", "predicted", 240)


def steps(study: Lab) -> pd.DataFrame:
    """The forecast peak of a whole step by head, and the head's share of it."""
    table = study.records.tables["step"].set_index(["model", "head"])
    return pd.DataFrame(
        {
            "predicted peak, GiB": (table["peak_bytes"] / GIB).round(2),
            "in": table["phase"],
            "the head's, %": (100 * table["head_share"]).round(1),
        }
    )


def answer(study: Lab) -> str:
    """The study in one paragraph, of computed numbers, in Markdown. Chapters that have no runs are
    not in it."""
    figures, sentences = study.figures, []
    if "stability.diverged.NormHead" in figures:
        linear, norm = (figures[f"stability.diverged.{name}"] for name in ("linear", "NormHead"))
        jump = figures["stability.jump.linear_minus_norm"]
        sentences.append(
            f"From random weights {linear.value:.0%} of {linear.seeds} runs with a linear head end"
            f" no better than the frequencies of tokens, with NormHead {norm.value:.0%}; the linear"
            f" head's highest jump of the loss is larger by {jump.words()}. Where they end differs"
            f" by {figures['stability.final.linear_minus_norm'].words()} over all rates, and max-z"
            f" changes that by {figures['stability.final.without_minus_with_max_z'].words()}."
        )
    if "ladder.predicted_over_found" in figures:
        sentences.append(
            "What a power law in the smaller rungs says of the largest one's end is off by "
            f"{figures['ladder.predicted_over_found'].words()}."
        )
    gains = {name: figure for name, figure in figures.items() if name.endswith(".gain")}
    if gains:
        own = [
            figure.value
            for name, figure in gains.items()
            if name.split(".")[1] == name.split(".")[2]
        ]
        other = [
            figure.value
            for name, figure in gains.items()
            if name.split(".")[1] != name.split(".")[2]
        ]
        sentences.append(
            f"Trained on law or medicine, the base gains {100 * sum(own) / len(own):.1f} points of"
            f" balanced accuracy there and {100 * sum(other) / len(other):.1f} in the other."
        )
    if "positions.moved.absolute.normal" in figures:
        absolute, relative = (
            figures[f"positions.moved.{form}.normal"] for form in ("absolute", "relative")
        )
        sentences.append(
            f"In bf16 ALiBi by absolute columns moves up to {absolute.value:.0%} of a head's"
            f" attention to other keys, by distances {relative.value:.2%}; rotary positions in bf16"
            f" change {figures['positions.changed.positions.2048'].value:.0%} of answers 2,048"
            " tokens up."
        )
    for model in ("baichuan2-7b", "baichuan2-13b"):
        if f"head.{model}.trained.price" in figures:
            price, copies = (
                figures[f"head.{model}.trained.{name}"] for name in ("price", "price_copies")
            )
            fused = figures[f"head.{model}.trained.price_fused"]
            sentences.append(
                f"Normalising the trained head of {model} takes {price.words()} formed naively"
                f" ({copies.value:.1f} copies of its weight), and {1024 * fused.value:.1f} MiB"
                " fused, predicted."
            )
    return " ".join(sentences)
