"""The figures and tables of ChunkFT's notebook, from the study's records. Each figure says of which
kind its numbers are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from chunkft import CHUNKED, DENSE, GIB, by_chunks, distances, forecasts
from chunkft_trajectories import EVERY
from vramlab.report.style import PREDICTED_COLORS, finish_figure
from vramlab.studies.estimates import Figure, by_seed
from vramlab.studies.study import Lab

PALETTE = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")
SMOOTH = 7
"""A curve is a moving mean over this many of the 50 kept steps."""


def _points(x: Sequence, figures: Sequence[Figure], **style) -> go.Scatter:
    """Values with their intervals."""
    up, down = [f.high - f.value for f in figures], [f.value - f.low for f in figures]
    return go.Scatter(
        x=list(x),
        y=[f.value for f in figures],
        error_y={"type": "data", "array": up, "arrayminus": down},
        **style,
    )


def table(figures: Mapping[str, Figure], *prefixes: str) -> pd.DataFrame:
    """The estimates whose names begin with one of the prefixes, in words."""
    rows = [
        {
            "figure": name,
            "value": figure.words(),
            "Holm's p": f"{figure.p_holm:.3g}" if figure.p_holm == figure.p_holm else "",
            "interval": figure.contains,
            "seeds": figure.seeds or "",
            "items": figure.n or "",
            "how": figure.kind,
        }
        for name, figure in figures.items()
        if name.startswith(prefixes)
    ]
    return pd.DataFrame(
        rows, columns=["figure", "value", "Holm's p", "interval", "seeds", "items", "how"]
    ).set_index("figure")


def pairs(study: Lab) -> pd.DataFrame:
    """The comparisons that were named before the runs: K = 8, or its variant, minus the other
    side."""
    rows = []
    for pair in study.plan.pairs:
        accuracy, loss = (study.figures.get(f"{kind}.{pair.name}") for kind in ("accuracy", "loss"))
        if accuracy and loss:
            rows.append(
                {
                    "pair": pair.name,
                    "equal": pair.equal,
                    "balanced accuracy, difference": accuracy.words(),
                    "Holm's p": f"{accuracy.p_holm:.3g}",
                    "loss, difference": loss.words(),
                    "p of loss": f"{loss.p_holm:.3g}",
                    "seeds": accuracy.seeds,
                    "items": accuracy.n,
                }
            )
    return pd.DataFrame(rows).set_index("pair") if rows else pd.DataFrame()


def _starting(study: Lab, prefix: str) -> dict[str, Figure]:
    return {
        name.removeprefix(prefix): figure
        for name, figure in study.figures.items()
        if name.startswith(prefix)
    }


def count(study: Lab) -> go.Figure:
    """Accuracy and loss on equal tokens, and bytes at 7B, against K."""
    figure = make_subplots(
        1,
        3,
        horizontal_spacing=0.08,
        subplot_titles=["balanced accuracy", "loss, last 10 steps", "peak at 7B, GiB"],
    )
    for column, prefix in enumerate(("balanced.K=", "final_loss.K=", "peak.K="), 1):
        by_count = _starting(study, prefix)
        style = {
            "mode": "lines+markers",
            "showlegend": False,
            "marker_color": PALETTE[0 if column < 3 else 2],
        }
        figure.add_trace(
            _points([int(name) for name in by_count], list(by_count.values()), **style),
            row=1,
            col=column,
        )
    figure.update_xaxes(type="log", title_text="chunks K", tickvals=[1, 8, 64, 512], dtick=None)
    published = study.plan.settings["published_gib"]
    figure.add_hline(
        y=published,
        line={"dash": "dash", "color": "#d62728"},
        row=1,
        col=3,
        annotation_text=f"{published} published, of a smaller 7B",
        annotation_position="bottom right",
    )
    return finish_figure(
        figure,
        "What K costs and saves. Bars: 95%, of accuracy seeds and items, of loss seeds",
        "learned on tiny, tokens equal; bytes predicted",
        230,
    )


def apart(study: Lab) -> go.Figure:
    """Distance over time and by layer."""
    frame = distances(study)
    figure = make_subplots(
        1,
        2,
        horizontal_spacing=0.08,
        subplot_titles=["over training, all weights", "by layer, at the end"],
    )
    for color, (pair, rows) in zip(PALETTE, frame.groupby("pair", sort=False), strict=False):
        for column, axis, selected in (
            (1, "progress", rows[rows["layer"] == EVERY]),
            (2, "layer", rows[rows["progress"] == rows["progress"].max()]),
        ):
            means = {x: by_seed(part["relative"]) for x, part in selected.groupby(axis, sort=False)}
            figure.add_trace(
                _points(
                    list(means),
                    list(means.values()),
                    name=pair,
                    legendgroup=pair,
                    showlegend=column == 1,
                    mode="lines+markers" if column == 1 else "markers",
                    marker_color=color,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="share of the steps", row=1, col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="distance / way gone from the base", col=1)
    return finish_figure(
        figure, "How far apart the weights are. Bars: 95%, seeds", "learned on tiny", 250
    )


def _curve(study: Lab, rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of the smoothed loss: `step`, `loss`, `tokens_seen`."""
    steps = study.records.steps[study.records.steps["run_id"].isin(rows["run_id"])]
    mean = steps.groupby("step")[["loss", "tokens_seen"]].mean()
    return mean.assign(
        loss=mean["loss"].rolling(SMOOTH, center=True, min_periods=1).mean()
    ).reset_index()


