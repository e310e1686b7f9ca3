"""The chapters of the study of checkpointing: its tables, its figures and its answer, from the
records alone."""

from __future__ import annotations

import json

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from checkpointing import (
    FULL,
    GIB,
    KEEP,
    changed,
    counted,
    differences,
    forecasts,
    groups,
    places,
    timed,
    trained,
)
from vramlab.report.style import finish_figure, interval_bars
from vramlab.studies.claims import ALPHA
from vramlab.studies.estimates import Figure

COLORS = {
    KEEP: "#4e79a7",
    FULL: "#e15759",
    "checkpoint every 2": "#f28e2b",
    "selective": "#59a14f",
    "offload": "#b07aa1",
}
REGIMES = {"full": "#4e79a7", "mixed": "#f28e2b", "bf16": "#59a14f", "base": "#bab0ac"}
MIB = 2**20
LOWERED = 0.99
"""A peak above this share of the other one does not count as lower."""


def exactness(study) -> pd.DataFrame:
    """For each cell: how many runs have a counterpart that keeps everything, and in how many a
    loss or a weight differs from it."""
    rows = changed(study.records)
    by = (
        rows.assign(runs=1, losses=rows["losses"].astype(int), weights=rows["weights"].astype(int))
        .groupby(["regime", "acts", "steps"], sort=False)[["runs", "losses", "weights"]]
        .sum()
        .reset_index()
    )
    return (
        by.rename(columns={"losses": "with another loss", "weights": "with other weights"})
        .set_index("regime")
        .rename_axis(None)
    )


def lines(
    table: pd.DataFrame, value: str, title: str, kind: str, y: str, shared: bool = False
) -> go.Figure:
    """`value` against tokens, one panel for each `panel`, one line for each thing kept; `shared`:
    on one scale."""
    panels = list(dict.fromkeys(table["panel"]))
    figure = make_subplots(
        1, len(panels), subplot_titles=panels, horizontal_spacing=0.07, shared_yaxes=shared
    )
    for column, panel in enumerate(panels, 1):
        for acts, color in COLORS.items():
            points = table[(table["panel"] == panel) & (table["acts"] == acts)].sort_values("seq")
            bars = (
                {
                    "type": "data",
                    "symmetric": False,
                    "array": points["high"] - points[value],
                    "arrayminus": points[value] - points["low"],
                    "thickness": 1,
                }
                if "high" in points
                else None
            )
            if len(points):
                figure.add_scatter(
                    x=points["seq"].tolist(),
                    y=points[value].round(4).tolist(),
                    name=acts,
                    legendgroup=acts,
                    error_y=bars,
                    showlegend=not any(trace.name == acts for trace in figure.data),
                    mode="lines+markers",
                    line={"color": color, "dash": "dot" if acts == KEEP else "solid"},
                    row=1,
                    col=column,
                    hovertemplate=f"%{{x}} tokens: %{{y:.4g}}<extra>{acts}</extra>",
                )
    figure.update_xaxes(
        title_text="tokens of a row", type="log", tickvals=sorted(table["seq"].unique())
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text=y, col=1)
    figure.update_annotations(font_size=13)
    return finish_figure(figure, title, kind, 240)


def bytes_by_length(study) -> go.Figure | None:
    """Peaks of real steps of the small model, in MiB."""
    table = counted(study.records)
    if len(table):
        return lines(
            table.assign(panel=table["regime"], mib=table["peak_bytes"] / MIB),
            "mib",
            "Peak of a step, tiny model",
            "counted on this CPU",
            "MiB at the peak",
            shared=True,
        )


def seconds_by_length(study) -> go.Figure | None:
    """Step times over that of keeping everything, with intervals over repeats."""
    table = timed(study.records)
    if not len(table):
        return None
    rows = [
        {
            "panel": regime,
            "seq": seq,
            "acts": acts,
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
        }
        for regime, acts, seq in (
            table[["regime", "acts", "seq"]].drop_duplicates().itertuples(index=False)
        )
        if (
            figure := study.figures.get(
                f"step time, {'' if regime == 'full' else f'{regime}, '}{acts} of {KEEP}, {seq}"
            )
        )
    ]
    return lines(
        pd.DataFrame(rows),
        "value",
        "Step time over that of keeping everything, tiny model; bars: 95 %, repeats",
        "measured on this CPU",
        "times",
    )


