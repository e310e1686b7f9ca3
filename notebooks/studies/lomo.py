"""The figures of LOMO's study: what it holds at 7B, whether SGD is enough, what its clippings and
fp16 do. Lv 2024, arXiv:2306.09782; AdaLomo: Lv 2023, arXiv:2310.10195."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from vramlab.regimes.parameters import model_spec
from vramlab.studies.estimates import Figure, NotRun, available, by_seed, corrected, ratio_by_seed
from vramlab.studies.plan import Pair
from vramlab.studies.records import Records

GIB = 2**30
NAMES = {"master": "AdamW", "sgd": "SGD", "lomo": "LOMO", "adalomo": "AdaLomo"}
DOMAIN = "news"
TRAINED_ON = "tokens"
"""What all compared runs have equal, unless their pair says otherwise."""


def figures(lab) -> dict[str, Figure]:
    """Every number a claim may look at; one whose runs are not there is left out."""
    return {
        **_bytes(lab.records),
        **_hooks(lab.records),
        **_times(lab.records),
        **_same(lab.records),
        **_pairs(lab),
        **_best(lab),
        **_drops(lab),
    }


# bytes: predicted ---------------------------------------------------------------------------------


def memory(records: Records, arm: str) -> pd.DataFrame:
    """One row a forecast of the arm: what was asked (`rule`, `checkpointing`, `head`), `peak_gib`,
    each category at the peak, and `arithmetic_gib`, what weights, gradients and optimizer state
    come to by counting parameters."""
    frame = records.tables.get(arm, pd.DataFrame({"reason": []}))
    found = []
    for row in frame[frame["reason"] == ""].to_dict("records"):
        axes = _axes(row)
        checkpointed = (
            axes.get("acts", "checkpoint" if "lomo" in row["regime"] else "keep") != "keep"
        )
        found.append(
            {
                "rule": NAMES[row["regime"]],
                "checkpointing": checkpointed,
                "head": axes.get("head", "fused" if "lomo" in row["regime"] else "plain"),
                "arithmetic_gib": states_bytes(row["model"], row["regime"]) / GIB,
                "ranks": 8 if axes.get("place") == "fsdp" else 1,
                "model": row["model"],
                "phase": row["phase"],
                "peak_gib": row["peak_allocated_bytes"] / GIB,
                "margin_gib": _gib(row.get("margin_bytes")),
                **{name: size / GIB for name, size in json.loads(row["ledger"]).items()},
            }
        )
    return pd.DataFrame(found)


def states_bytes(model: str, regime: str) -> int:
    """Weights, gradients and optimizer state of bf16 training: 2 + 2 + 12 bytes a parameter for
    AdamW with fp32 master and moments, 2 + 2 + 4 for SGD with a master, and for the two inside
    backward 2, and the largest matrix once more.
    """
    shape = model_spec(model).config
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    block = 4 * hidden**2 + 3 * hidden * shape.intermediate_size + 2 * hidden
    count = 2 * vocabulary * hidden + shape.num_hidden_layers * block + hidden
    largest = max(vocabulary * hidden, 3 * hidden**2, hidden * shape.intermediate_size)
    return {"master": 16 * count, "sgd": 8 * count}.get(regime, 2 * count + 2 * largest)


def _axes(row: Mapping) -> dict:
    said = row.get("axes")
    return json.loads(said) if isinstance(said, str) and said else {}


def _gib(size) -> float:
    return float("nan") if size is None or pd.isna(size) else size / GIB


def _bytes(records: Records) -> dict[str, Figure]:
    table, cards = memory(records, "published"), memory(records, "cards")

    def of(frame: pd.DataFrame, column: str, **where) -> float:
        """The one row's value; nan where it is not there."""
        rows = (
            frame[np.logical_and.reduce([frame[key] == value for key, value in where.items()])]
            if len(frame)
            else frame
        )
        return float(rows[column].item()) if len(rows) and column in rows else float("nan")

    plain = {"head": "plain", "checkpointing": True}
    peaks = {
        name: of(table, "peak_gib", rule=rule, **plain)
        for name, rule in (("adamw_gib", "AdamW"), ("sgd_gib", "SGD"), ("lomo_gib", "LOMO"))
    }
    one = {"rule": "LOMO", "model": "llama-7b"}
    gib = {
        **peaks,
        "activations_gib": of(table, "activations", rule="LOMO", head="plain", checkpointing=False),
        "lomo_one_card_gib": of(cards, "peak_gib", **one),
        "margin_7b_gib": of(cards, "margin_gib", **one),
        "margin_65b_gib": of(cards, "margin_gib", model="llama-65b"),
    }
    shares = {
        "share_of_sharded_adamw": (
            of(cards, "peak_gib", **one) / (8 * of(cards, "peak_gib", rule="AdamW"))
        ),
        "adalomo_share_of_adamw": of(table, "peak_gib", rule="AdaLomo") / peaks["adamw_gib"],
    }
    made = [(name, value, "GiB") for name, value in gib.items()] + [
        (name, value, "") for name, value in shares.items()
    ]
    return {
        name: Figure(value, "predicted", unit) for name, value, unit in made if np.isfinite(value)
    }


# steps: measured ----------------------------------------------------------------------------------