def budgets(study: Lab) -> go.Figure:
    """Loss of K = 8, AdamW and the peers against each of the three budgets, read from the same
    runs."""
    axes = ("tokens", "CPU seconds of one thread", "updates of a parameter")
    figure = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=axes)
    cost = (
        study.records.tables.get("cost", pd.DataFrame())
        .reindex(columns=["row", "step_s", "updates"])
        .groupby("row")
        .mean()
    )
    runs = study.records.runs
    runs = runs[
        (runs["arm"].isin(("budgets", "peers")))
        & (runs["outcome"] == "ok")
        & (runs["steps"] == runs["steps"].max())
    ]
    for color, (regime, rows) in zip(
        PALETTE, runs.drop_duplicates("run_id").groupby("regime", sort=False), strict=False
    ):
        if regime not in cost.index:
            continue
        curve = _curve(study, rows)
        done = curve["step"] + 1
        xs = (
            curve["tokens_seen"],
            done * cost["step_s"][regime],
            done * cost["updates"][regime] / 1000,
        )
        for column, x in enumerate(xs, 1):
            figure.add_scatter(
                x=x,
                y=curve["loss"],
                name=regime,
                legendgroup=regime,
                showlegend=column == 1,
                mode="lines",
                line_color=color,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", row=1, col=3)
    figure.update_yaxes(title_text="loss", col=1)
    return finish_figure(
        figure,
        "Loss at equal budgets: one schedule each, so readings in mid-run have not cooled down",
        "learned on tiny; means of the seeds, no interval",
        230,
    )


def intervals(study: Lab) -> go.Figure:
    """Loss over steps for each T."""
    figure = go.Figure()
    for color, (interval, rows) in zip(
        PALETTE, by_chunks(study, "interval", "interval").items(), strict=False
    ):
        curve = _curve(study, rows)
        figure.add_scatter(
            x=curve["step"], y=curve["loss"], name=f"T = {interval}", mode="lines", line_color=color
        )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="loss")
    return finish_figure(
        figure,
        "Updates before the next chunk",
        "learned on tiny; means of the seeds, no interval",
        190,
    )


def budget_7b(study: Lab) -> go.Figure:
    """What is alive at the peak: K = 128 on the shapes and with the table on the host, then the
    peers; the published total."""
    shapes, peers = forecasts(study, "bytes_shapes"), forecasts(study, "bytes_peers")
    names = [
        *(shapes["model"] + ", " + shapes["regime"] if len(shapes) else ()),
        *(peers["model"] + ", " + peers["regime"] if len(peers) else ()),
    ]
    ledgers = [
        json.loads(ledger) for part in (shapes, peers) if len(part) for ledger in part["ledger"]
    ]
    figure = go.Figure()
    for category, color in PREDICTED_COLORS.items():
        sizes = [ledger.get(category, 0) / GIB for ledger in ledgers]
        if category not in ("cached", "context") and max(sizes, default=0) > 0.005:
            figure.add_bar(
                x=sizes,
                y=names,
                orientation="h",
                name=category,
                marker_color=color,
                hovertemplate="%{y}: %{x:.3f} GiB<extra>" + category + "</extra>",
            )
    published = study.plan.settings["published_gib"]
    figure.add_vline(
        x=published,
        line={"dash": "dash", "color": "#d62728"},
        annotation_text=f"{published} published",
        annotation_position="top",
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="GiB at the peak of allocated bytes")
    figure.update_layout(barmode="stack")
    return finish_figure(
        figure,
        "1,024 tokens, bf16, blocks checkpointed, head fused",
        "predicted",
        34 * max(1, len(names)),
    )


def published_budget(study: Lab) -> pd.DataFrame:
    """The published total beside our forecast of the shape it fits, GiB. Of its parts only the
    weights follow from the shape; what is left after them is all the rest together."""
    table = forecasts(study, "bytes_shapes")
    total, rows = study.plan.settings["published_gib"], []
    for _, row in table.iterrows():
        ledger = {
            name: size / GIB
            for name, size in json.loads(row["ledger"]).items()
            if name not in ("cached", "context")
        }
        weights = ledger.pop("weights")
        rows.append(
            {
                "forecast": f"{row['model']}, {row['regime']}",
                "weights": weights,
                "published total leaves": total - weights,
                "ours needs": row["peak"] - weights,
                "peak": row["peak"],
                **{name: size for name, size in ledger.items() if size > 0.005},
                "host": row["host"],
            }
        )
    return pd.DataFrame(rows).set_index("forecast").round(2) if rows else pd.DataFrame()


def takeaway(study: Lab) -> str:
    """In Markdown, from figures; empty where what it needs has not been run."""
    figures = study.figures
    names = (
        "accuracy.AdamW, equal tokens",
        "accuracy.AdamW, equal updates",
        "distance.K = 8 against K = 1",
    )
    if not all(name in figures for name in names):
        return "*The runs of the takeaway are not there.*"
    tokens, updates, distance = (figures[name] for name in names)
    first, second = (
        f"**{100 * figure.value:+.1f} points** [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"
        for figure in (tokens, updates)
    )
    return (
        f"Balanced accuracy of {CHUNKED} with K = 8 minus that of {DENSE}: {first} on equal tokens,"
        f" {second} at equal updates of a parameter. Its weights end {distance.value:.2f} times"
        " AdamW's own way from the base away from AdamW's."
    )
