"""The chapters of LOMO's study: what each displays, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lomo import DOMAIN, memory, rates
from vramlab.report import notebook
from vramlab.report.style import PREDICTED_COLORS, finish_figure, interval_bars
from vramlab.studies.estimates import Figure, NotRun

RULES = {"LOMO": "#4e79a7", "AdaLomo": "#59a14f", "AdamW": "#e15759"}
WAYS = {
    "none": "#bab0ac",
    "norm, two looks": "#4e79a7",
    "by value": "#f28e2b",
    "last norm": "#59a14f",
}
HALVES = {"bf16": "#4e79a7", "fp16, loss scaled": "#59a14f", "fp16": "#e15759"}
ARMS = {
    "published": "LLaMA-7B's sizes, 8 x 512 tokens",
    "loaded": "Baichuan2-7B, 8 x 512",
    "one_row": "Baichuan2-7B, 1 x 1,024",
}
LEARNED = "learned on this machine; bars: 95 %, seeds and items"
Contents = Sequence[pd.DataFrame | go.Figure | str]


def show(study, chapter: str) -> None:
    """One chapter in a notebook."""
    notebook.show(*(CHAPTERS[chapter](study) or [""]))


# bytes --------------------------------------------------------------------------------------------


def bytes_at_7b(study) -> Contents:
    tables = {arm: table for arm in ARMS if len(table := memory(study.records, arm))}
    if not tables:
        return []
    contents: list = [
        _ledgers(
            tables,
            (
                {
                    row: total_gib
                    for row, total_gib in enumerate(_quoted(study, tables["published"]))
                }
                if "published" in tables
                else {}
            ),
        )
    ]
    for arm, table in tables.items():
        columns = table.drop(columns=["ranks", "margin_gib", "model"]).rename(
            columns={"rule": ARMS[arm]}
        )
        contents.append(
            (
                columns.assign(quoted_recalled_gib=_quoted(study, table))
                if arm == "published"
                else columns
            ).round(2)
        )
    figures = study.figures
    if {"adamw_gib", "lomo_gib"} <= figures.keys():
        share = figures["lomo_gib"].value / figures["adamw_gib"].value
        contents.append(
            f"**LOMO's peak is {share:.1%} of AdamW's** at the paper's sizes and load, both with"
            f" checkpointing: {figures['lomo_gib'].words()} against {figures['adamw_gib'].words()}."
            " Predicted."
        )
    return contents


def _quoted(study, table: pd.DataFrame) -> list[float]:
    """The paper's total for each row; NaN except with checkpointing and a plain head, of which it
    has one."""
    totals_gib = study.plan.settings.get("quoted_recalled_gib", {})
    return [
        totals_gib.get(row.rule, np.nan) if row.checkpointing and row.head == "plain" else np.nan
        for row in table.itertuples()
    ]


def _ledgers(tables: dict[str, pd.DataFrame], quoted: dict[int, float]) -> go.Figure:
    figure = make_subplots(
        1,
        len(tables),
        shared_yaxes=True,
        subplot_titles=[ARMS[arm] for arm in tables],
        horizontal_spacing=0.03,
    )
    for column, (arm, table) in enumerate(tables.items(), 1):
        names = [
            row.rule
            + (", checkpointing" if row.checkpointing else "")
            + (", fused head" if row.head == "fused" else "")
            for row in table.itertuples()
        ]
        for category, color in PREDICTED_COLORS.items():
            if category in table and table[category].max() > 0.05:
                new = not any(trace.name == category for trace in figure.data)
                figure.add_bar(
                    x=table[category].fillna(0).round(3).tolist(),
                    y=names,
                    orientation="h",
                    name=category,
                    legendgroup=category,
                    showlegend=new,
                    marker_color=color,
                    row=1,
                    col=column,
                    hovertemplate=f"%{{y}}: %{{x:.2f}} GiB<extra>{category}</extra>",
                )
        if arm == "published":
            figure.add_scatter(
                x=[quoted[at] for at in quoted],
                y=[names[at] for at in quoted],
                mode="markers",
                row=1,
                col=column,
                name="the paper's total, recalled",
                marker={"symbol": "diamond-open", "size": 11, "color": "#000"},
            )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero")
    figure.update_layout(barmode="stack")
    figure.update_annotations(font_size=13)
    return finish_figure(figure, "What is alive at the peak", "predicted", 300)


def cards(study) -> Contents:
    table = memory(study.records, "cards")
    if not len(table):
        return []
    contents: list = [table[["model", "rule", "ranks", "phase", "peak_gib", "margin_gib"]].round(2)]
    if "share_of_sharded_adamw" in study.figures:
        share = study.figures["share_of_sharded_adamw"].value
        contents.append(
            f"On one card LOMO holds **{share:.1%}** of what eight ranks of AdamW hold together."
            " Predicted."
        )
    return contents


# learned ------------------------------------------------------------------------------------------


def learning_rates(study) -> Contents:
    table = rates(study)
    if not len(table):
        return []
    scored = [study.records.balanced(row.runs, DOMAIN) for row in table.itertuples()]
    rows = pd.DataFrame(
        {
            "rule": table["rule"],
            "learning rate": table["lr"],
            "best": table["best"],
            "training loss": table["loss"].astype(float).round(4),
            "balanced accuracy": [score.words() for score in scored],
            "seeds": [score.seeds for score in scored],
            "n": [score.n for score in scored],
        }
    )
    figure = go.Figure()
    for rule, color in RULES.items():
        tried = [
            (row.lr, score)
            for row, score in zip(table.itertuples(), scored, strict=True)
            if row.rule == rule
        ]
        if tried:
            middle = np.exp(np.mean(np.log([lr for lr, _ in tried])))
            _points(
                figure,
                [lr / middle for lr, _ in tried],
                [score for _, score in tried],
                rule,
                color,
                "lines+markers",
            )
    figure.update_xaxes(type="log", title_text="learning rate over the middle of the rates tried")
    figure.update_yaxes(title_text="balanced accuracy")
    return [
        finish_figure(figure, "A learning rate's worth, at equal tokens", LEARNED, 260),
        rows,
        _differences(
            study,
            [name for name in study.figures if "_minus_" in name or name.startswith("rate_drop")],
        ),
    ]


def _points(
    figure: go.Figure,
    x: Sequence,
    estimates: Sequence[Figure],
    name: str,
    color: str,
    mode: str = "markers",
) -> None:
    values = [estimate.value for estimate in estimates]
    figure.add_scatter(
        x=list(x),
        y=[round(value, 4) for value in values],
        name=name,
        mode=mode,
        line={"color": color},
        marker={"color": color, "size": 9},
        error_y=interval_bars(estimates),
        hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{name}</extra>",
    )


def comparisons(study) -> Contents:
    names = [
        pair.name.replace(" ", "_")
        for pair in study.plan.pairs
        if pair.name.replace(" ", "_") in study.figures
    ]
    return [_differences(study, names)] if names else []


def _differences(study, names: Sequence[str]) -> pd.DataFrame:
    """The named comparisons, in points of balanced accuracy."""
    rows = [(name, study.figures[name]) for name in names]
    return pd.DataFrame(
        [
            {
                "comparison": name.replace("_", " "),
                "points": f"{100 * estimate.value:+.1f}",
                "95 %": f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}",
                "p": estimate.p,
                "p, Holm": estimate.p_holm,
                "seeds": estimate.seeds,
                "n": estimate.n,
                "equal": estimate.equal,
            }
            for name, estimate in rows
        ]
    ).round(4)


def clippings(study) -> Contents:
    """Each way of clipping at each learning rate; the runs without clipping are those of the arm
    `rates`."""
    figure, rows = go.Figure(), _runs(study, "clipping")
    if rows is None:
        return []
    unclipped = _runs(study, "rates")
    unclipped = unclipped[unclipped["regime"] == "sgd"] if unclipped is not None else rows.iloc[:0]
    both = pd.concat([rows, unclipped[unclipped["lr"].isin(rows["lr"])]], ignore_index=True)
    both["way"] = [_way((params.get("axes") or {}).get("until")) for params in both["params"]]
    for way, color in WAYS.items():
        tried = [
            (f"learning rate {lr:g}", study.records.balanced(runs, DOMAIN))
            for lr, runs in both[both["way"] == way].groupby("lr")
        ]
        if tried:
            _points(figure, [lr for lr, _ in tried], [score for _, score in tried], way, color)
    figure.update_layout(scattermode="group")
    figure.update_yaxes(title_text="balanced accuracy")
    contents: list = [
        finish_figure(figure, "LOMO's ways of clipping, at equal tokens", LEARNED, 260)
    ]
    names = [name for name in study.figures if name.endswith(("against_norm", "high_rate"))]
    return [*contents, _differences(study, names)] if names else contents


def _way(until) -> str:
    clipping = until["backward"] if isinstance(until, dict) else {}
    if "clip_value" in clipping:
        return "by value"
    return (
        "none"
        if "clip_norm" not in clipping
        else "last norm"
        if clipping.get("norm") == "last"
        else "norm, two looks"
    )


def _runs(study, arm: str) -> pd.DataFrame | None:
    try:
        return study.records.select(arm)
    except NotRun:
        return None


def halves(study) -> Contents:
    rows, figure = _runs(study, "halves"), go.Figure()
    if rows is None:
        return []
    names = [
        params["axes"]["weights"]
        + (", loss scaled" if "loss_scale" in params["axes"]["until"]["backward"] else "")
        for params in rows["params"]
    ]
    for name, color in HALVES.items():
        runs = rows[[name == other for other in names]]
        if len(runs):
            _points(figure, [name], [study.records.balanced(runs, DOMAIN)], name, color)
    figure.update_yaxes(title_text="balanced accuracy")
    contents: list = [finish_figure(figure, "LOMO in half types, at equal tokens", LEARNED, 260)]
    compared = [
        name for name in ("fp16_against_bf16", "loss_scale_against_none") if name in study.figures
    ]
    contents += [_differences(study, compared)] if compared else []
    if {"hooks_under_scaler", "ours_under_scale"} <= study.figures.keys():
        hooks, ours = (
            study.figures[name].value for name in ("hooks_under_scaler", "ours_under_scale")
        )
        contents.append(
            f"Under a GradScaler, plain hooks moved the weights **{hooks:,.0f}** times too far;"
            f" with our scale the step was {ours:.4f} times the unscaled one."
        )
    return contents


# seconds ------------------------------------------------------------------------------------------


def seconds(study) -> Contents:
    frame = study.records.tables.get("seconds")
    if frame is None or "step_s" not in frame:
        return []
    medians = frame.groupby("row", sort=False)[
        ["step_s", "forward_s", "backward_s", "update_s"]
    ].median()
    figure = go.Figure()
    for phase, color in (
        ("forward_s", "#4e79a7"),
        ("backward_s", "#f28e2b"),
        ("update_s", "#59a14f"),
    ):
        figure.add_bar(
            y=medians.index.tolist(),
            x=(medians[phase] * 1000).round(2).tolist(),
            orientation="h",
            marker_color=color,
            name=phase.removesuffix("_s"),
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="ms a step")
    ratios = [
        f"{name.removeprefix('time_of_').replace('_', ' ')} {estimate.value:.2f}"
        f" [{estimate.low:.2f}, {estimate.high:.2f}]"
        for name, estimate in study.figures.items()
        if name.startswith("time_of_")
    ]
    return [
        finish_figure(
            figure,
            "Step time, tiny model, all with checkpointing and a fused head",
            "measured on this CPU",
            240,
        ),
        "Step times over LOMO's, geometric mean of paired repeats with 95 %: "
        + "; ".join(ratios)
        + ".",
    ]


CHAPTERS = {
    "bytes": bytes_at_7b,
    "cards": cards,
    "rates": learning_rates,
    "comparisons": comparisons,
    "clipping": clippings,
    "halves": halves,
    "seconds": seconds,
}


def same(study) -> str:
    """In Markdown: whether LOMO is SGD."""
    estimate = study.figures.get("seeds_that_differ")
    if estimate is None:
        return "*Its runs are not there.*"
    return (
        f"**{estimate.value:.0f} of {estimate.seeds}** seeds end in other weights under LOMO than"
        " under SGD at the end of a step."
    )


def takeaway(study) -> str:
    """Whether SGD is enough, in Markdown, from the figures."""
    names = {
        "lomo_minus_adamw": "LOMO against AdamW",
        "adalomo_minus_adamw": "AdaLomo against AdamW",
    }
    differences = [
        f"{label}: {100 * estimate.value:+.1f} points [{100 * estimate.low:+.1f},"
        f" {100 * estimate.high:+.1f}]"
        for name, label in names.items()
        if (estimate := study.figures.get(name))
    ]
    return (
        (
            "**At equal tokens and each at its best learning rate: "
            + "; ".join(differences)
            + "** of balanced accuracy."
        )
        if differences
        else "*The runs that decide it are not there.*"
    )
