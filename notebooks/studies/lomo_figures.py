"""The chapters of LOMO's study: what each displays, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lomo import DOMAIN, memory, rates
from vramlab.report import notebook
from vramlab.report.style import PREDICTED_COLORS, finish_figure
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
Shown = Sequence[pd.DataFrame | go.Figure | str]


def show(lab, chapter: str) -> None:
    """One chapter in a notebook."""
    notebook.show(*(CHAPTERS[chapter](lab) or [""]))


# bytes --------------------------------------------------------------------------------------------


def bytes_at_7b(lab) -> Shown:
    tables = {arm: table for arm in ARMS if len(table := memory(lab.records, arm))}
    if not tables:
        return []
    found: list = [
        _ledgers(
            tables,
            (
                {row: said for row, said in enumerate(_quoted(lab, tables["published"]))}
                if "published" in tables
                else {}
            ),
        )
    ]
    for arm, table in tables.items():
        shown = table.drop(columns=["ranks", "margin_gib", "model"]).rename(
            columns={"rule": ARMS[arm]}
        )
        found.append(
            (
                shown.assign(quoted_recalled_gib=_quoted(lab, table))
                if arm == "published"
                else shown
            ).round(2)
        )
    own = lab.figures
    if {"adamw_gib", "lomo_gib"} <= own.keys():
        share = own["lomo_gib"].value / own["adamw_gib"].value
        found.append(
            f"**LOMO's peak is {share:.1%} of AdamW's** at the paper's sizes and load, both with"
            f" checkpointing: {own['lomo_gib'].words()} against {own['adamw_gib'].words()}."
            " Predicted."
        )
    return found


def _quoted(lab, table: pd.DataFrame) -> list[float]:
    """The paper's total beside each row that it has one for: with checkpointing and a plain
    head."""
    said = lab.plan.settings.get("quoted_recalled_gib", {})
    return [
        said.get(row.rule, np.nan) if row.checkpointing and row.head == "plain" else np.nan
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


def cards(lab) -> Shown:
    table = memory(lab.records, "cards")
    if not len(table):
        return []
    found: list = [table[["model", "rule", "ranks", "phase", "peak_gib", "margin_gib"]].round(2)]
    if "share_of_sharded_adamw" in lab.figures:
        share = lab.figures["share_of_sharded_adamw"].value
        found.append(
            f"On one card LOMO holds **{share:.1%}** of what eight ranks of AdamW hold together."
            " Predicted."
        )
    return found


# learned ------------------------------------------------------------------------------------------


def learning_rates(lab) -> Shown:
    table = rates(lab)
    if not len(table):
        return []
    scored = [lab.records.balanced(row.runs, DOMAIN) for row in table.itertuples()]
    shown = pd.DataFrame(
        {
            "rule": table["rule"],
            "learning rate": table["lr"],
            "best": table["best"],
            "training loss": table["loss"].astype(float).round(4),
            "balanced accuracy": [figure.words() for figure in scored],
            "seeds": [figure.seeds for figure in scored],
            "n": [figure.n for figure in scored],
        }
    )
    drawn = go.Figure()
    for rule, color in RULES.items():
        its = [
            (row.lr, figure)
            for row, figure in zip(table.itertuples(), scored, strict=True)
            if row.rule == rule
        ]
        if its:
            middle = np.exp(np.mean(np.log([lr for lr, _ in its])))
            _points(
                drawn,
                [lr / middle for lr, _ in its],
                [figure for _, figure in its],
                rule,
                color,
                "lines+markers",
            )
    drawn.update_xaxes(type="log", title_text="learning rate over the middle of the rates tried")
    drawn.update_yaxes(title_text="balanced accuracy")
    return [
        finish_figure(drawn, "A learning rate's worth, at equal tokens", LEARNED, 260),
        shown,
        _differences(
            lab, [name for name in lab.figures if "_minus_" in name or name.startswith("rate_drop")]
        ),
    ]


def _points(
    drawn: go.Figure,
    x: Sequence,
    figures: Sequence[Figure],
    name: str,
    color: str,
    mode: str = "markers",
) -> None:
    values = [figure.value for figure in figures]
    drawn.add_scatter(
        x=list(x),
        y=[round(value, 4) for value in values],
        name=name,
        mode=mode,
        line={"color": color},
        marker={"color": color, "size": 9},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [figure.high - figure.value for figure in figures],
            "arrayminus": [figure.value - figure.low for figure in figures],
        },
        hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{name}</extra>",
    )


def comparisons(lab) -> Shown:
    names = [
        pair.name.replace(" ", "_")
        for pair in lab.plan.pairs
        if pair.name.replace(" ", "_") in lab.figures
    ]
    return [_differences(lab, names)] if names else []


def _differences(lab, names: Sequence[str]) -> pd.DataFrame:
    """What was compared, in points of balanced accuracy."""
    rows = [(name, lab.figures[name]) for name in names]
    return pd.DataFrame(
        [
            {
                "comparison": name.replace("_", " "),
                "points": f"{100 * figure.value:+.1f}",
                "95 %": f"{100 * figure.low:+.1f} to {100 * figure.high:+.1f}",
                "p": figure.p,
                "p, Holm": figure.p_holm,
                "seeds": figure.seeds,
                "n": figure.n,
                "equal": figure.equal,
            }
            for name, figure in rows
        ]
    ).round(4)


def clippings(lab) -> Shown:
    """Each way at each learning rate; without clipping from arm rates."""
    drawn, rows = go.Figure(), _runs(lab, "clipping")
    if rows is None:
        return []
    bare = _runs(lab, "rates")
    bare = bare[bare["regime"] == "sgd"] if bare is not None else rows.iloc[:0]
    both = pd.concat([rows, bare[bare["lr"].isin(rows["lr"])]], ignore_index=True)
    both["way"] = [_way((params.get("axes") or {}).get("until")) for params in both["params"]]
    for way, color in WAYS.items():
        its = [
            (f"learning rate {lr:g}", lab.records.balanced(runs, DOMAIN))
            for lr, runs in both[both["way"] == way].groupby("lr")
        ]
        if its:
            _points(drawn, [lr for lr, _ in its], [figure for _, figure in its], way, color)
    drawn.update_layout(scattermode="group")
    drawn.update_yaxes(title_text="balanced accuracy")
    found: list = [finish_figure(drawn, "LOMO's ways of clipping, at equal tokens", LEARNED, 260)]
    names = [name for name in lab.figures if name.endswith(("against_norm", "high_rate"))]
    return [*found, _differences(lab, names)] if names else found


def _way(until) -> str:
    said = until["backward"] if isinstance(until, dict) else {}
    if "clip_value" in said:
        return "by value"
    return (
        "none"
        if "clip_norm" not in said
        else "last norm"
        if said.get("norm") == "last"
        else "norm, two looks"
    )


def _runs(lab, arm: str) -> pd.DataFrame | None:
    try:
        return lab.records.select(arm)
    except NotRun:
        return None


def halves(lab) -> Shown:
    rows, drawn = _runs(lab, "halves"), go.Figure()
    if rows is None:
        return []
    names = [
        params["axes"]["weights"]
        + (", loss scaled" if "loss_scale" in params["axes"]["until"]["backward"] else "")
        for params in rows["params"]
    ]
    for name, color in HALVES.items():
        its = rows[[name == other for other in names]]
        if len(its):
            _points(drawn, [name], [lab.records.balanced(its, DOMAIN)], name, color)
    drawn.update_yaxes(title_text="balanced accuracy")
    found: list = [finish_figure(drawn, "LOMO in half types, at equal tokens", LEARNED, 260)]
    compared = [
        name for name in ("fp16_against_bf16", "loss_scale_against_none") if name in lab.figures
    ]
    found += [_differences(lab, compared)] if compared else []
    if {"hooks_under_scaler", "ours_under_scale"} <= lab.figures.keys():
        hooks, ours = (
            lab.figures[name].value for name in ("hooks_under_scaler", "ours_under_scale")
        )
        found.append(
            f"Under a GradScaler, plain hooks moved the weights **{hooks:,.0f}** times too far;"
            f" with our scale the step was {ours:.4f} times the unscaled one."
        )
    return found


# seconds ------------------------------------------------------------------------------------------


def seconds(lab) -> Shown:
    frame = lab.records.tables.get("seconds")
    if frame is None or "step_s" not in frame:
        return []
    medians = frame.groupby("row", sort=False)[
        ["step_s", "forward_s", "backward_s", "update_s"]
    ].median()
    drawn = go.Figure()
    for phase, color in (
        ("forward_s", "#4e79a7"),
        ("backward_s", "#f28e2b"),
        ("update_s", "#59a14f"),
    ):
        drawn.add_bar(
            y=medians.index.tolist(),
            x=(medians[phase] * 1000).round(2).tolist(),
            orientation="h",
            marker_color=color,
            name=phase.removesuffix("_s"),
        )
    drawn.update_layout(barmode="stack")
    drawn.update_yaxes(autorange="reversed", automargin=True)
    drawn.update_xaxes(title_text="ms a step")
    told = [
        f"{name.removeprefix('time_of_').replace('_', ' ')} {figure.value:.2f} [{figure.low:.2f},"
        f" {figure.high:.2f}]"
        for name, figure in lab.figures.items()
        if name.startswith("time_of_")
    ]
    return [
        finish_figure(
            drawn,
            "Step time, tiny model, all with checkpointing and a fused head",
            "measured on this CPU",
            240,
        ),
        "Step times over LOMO's, geometric mean of paired repeats with 95 %: "
        + "; ".join(told)
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


def same(lab) -> str:
    """In Markdown: whether LOMO is SGD."""
    figure = lab.figures.get("seeds_that_differ")
    if figure is None:
        return "*Its runs are not there.*"
    return (
        f"**{figure.value:.0f} of {figure.seeds}** seeds end in other weights under LOMO than under"
        " SGD at the end of a step."
    )


def takeaway(lab) -> str:
    """Whether SGD is enough, in Markdown, from the figures."""
    names = {
        "lomo_minus_adamw": "LOMO against AdamW",
        "adalomo_minus_adamw": "AdaLomo against AdamW",
    }
    told = [
        f"{words}: {100 * figure.value:+.1f} points [{100 * figure.low:+.1f},"
        f" {100 * figure.high:+.1f}]"
        for name, words in names.items()
        if (figure := lab.figures.get(name))
    ]
    return (
        (
            "**At equal tokens and each at its best learning rate: "
            + "; ".join(told)
            + "** of balanced accuracy."
        )
        if told
        else "*The runs that decide it are not there.*"
    )
