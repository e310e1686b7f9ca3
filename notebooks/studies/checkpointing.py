"""Checkpointing and precision: what each saves, what it costs, and whether a weight or a score
changes by it.

Every number is a `Figure` from the records; those of arms without a finished cell are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pandas as pd

from vramlab.factcc.statistics import LEVEL
from vramlab.runs.parameters import resolve
from vramlab.runs.preparation import prepare
from vramlab.studies.estimates import Figure, NotRun, corrected, ratio_by_seed
from vramlab.studies.records import Records
from vramlab.training.trainer import Schedule, Trainer

GIB = 2**30
KEEP, FULL, BASE = "keep", "checkpoint", "base"
SAVINGS = (FULL, "checkpoint every 2", "selective", "offload")
SETS = ("exact", "whole")
FORECASTS = ("forecast_7b", "forecast_13b", "forecast_precision", "forecast_host")


def figures(lab) -> dict[str, Figure]:
    """Everything that a claim may look at."""
    records = lab.records
    return {
        **_exact(records),
        **_bytes(records),
        **_seconds(records),
        **_forecasts(records),
        **_lost(records),
        **_quality(lab),
        **differences(lab),
        **gains(lab),
    }


def lost(model: str, recipe: str, train_domain: str, regime: str, lr: float) -> pd.DataFrame:
    """How many weights the first update of the base moves: `weights`, `moved`. AdamW's first step
    is `lr` long for every weight that has a gradient, whatever its size."""
    asked = {"model": model, "recipe": recipe, "train_domain": train_domain, "regime": regime}
    prepared = prepare(
        resolve({**asked, "train_items": 64, "val_items": 20, "test_items": 20}), progress=False
    )
    trainer = Trainer(prepared.model, prepared.regime, Schedule(lr, 1))
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.step(next(prepared.batches()))
    pairs = list(zip(before, trainer.model.parameters(), strict=True))
    return pd.DataFrame(
        [
            {
                "weights": sum(old.numel() for old in before),
                "moved": sum(int((old != new).count_nonzero()) for old, new in pairs),
            }
        ]
    )


def label(axes: str | Mapping) -> str:
    """What is kept, in words: '{"acts": {"checkpoint": {"every": 2}}}' -> 'checkpoint every 2'."""
    acts = (json.loads(axes or "{}") if isinstance(axes, str) else axes).get("acts", KEEP)
    name, fields = (acts, {}) if isinstance(acts, str) else next(iter(acts.items()))
    return " ".join(
        [name, *(field if value is True else f"{field} {value}" for field, value in fields.items())]
    )


def changed(records: Records) -> pd.DataFrame:
    """Each run beside the run of the same regime, domain, seed and number of steps that keeps
    everything: `arm`, `regime`, `acts`, `seed`, `domain`, `steps`, and whether its `weights` and
    any of its `losses` differ. Losses are those kept of the run.
    """
    if not len(records.runs):
        return pd.DataFrame(
            columns=["arm", "regime", "acts", "seed", "domain", "steps", "weights", "losses"]
        )
    runs = records.runs[records.runs["outcome"] == "ok"].assign(
        acts=lambda rows: rows["axes"].map(label)
    )
    losses = {
        run: tuple(steps["loss"]) for run, steps in records.steps.groupby("run_id", sort=False)
    }
    alike = ["regime", "train_domain", "seed", "steps", "train_items"]
    kept = (
        runs[(runs["acts"] == KEEP) & runs["arm"].isin((*SETS, "quality"))]
        .drop_duplicates(alike)
        .set_index(alike)
    )
    found = []
    for row in runs[runs["arm"].isin(SETS) & (runs["acts"] != KEEP)].itertuples():
        key = tuple(getattr(row, name) for name in alike)
        if key in kept.index:
            other = kept.loc[key]
            found.append(
                {
                    "arm": row.arm,
                    "regime": row.regime,
                    "acts": row.acts,
                    "seed": row.seed,
                    "domain": row.train_domain,
                    "steps": row.steps,
                    "weights": row.weights_hash != other["weights_hash"],
                    "losses": losses[row.run_id] != losses[other["run_id"]],
                }
            )
    return pd.DataFrame(
        found, columns=["arm", "regime", "acts", "seed", "domain", "steps", "weights", "losses"]
    )


def _exact(records: Records) -> dict[str, Figure]:
    rows, found = changed(records), {}
    for arm, words in zip(SETS, ("runs", "whole runs"), strict=True):
        its = rows[rows["arm"] == arm]
        for what in ("weights", "losses") if len(its) else ():
            found[f"{words} whose {what} differ"] = Figure(
                float(its[what].sum()),
                "learned",
                f"of {len(its)} runs",
                seeds=its["seed"].nunique(),
                equal="tokens",
            )
    return found


def counted(records: Records) -> pd.DataFrame:
    """Real steps, counted: `regime`, `acts`, `seq`, `peak_bytes`, `activations` (bytes at the
    peak), `host_bytes`, `phase`."""
    return _named(records.tables.get("bytes", pd.DataFrame()))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Rows called "regime, what is kept" as two columns; those without a result are left out."""
    if not len(table):
        return pd.DataFrame()
    table = table[table["reason"] == ""]
    names = table["row"].str.split(", ", expand=True)
    table = table.assign(regime=names[0], acts=names[1])
    return (
        table.assign(activations=table["ledger"].map(_activations)) if "ledger" in table else table
    )