def forecast_by_length(study, model: str) -> go.Figure | None:
    """Peaks of a published shape, in GiB."""
    table = forecasts(study.records)
    table = table[(table["model"] == model) & (table["weights"] != "")] if len(table) else table
    if len(table):
        table = table.assign(
            panel=table["regime"] + ", " + table["weights"], gib=table["peak_bytes"] / GIB
        )
        return lines(
            table, "gib", f"Peak of a step, {model}, one row", "predicted", "GiB at the peak"
        )


def lowered(study) -> pd.DataFrame:
    """Forecasts that keep everything beside those that checkpoint every block: whether the peak is
    lower, and what is alive at it."""
    rows = []
    for model, regime, seq, by in groups(study.records):
        if {KEEP, FULL} <= set(by.index):
            keep, less = by.loc[KEEP], by.loc[FULL]
            saved = less["peak_bytes"] <= LOWERED * keep["peak_bytes"]
            rows.append(
                {
                    "model": model,
                    "regime": regime,
                    "tokens": seq,
                    "keep, GiB": round(keep["peak_bytes"] / GIB, 2),
                    "checkpoint, GiB": round(less["peak_bytes"] / GIB, 2),
                    "lower": bool(saved),
                    "peak of keep in": keep["phase"],
                    "alive at the peak of keep, GiB": _alive(keep["ledger"]),
                    "FLOPs, times": round(less["flops"] / keep["flops"], 3),
                }
            )
    return pd.DataFrame(rows)


def why_not(study) -> str:
    """A line for each model and regime: from which length on checkpointing lowers the peak, and
    what is alive at the peak where it does not."""
    table, sentences = lowered(study), []
    for (model, regime), rows in table.groupby(["model", "regime"]) if len(table) else ():
        first, rest = (
            rows[rows["lower"]]["tokens"].min(),
            rows[~rows["lower"]],
        )
        sentence = f"* `{model}`, {regime}: lower " + (
            f"from {first:,.0f} tokens on" if first == first else "at no length asked for"
        )
        if len(rest):
            last = rest.loc[rest["tokens"].idxmax()]
            sentence += (
                f"; at {last['tokens']:,} tokens its peak is"
                f" {last['alive at the peak of keep, GiB']}"
            )
        sentences.append(sentence + ".")
    return "\n".join(sentences)


def _alive(ledger: str) -> str:
    """The categories at a peak that are a hundredth of it or more."""
    sizes = {name: size for name, size in json.loads(ledger).items() if name != "cached"}
    return ", ".join(
        f"{name} {size / GIB:.2f}"
        for name, size in sizes.items()
        if size >= sum(sizes.values()) / 100
    )


def updates_lost(study) -> pd.DataFrame:
    """Of the weights that a first step moves in fp32, the share that stay where they were."""
    names = [name for name in study.figures if name.startswith("updates lost")]
    return pd.DataFrame(
        [{"": name, "share": round(study.figures[name].value, 4)} for name in names]
    )


