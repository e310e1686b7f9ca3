"""ChunkFT, arXiv:2605.21177: the figures that its claims look at, and the tables of the notebook.
All from records.

The paper trains one of K chunks of the network at a time, and reports memory, time and scores. What
it does not report is how often a parameter is then updated: a K-th as often as in dense training on
the same tokens. So every comparison here says which budget was equal: tokens, seconds, or updates
of a parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pandas as pd

from chunkft_trajectories import EVERY
from vramlab.studies.estimates import Figure, NotRun, available, by_seed, corrected, ratio_by_seed
from vramlab.studies.plan import Pair
from vramlab.studies.study import Lab

GIB = 2**30
CHUNKED, DENSE = "chunkft", "full"
SEED = "seed"
DISTANCES = [
    SEED,
    "row",
    "against",
    "progress",
    "layer",
    "distance",
    "travelled",
    "relative",
    "cosine",
]


def figures(lab: Lab) -> dict[str, Figure]:
    """Every number of the study by name; those of arms that have not been run are left out."""
    found: dict[str, Figure] = {}
    for chapter in (
        _pairs,
        _counts,
        _same_weights,
        _distances,
        _tasks,
        _losses,
        _costs,
        _slices,
        _bytes,
    ):
        found |= dict(chapter(lab))
    return found


def sides(lab: Lab, pair: Pair) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of both sides that have their seed in both. Raises: NotRun, where a side has
    none."""
    one, other = (lab.records.select(pair.arm, **where) for where in (pair.one, pair.other))
    seeds = set(one[SEED]) & set(other[SEED])
    if not seeds:
        raise NotRun(f"{pair.name}: no seed on both sides")
    return one[one[SEED].isin(seeds)], other[other[SEED].isin(seeds)]