def _hooks(records: Records) -> dict[str, Figure]:
    scaler, alive = (
        records.tables.get(arm, pd.DataFrame()).to_dict("records") for arm in ("scaler", "alive")
    )
    names = {"hooks under GradScaler": "hooks_under_scaler", "ours": "ours_under_scale"}
    found = {
        names[row["how"]]: Figure(row["ratio"], "computed", "times")
        for row in scaler
        if row.get("how") in names
    }
    for row in alive:
        if row.get("row") == "lomo":
            found["gradients_alive"] = Figure(
                row["most_bytes"] / row["largest_bytes"], "measured", "largest matrices"
            )
    return found


def _times(records: Records) -> dict[str, Figure]:
    """Step times over LOMO's, repeat by repeat."""
    frame = records.tables.get("seconds", pd.DataFrame({"row": []}))
    by_row = {
        row: its.sort_values("repeat")["step_s"].to_numpy() for row, its in frame.groupby("row")
    }
    names = {
        "lomo, two looks": "time_of_two_looks",
        "lomo, last norm": "time_of_last_norm",
        "lomo, by value": "time_of_value",
        "adalomo": "time_of_adalomo",
        "adamw": "time_of_adamw",
        "sgd": "time_of_sgd",
        "lora": "time_of_lora",
    }
    return {
        name: replace(ratio_by_seed(by_row[row], by_row["lomo"]), equal=TRAINED_ON)
        for row, name in names.items()
        if row in by_row and "lomo" in by_row
    }


# runs: learned ------------------------------------------------------------------------------------


def _same(records: Records) -> dict[str, Figure]:
    def differ() -> Figure:
        lomo, sgd = (records.select("same", regime=name) for name in ("lomo", "sgd"))
        if list(lomo["seed"]) != list(sgd["seed"]):
            raise NotRun("a seed is there on one side only")
        differing = lomo["weights_hash"] != sgd["weights_hash"]
        return Figure(
            float(differing.sum()), "learned", "seeds", seeds=len(differing), equal="updates"
        )

    return dict(available({"seeds_that_differ": differ}))


def _pairs(lab) -> dict[str, Figure]:
    """The comparisons the file names, one family for Holm."""
    return corrected(
        dict(
            available(
                {
                    pair.name.replace(" ", "_"): partial(_difference, lab.records, pair)
                    for pair in lab.plan.pairs
                }
            )
        )
    )


def _difference(records: Records, pair: Pair) -> Figure:
    one, other = (records.select(pair.arm, **side) for side in (pair.one, pair.other))
    return records.difference(one, other, DOMAIN, pair.equal)


def rates(lab) -> pd.DataFrame:
    """Arm rates, one row a rule and learning rate: `rule`, `lr`, `loss` (the last ten steps', mean
    over seeds), `runs` (their rows of `records.runs`) and whether it is the rule's `best`, the one
    of least loss."""
    found = []
    for rule, where in lab.plan.settings.get("rules", {}).items():
        try:
            rows = lab.records.select("rates", **where)
        except NotRun:
            continue
        its = [
            {
                "rule": rule,
                "lr": lr,
                "loss": runs["loss_last"].astype(float).mean(skipna=False),
                "runs": runs.reset_index(drop=True),
            }
            for lr, runs in rows.groupby("lr")
        ]
        losses = [row["loss"] if np.isfinite(row["loss"]) else np.inf for row in its]
        found += [{**row, "best": at == int(np.argmin(losses))} for at, row in enumerate(its)]
    return pd.DataFrame(found)


def _best(lab) -> dict[str, Figure]:
    """Each rule at its best rate against another at its own, a family of its own."""
    table = rates(lab)  # the best of one rate is none
    best = {
        row.rule: row.runs
        for row in table.itertuples()
        if row.best and (table["rule"] == row.rule).sum() > 1
    }
    return corrected(
        dict(
            available(
                {
                    f"{one}_minus_{other}".lower(): partial(
                        lab.records.difference, best[one], best[other], DOMAIN, TRAINED_ON
                    )
                    for one, other in lab.plan.settings.get("best", ())
                    if one in best and other in best
                }
            )
        )
    )


def accuracies(lab, rows: pd.DataFrame) -> np.ndarray:
    """Balanced accuracy of each run, (seeds,)."""
    right, labels = lab.records.right(rows, DOMAIN, "none", "yesno")
    return (right[:, labels == 1].mean(1) + right[:, labels == 0].mean(1)) / 2


def _drops(lab) -> dict[str, Figure]:
    """What a rate that is not the best costs: best accuracy minus the mean of the others', seed by
    seed."""
    table = rates(lab)
    drops = {}
    for rule, its in table.groupby("rule") if len(table) else ():
        scored = [(row.best, accuracies(lab, row.runs)) for row in its.itertuples()]
        if len(scored) > 1 and len({len(scores) for _, scores in scored}) == 1:
            best = next(scores for is_best, scores in scored if is_best)
            drops[rule] = best - np.mean(
                [scores for is_best, scores in scored if not is_best], axis=0
            )
    found = {f"rate_drop_{rule}".lower(): by_seed(drop) for rule, drop in drops.items()}
    for one, other in itertools.permutations(drops, 2):
        if len(drops[one]) == len(drops[other]):
            found[f"rate_drop_{one}_minus_{other}".lower()] = replace(
                by_seed(drops[one], drops[other]), equal=TRAINED_ON
            )
    return {name: replace(figure, n=_scored(lab)) for name, figure in found.items()}


def _scored(lab) -> int:
    """Items of the training domain that a run of arm rates was scored on."""
    right, _ = lab.records.right(lab.records.select("rates").head(1), DOMAIN, "none", "yesno")
    return right.shape[1]