def scores(study) -> go.Figure | None:
    """Balanced accuracy of every regime at every place, one panel for each training domain."""
    families = list(trained(study))
    own = list(dict.fromkeys(domain for _, domain, _ in families))
    if not families:
        return None
    figure = make_subplots(
        1,
        len(own),
        subplot_titles=[f"trained on {domain}" for domain in own],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    for regime, domain, rows in families:
        names = [name for name, _, _ in places(study.records, rows)]
        estimates = [study.figures[f"{regime}, {domain}: {name}"] for name in names]
        shift = (list(REGIMES).index(regime) - 1.5) * 0.14
        figure.add_scatter(
            x=[at + shift for at in range(len(names))],
            y=[round(estimate.value, 4) for estimate in estimates],
            mode="markers",
            error_y=interval_bars(estimates, thickness=1, width=2),
            name=regime,
            legendgroup=regime,
            marker={"color": REGIMES[regime], "size": 8},
            showlegend=not any(trace.name == regime for trace in figure.data),
            row=1,
            col=own.index(domain) + 1,
            customdata=names,
            hovertemplate="%{customdata}: %{y:.3f}<extra>" + regime + "</extra>",
        )
        figure.update_xaxes(
            tickvals=list(range(len(names))), ticktext=names, col=own.index(domain) + 1
        )
    figure.add_hline(0.5, line_dash="dot", line_width=1)
    figure.update_yaxes(title_text="balanced accuracy", col=1)
    figure.update_annotations(font_size=13)
    return finish_figure(
        figure,
        "Scores by precision and shift; bars: 95 %, seeds and items (base: items)",
        "learned",
        280,
    )


def compared(family: dict[str, Figure]) -> pd.DataFrame:
    """A family of differences in points, with what is equal and Holm's p."""
    return pd.DataFrame(
        [
            {
                "comparison": name,
                "points": round(100 * estimate.value, 2),
                "low": round(100 * estimate.low, 2),
                "high": round(100 * estimate.high, 2),
                "p (Holm)": round(estimate.p_holm, 4),
                "n": estimate.n,
                "seeds": estimate.seeds,
                "equal": estimate.equal,
            }
            for name, estimate in family.items()
        ]
    )


def exact_words(study) -> str:
    """How many runs differ from the one that keeps everything."""
    counts = [study.figures.get(f"runs whose {kind} differ") for kind in ("weights", "losses")]
    if None in counts:
        return ""
    weights, losses = counts
    conclusion = (
        "scores with checkpointing are those without it"
        if not weights.value + losses.value
        else "it is not exact here"
    )
    return (
        f"Keeping less changed the weights in **{weights.value:.0f}** {weights.unit}, and a loss in"
        f" {losses.value:.0f}: {conclusion}."
    )


def bytes_words(study) -> str:
    """How far checkpointing lowers forecasts, at the longest row."""
    table = lowered(study)
    if not len(table):
        return ""
    table = table.assign(ratio=table["checkpoint, GiB"] / table["keep, GiB"])
    longest = table[table["tokens"] == table["tokens"].max()].sort_values("ratio")
    best, worst = longest.iloc[0], longest.iloc[-1]
    return (
        f"At {best['tokens']:,} tokens checkpointing leaves **{best['ratio']:.0%}** of the peak of"
        f" {best['model']}, {best['regime']}, and {worst['ratio']:.0%} of that of {worst['model']},"
        f" {worst['regime']}; of {len(table)} forecasts it is lower in {int(table['lower'].sum())},"
        f" at {table['FLOPs, times'].min():.2f} to {table['FLOPs, times'].max():.2f} times the"
        " FLOPs (predicted)."
    )


def time_words(study) -> str:
    """What checkpointing costs in time, at the longest row that was timed."""
    ratios = {
        name: figure
        for name, figure in study.figures.items()
        if name.startswith(f"step time, {FULL} of {KEEP}")
    }
    name = max(ratios, key=lambda name: int(name.rsplit(" ", 1)[-1]), default="")
    return name and (
        f"A step with every block checkpointed takes **{ratios[name].words()}** as long at"
        f" {name.rsplit(' ', 1)[-1]} tokens (tiny, measured on this CPU)."
    )


def precision_words(study) -> str:
    """The widest difference by precision, and which are more than chance."""
    family = differences(study)
    if not family:
        return ""
    widest = max(family, key=lambda name: abs(family[name].value))
    significant = [name for name, estimate in family.items() if estimate.p_holm < ALPHA]
    return (
        f"Lower precision moved balanced accuracy by **{100 * family[widest].value:+.1f}** points"
        f" at most ({widest}); more than chance {'is' if len(significant) == 1 else 'are'}"
        f" {len(significant)} of {len(family)} differences"
        + (f": {'; '.join(significant)}." if significant else ".")
    )


def answer(study) -> str:
    """The question's answer in one paragraph, computed from the tables; chapters without runs are
    left out."""
    sentences = [
        sentence_of(study)
        for sentence_of in (exact_words, bytes_words, time_words, precision_words)
    ]
    return " ".join(sentence for sentence in sentences if sentence)