def _activations(ledger: str) -> int:
    return json.loads(ledger).get("activations", 0)


def _bytes(records: Records) -> dict[str, Figure]:
    table, found = counted(records), {}
    if not len(table):
        return found
    by = table.set_index(["regime", "acts", "seq"])
    for regime, acts, seq in by.index:
        if acts != KEEP and (regime, KEEP, seq) in by.index:
            ratio = (
                by.loc[(regime, acts, seq), "peak_bytes"]
                / by.loc[(regime, KEEP, seq), "peak_bytes"]
            )
            found[f"bytes, {regime}, {acts} of keep, {seq}"] = Figure(
                float(ratio), "measured", "times"
            )
        elif acts == KEEP and regime != "full" and ("full", KEEP, seq) in by.index:
            ratio = (
                by.loc[(regime, KEEP, seq), "activations"]
                / by.loc[("full", KEEP, seq), "activations"]
            )
            found[f"activations, {regime} of full, {seq}"] = Figure(
                float(ratio), "measured", "times"
            )
        if host := by.loc[(regime, acts, seq), "host_bytes"]:
            found[f"host bytes, {regime}, {acts}, {seq}"] = Figure(float(host), "measured", "bytes")
    return found


def timed(records: Records) -> pd.DataFrame:
    """Step times: `regime`, `acts`, `seq`, `repeat`, `step_s`."""
    return _named(records.tables.get("seconds", pd.DataFrame()))


def _seconds(records: Records) -> dict[str, Figure]:
    table, found = timed(records), {}
    for (regime, seq), its in table.groupby(["regime", "seq"]) if len(table) else ():
        by = {
            acts: rows.sort_values("repeat")["step_s"].to_list()
            for acts, rows in its.groupby("acts")
        }
        pairs = [(acts, KEEP) for acts in by if acts != KEEP] + [("selective", FULL)]
        prefix = "" if regime == "full" else f"{regime}, "
        for one, other in pairs:
            if one in by and other in by:
                ratio = ratio_by_seed(by[one], by[other])
                found[f"step time, {prefix}{one} of {other}, {seq}"] = replace(
                    ratio, seeds=0, contains=f"{LEVEL:.0%}: repeats"
                )
    return found


def forecasts(records: Records) -> pd.DataFrame:
    """All forecasts: `model`, `regime`, `weights`, `seq`, `acts`, `peak_bytes` (allocated),
    `activations` (of them, in bytes at the peak), `phase`, `host_bytes`, FLOPs `forward` and
    `again` (recomputed)."""
    tables = [records.tables[arm] for arm in FORECASTS if arm in records.tables]
    tables = [table[table["reason"] == ""] for table in tables]
    if not sum(map(len, tables)):
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True).rename(
        columns={"peak_allocated_bytes": "peak_bytes"}
    )
    flops = table["phase_flops"].map(json.loads)
    return table.assign(
        acts=table["axes"].map(label),
        activations=table["ledger"].map(_activations),
        weights=table.get("weights", pd.Series("", table.index)).fillna(""),
        forward=[its["forward"] for its in flops],
        again=[its.get("recompute", 0) for its in flops],
    )


def groups(records: Records) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """Forecasts of one model, regime and length, by what is kept: (model, name of the regime,
    tokens, rows)."""
    table = forecasts(records)
    for (model, regime, weights, seq), its in (
        table.groupby(["model", "regime", "weights", "seq"]) if len(table) else ()
    ):
        name = regime if weights or regime == "bf16" else f"{regime} in its own precision"
        yield model, name, seq, its.drop_duplicates("acts").set_index("acts")