def _pairs(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`accuracy.<pair>`: balanced accuracy of one minus the other, Holm over all pairs;
    `loss.<pair>`: of the last 10 steps."""

    def accuracy(pair: Pair) -> Figure:
        one, other = sides(lab, pair)
        return lab.records.difference(one, other, one["train_domain"].iloc[0], pair.equal)

    def loss(pair: Pair) -> Figure:
        one, other = sides(lab, pair)
        return replace(by_seed(one["loss_last"], other["loss_last"]), equal=pair.equal)

    for kind, made in (("accuracy", accuracy), ("loss", loss)):
        family = dict(
            available(
                {
                    f"{kind}.{pair.name}": lambda pair=pair, made=made: made(pair)
                    for pair in lab.plan.pairs
                }
            )
        )
        # one seed's p is of its items only: no test to correct for
        yield from corrected(
            {
                name: figure if figure.seeds > 1 else replace(figure, p=math.nan)
                for name, figure in family.items()
            }
        ).items()


def chunks_of(row: Mapping) -> dict:
    """What a run's or a forecast's `axes`, as JSON, say about its chunks. AdamW is one."""
    return (
        {"count": 1}
        if row["regime"] == DENSE
        else json.loads(row["axes"] or "{}").get("trains", {}).get("chunks", {})
    )


def by_chunks(lab: Lab, arm: str, field: str) -> dict:
    """Value of the chunks' `field` -> the runs of the arm that have it, by seed; without any run,
    nothing."""
    try:
        rows = lab.records.select(arm)
    except NotRun:
        return {}
    values = pd.Series(
        [
            chunks_of(row).get(field, "ascending" if field == "order" else None)
            for _, row in rows.iterrows()
        ]
    )
    return {value: rows[(values == value).to_numpy()] for value in dict.fromkeys(values)}


def _counts(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`balanced.K=<K>` and `final_loss.K=<K>`."""
    for count, rows in by_chunks(lab, "count", "count").items():
        yield f"balanced.K={count}", lab.records.balanced(rows, rows["train_domain"].iloc[0])
        yield f"final_loss.K={count}", by_seed(rows["loss_last"])


def _same_weights(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """In how many seeds the trained weights are not the same to the last bit."""

    def differing(one: pd.DataFrame, other: pd.DataFrame) -> Figure:
        hashes = (
            one.set_index(SEED)["weights_hash"]
            .to_frame("one")
            .join(other.set_index(SEED)["weights_hash"], how="inner")
        )
        return Figure(
            float((hashes["one"] != hashes["weights_hash"]).sum()),
            "learned",
            "seeds",
            seeds=len(hashes),
        )

    fates, select = by_chunks(lab, "fate", "state"), lab.records.select
    yield from available(
        {
            "seeds_that_differ.K=1": lambda: differing(
                select("identity", regime=CHUNKED), select("identity", regime=DENSE)
            )
        }
    )
    if {"host", "device"} <= fates.keys():
        yield "seeds_that_differ.device", differing(fates["host"], fates["device"])


def distances(lab: Lab) -> pd.DataFrame:
    """The table of arm `trajectory`, with `pair`; empty when it has not been run."""
    table = lab.records.tables.get("trajectory", pd.DataFrame()).reindex(columns=DISTANCES)
    return table.assign(pair=table["row"].astype(str) + " against " + table["against"].astype(str))[
        table["relative"].notna()
    ]


def _distances(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`distance.<pair>`: of all weights at the end, as a share of the way gone from the base."""
    table = distances(lab)
    ends = table[
        (table["progress"] == table["progress"].max()) & (table["layer"] == EVERY)
    ].sort_values(SEED)
    for pair, rows in ends.groupby("pair", sort=False):
        yield f"distance.{pair}", by_seed(rows["relative"], unit="of the way")


def _tasks(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`fall.<domain>`: loss of the last tenth of the steps minus that of the first; `tasks_above`:
    in how many domains chunks beat AdamW, by the corrected test."""
    try:
        rows = lab.records.select("tasks", regime=CHUNKED)
    except NotRun:
        return
    for domain, its in rows.groupby("train_domain", sort=False):
        losses = [_ends(lab, run) for run in its["run_id"]]
        yield (
            f"fall.{domain}",
            by_seed([last for _, last in losses], [first for first, _ in losses]),
        )
    tested = dict(_pairs(lab))
    named = [tested.get(f"accuracy.{name}") for name in ("AdamW, equal tokens", "law", "medicine")]
    if all(named):
        above = sum(figure.value > 0 and figure.p_holm < 0.05 for figure in named)
        yield (
            "tasks_above",
            Figure(
                float(above),
                "learned",
                "domains",
                n=min(figure.n for figure in named),
                seeds=min(figure.seeds for figure in named),
            ),
        )


def _ends(lab: Lab, run: str) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of a run's kept steps."""
    loss = lab.records.steps.query("run_id == @run").sort_values("step")["loss"]
    tenth = max(1, len(loss) // 10)
    return float(loss.head(tenth).mean()), float(loss.tail(tenth).mean())


def _losses(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`final_loss.T=<T>` and `balanced.T=<T>`, and `balanced.lr=<rate>`."""
    for interval, rows in by_chunks(lab, "interval", "interval").items():
        yield f"final_loss.T={interval}", by_seed(rows["loss_last"])
        yield f"balanced.T={interval}", lab.records.balanced(rows, rows["train_domain"].iloc[0])
    try:
        rates = lab.records.select("rate", regime=CHUNKED)
    except NotRun:
        return
    for rate, rows in rates.groupby("lr"):
        yield f"balanced.lr={rate:g}", lab.records.balanced(rows, rows["train_domain"].iloc[0])


def _costs(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`step_time.<row>`: CPU seconds of a step as a share of AdamW's; `updates.<row>`: of a
    parameter in 1,000 steps."""
    table = lab.records.tables.get("cost", pd.DataFrame())
    if "step_s" not in table:
        return
    seconds = table.pivot(index="round", columns="row", values="step_s")
    for row in seconds:
        yield f"step_time.{row}", ratio_by_seed(seconds[row], seconds[DENSE])
    for row, its in table.groupby("row", sort=False):
        yield (
            f"updates.{row}",
            Figure(float(its["updates"].iloc[0]), "computed", "updates in 1,000 steps"),
        )


def _slices(lab: Lab) -> Iterator[tuple[str, Figure]]:
    table = lab.records.tables.get("slices", pd.DataFrame())
    if "error" in table:
        yield (
            "slice_error",
            Figure(float(table["error"].max()), "computed", "of the largest gradient"),
        )


def forecasts(lab: Lab, arm: str) -> pd.DataFrame:
    """The forecasts of an arm that there are, with `count`, `state`, and in GiB `peak`, `reserved`
    and `host`."""
    table = lab.records.tables.get(arm, pd.DataFrame())
    if "peak_allocated_bytes" not in table:
        return pd.DataFrame()
    table = table[table["peak_allocated_bytes"].notna()].reset_index(drop=True)
    said = [chunks_of(row) if "axes" in table else {} for _, row in table.iterrows()]
    return table.assign(
        count=[its.get("count") for its in said],
        state=[its.get("state") for its in said],
        peak=table["peak_allocated_bytes"] / GIB,
        reserved=table["peak_reserved_bytes"] / GIB,
        host=table["host_bytes"] / GIB,
    )


def _bytes(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`peak.K=<K>`, `peak.<model>`, `peak.<state>`, `saved.<row>` against K = 128, `left.<model>`
    of the card, GiB."""

    def gib(value: float) -> Figure:
        return Figure(float(value), "predicted", "GiB")

    counts = {row["count"]: row["peak"] for _, row in forecasts(lab, "bytes_count").iterrows()}
    for count, peak in counts.items():
        yield f"peak.K={count}", gib(peak)
    for _, row in forecasts(lab, "bytes_peers").iterrows():
        yield f"peak.{row['regime']}", gib(row["peak"])
        if 128 in counts:
            yield f"saved.{row['regime']}", gib(row["peak"] - counts[128])
    fates = {row["state"]: row for _, row in forecasts(lab, "bytes_fate").iterrows()}
    for state, row in fates.items():
        yield f"peak.{state}", gib(row["peak"])
        yield f"host.{state}", gib(row["host"])
    if {"host", "device"} <= set(fates):
        yield "saved.host", gib(fates["device"]["peak"] - fates["host"]["peak"])
    for _, row in forecasts(lab, "bytes_shapes").iterrows():
        name = row["model"] + ("" if row["regime"] == "chunkft_128" else f", {row['regime']}")
        yield f"peak.{name}", gib(row["peak"])
        yield f"left.{name}", gib(row["margin_bytes"] / GIB)