def _forecasts(records: Records) -> dict[str, Figure]:
    found = {}
    for model, regime, seq, by in groups(records):
        place, peak = f"{model} {regime}", by["peak_bytes"]
        for acts in set(by.index) & {KEEP}:
            found[f"{place}, activations at the peak, {seq}"] = _share(
                by.loc[acts, "activations"], peak[acts]
            )
        for one, other in [
            *((acts, KEEP) for acts in by.index if acts != KEEP),
            ("checkpoint offload", FULL),
        ]:
            if one in peak and other in peak:
                found[f"{place}, {one} of {other}, {seq}"] = _share(peak[one], peak[other])
        for acts in set(by.index) & set(SAVINGS):
            found[f"{place}, {acts} computes again, {seq}"] = _share(
                by.loc[acts, "again"], by.loc[acts, "forward"]
            )
            if FULL in by.index and acts != FULL:
                found[f"{place}, {acts} computes of {FULL}, {seq}"] = _share(
                    by.loc[acts, "again"], by.loc[FULL, "again"]
                )
                if KEEP in by.index and peak[KEEP] > peak[FULL]:
                    found[f"{place}, {acts} saves of {FULL}, {seq}"] = _share(
                        peak[KEEP] - peak[acts], peak[KEEP] - peak[FULL]
                    )
        if "checkpoint offload" in by.index:
            host = float(by.loc["checkpoint offload", "host_bytes"])
            found[f"{model}, blocks' inputs on the host, {seq}"] = Figure(
                host / GIB, "predicted", "GiB"
            )
    return found


def _share(part: float, of: float) -> Figure:
    return Figure(float(part) / float(of), "predicted", "times")


def _lost(records: Records) -> dict[str, Figure]:
    table = records.tables.get("lost", pd.DataFrame())
    if not len(table):
        return {}
    moved = table[table["reason"] == ""].set_index(["regime", "lr"])["moved"]
    return {
        f"updates lost in {regime}, lr {lr:g}": Figure(
            1 - count / moved["full", lr], "measured", "times"
        )
        for (regime, lr), count in moved.items()
        if regime != "full" and ("full", lr) in moved.index
    }


def places(records: Records, rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Where runs of one training domain were scored: (name, domain, shift). Another domain is
    called by its name, the own one by its shift."""
    its = records.items[records.items["item_set"] == rows["item_set"].iloc[0]][
        ["domain", "shift"]
    ].drop_duplicates()
    own = rows["train_domain"].iloc[0]
    return [
        (shift if domain == own else domain, domain, shift)
        for domain, shift in its.itertuples(index=False)
    ]


def _selected(records: Records, arm: str, **where) -> pd.DataFrame | None:
    try:
        return records.select(arm, **where)
    except NotRun:
        return None


def trained(lab) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Finished runs, and the base's, by regime and training domain: (regime, domain, rows)."""
    runs = lab.records.runs
    if not len(runs):
        return
    for arm, name in (("quality", ""), (BASE, BASE)):
        for regime, domain in (
            runs[runs["arm"] == arm][["regime", "train_domain"]]
            .drop_duplicates()
            .itertuples(index=False)
        ):
            if (
                rows := _selected(lab.records, arm, regime=regime, train_domain=domain)
            ) is not None:
                yield name or regime, domain, rows


def _quality(lab) -> dict[str, Figure]:
    scoring = lab.plan.settings["scoring"]
    return {
        f"{regime}, {own}: {name}": lab.records.balanced(rows, domain, shift, scoring)
        for regime, own, rows in trained(lab)
        for name, domain, shift in places(lab.records, rows)
    }


def differences(lab) -> dict[str, Figure]:
    """The pairs named before the runs, at every place; Holm is over all of them. Seeds that both
    sides have finished."""
    found = {}
    for pair in lab.plan.pairs:
        one, other = (_selected(lab.records, pair.arm, **side) for side in (pair.one, pair.other))
        if one is not None and other is not None:
            one, other = (
                rows[rows["seed"].isin(set(one["seed"]) & set(other["seed"]))]
                for rows in (one, other)
            )
            found |= _compared(lab, pair.name, one, other, pair.equal)
    return corrected(found)


def gains(lab) -> dict[str, Figure]:
    """Full fine-tuning less the base, at every place, a family of its own. The base is the same at
    every seed."""
    found, every = {}, {(regime, own): rows for regime, own, rows in trained(lab)}
    for (regime, own), base in every.items():
        if regime == BASE and ("full", own) in every:
            rows = every["full", own]
            same = pd.concat([base] * len(rows), ignore_index=True).assign(
                seed=rows["seed"].to_list()
            )
            found |= _compared(
                lab, f"full - base, {own}", rows, same, "none: the base is not trained"
            )
    return corrected(found)


def _compared(
    lab, name: str, one: pd.DataFrame, other: pd.DataFrame, equal: str
) -> dict[str, Figure]:
    scoring = lab.plan.settings["scoring"]
    if not len(one):
        return {}
    return {
        f"{name}: {place}": lab.records.difference(one, other, domain, equal, shift, scoring)
        for place, domain, shift in places(lab.records, one)
    }
