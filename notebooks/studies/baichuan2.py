"""Baichuan 2 (arXiv:2309.10305): what its head, its ladder, its domains and its positions do, in
figures from the records alone.

A pre-training run has diverged when it ends no better than the frequencies of tokens, which a model
that knows nothing of a token's past reaches. A spike is a step whose cross-entropy lies
`settings.spike` above the lowest before it. Both are of the cross-entropy without the max-z term,
so that models with and without it compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from vramlab.regimes.parameters import model_spec
from vramlab.studies.estimates import Figure, by_seed, corrected, ratio_by_seed, share, two_level
from vramlab.studies.study import Lab

GIB = 2**30
HEADS = {True: "NormHead", False: "linear"}
LAST = 0.1
"""The share of the steps whose mean is where a run ended."""


def figures(lab: Lab) -> dict[str, Figure]:
    """Every number a claim may look at; of arms that have not run there are none."""
    found: dict[str, Figure] = {}
    for arms, part in PARTS.items():
        if set(arms) <= there(lab):
            found |= part(lab)
    return found


def there(lab: Lab) -> set[str]:
    """The arms with something on record."""
    runs = lab.records.runs
    ended = set(runs.loc[runs["outcome"] == "ok", "arm"]) if len(runs) else set()
    return ended | {
        arm for arm, table in lab.records.tables.items() if (table["reason"] == "").all()
    }


# ===== stability =====


def pretraining(lab: Lab, arm: str = "stability") -> pd.DataFrame:
    """One row a run: `seed`, `lr`, its `config`, `norm_head`, `max_z`; `final`, the cross-entropy
    where it ended, nats; `diverged`; `spikes`, the share of steps that are one; `jump`, the highest
    above the lowest before it, nats; `logit`, the highest at the end; `run_id`, `parameters`. A
    seed without all of its runs is left out: what is compared is paired by seed.
    """
    rows, steps = [], lab.records.steps.groupby("run_id")
    floor = lab.records.tables["frequencies"].set_index("seed")["cross_entropy"]
    for _, run in lab.records.select(arm).iterrows():
        taken, config = (
            steps.get_group(run["run_id"]).sort_values("step"),
            run["params"].get("config", {}),
        )
        entropy = taken["cross_entropy"].to_numpy()
        last, above = (
            max(1, round(LAST * len(taken))),
            entropy[1:] - np.minimum.accumulate(entropy)[:-1],
        )
        final = float(entropy[-last:].mean())
        rows.append(
            {
                "seed": run["seed"],
                "lr": run["lr"],
                "config": config,
                "norm_head": config.get("norm_head", True),
                "max_z": bool(config.get("z_loss_weight", 0)),
                "final": final,
                "diverged": not final < floor[run["seed"]],
                "spikes": float((~(above < lab.plan.settings["spike"])).mean()),
                "jump": float(above.max()),
                "logit": float(taken["highest_logit"].iloc[-last:].mean()),
                "run_id": run["run_id"],
                "parameters": run["parameters"],
            }
        )
    table = pd.DataFrame(rows)
    ended = table.groupby("seed")["run_id"].transform("size")
    return table[ended == ended.max()].reset_index(drop=True)


def _stability(lab: Lab) -> dict[str, Figure]:
    table = pretraining(lab)
    found = {
        f"stability.floor.{seed}": Figure(value, "computed", "nats")
        for seed, value in (
            lab.records.tables["frequencies"].set_index("seed")["cross_entropy"].items()
        )
    }
    for (norm, max_z), its in table.groupby(["norm_head", "max_z"]):
        found[f"stability.diverged.{_named(norm, max_z)}"] = share(
            int(its["diverged"].sum()), len(its)
        )
    apart = {
        what: [
            table[table["norm_head"] == norm].groupby("seed")[what].mean() for norm in (False, True)
        ]
        for what in ("diverged", "spikes", "jump", "final")
    }
    found |= {
        f"stability.{what}.linear_minus_norm": by_seed(
            *pair, unit="nats" if what in ("jump", "final") else ""
        )
        for what, pair in apart.items()
    }
    for norm, head in HEADS.items():
        its = table[(table["norm_head"] == norm) & (table["lr"] == table["lr"].min())]
        found[f"stability.logit_with_over_without_max_z.{head}"] = ratio_by_seed(
            *(its[its["max_z"] == max_z].sort_values("seed")["logit"] for max_z in (True, False)),
            kind="learned",
        )
    found["stability.final.without_minus_with_max_z"] = by_seed(
        *(
            table[table["max_z"] == max_z].groupby("seed")["final"].mean()
            for max_z in (False, True)
        ),
        unit="nats",
    )
    return found | _pairs(lab, table)


def _named(norm: bool, max_z: bool) -> str:
    return HEADS[norm] + ("+max_z" if max_z else "")


def _pairs(lab: Lab, table: pd.DataFrame) -> dict[str, Figure]:
    """The comparisons named in the study's file, of where runs ended, with Holm's p over all of
    them."""
    found = {}
    for pair in lab.plan.pairs:
        sides = [_where(table, said).sort_values("seed") for said in (pair.one, pair.other)]
        if list(sides[0]["seed"]) != list(sides[1]["seed"]):
            raise ValueError(
                f"{pair.name}: seeds {list(sides[0]['seed'])} against {list(sides[1]['seed'])}"
            )
        found[f"stability.pair.{pair.name}"] = by_seed(
            sides[0]["final"], sides[1]["final"], unit="nats"
        )
    return corrected(found)


def _where(table: pd.DataFrame, said: Mapping) -> pd.DataFrame:
    return table[
        [all(row[name] == value for name, value in said.items()) for _, row in table.iterrows()]
    ]


# ===== the ladder =====


def ladder(lab: Lab) -> pd.DataFrame:
    """The rungs that were trained: one row a run, with `counted`, parameters beside embedding and
    head."""
    table = pretraining(lab, "ladder")
    vocabulary = model_spec(lab.records.select("ladder")["model"].iloc[0]).config.vocab_size
    ends = np.array([2 * vocabulary * config["hidden_size"] for config in table["config"]])
    return table.assign(counted=table["parameters"] - ends)


def power_law(counted: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """(a, b) of loss = a * counted^-b, least squares of logarithms. The paper's has a constant
    besides, for which three rungs are too few."""
    slope, height = np.polyfit(np.log(counted), np.log(loss), 1)
    return float(np.exp(height)), -float(slope)


def _trained_ladder(lab: Lab) -> dict[str, Figure]:
    table = ladder(lab).sort_values(["seed", "counted"])
    exponents, errors = [], []
    for _, rungs in table.groupby("seed"):
        counted, loss = rungs["counted"].to_numpy(float), rungs["final"].to_numpy()
        a, b = power_law(counted[:-1], loss[:-1])
        exponents.append(b)
        errors.append(a * counted[-1] ** -b / loss[-1] - 1)
    rungs = [its["final"].to_numpy() for _, its in table.groupby("counted")]
    return {
        "ladder.exponent": by_seed(exponents, np.zeros(len(exponents))),
        "ladder.predicted_over_found": by_seed(100 * np.array(errors), unit="%"),
        "ladder.smallest_minus_largest": by_seed(rungs[0], rungs[-1], unit="nats"),
    }


def _shapes(lab: Lab) -> dict[str, Figure]:
    shapes = lab.records.tables["shapes"].set_index("model")
    found = {
        f"ladder.counted.{model}": Figure(counted / 1e6, "computed", "M")
        for model, counted in shapes["counted"].items()
    }
    quoted = lab.plan.settings["table_10"]
    apart = [abs(round(shapes["counted"][model] / 1e6, 2) - said) for model, said in quoted.items()]
    return found | {"ladder.largest_count_error": Figure(round(max(apart), 2), "computed", "M")}


# ===== vertical domains =====


def _domains(lab: Lab) -> dict[str, Figure]:
    found, records = {}, lab.records
    for domain in sorted(set(records.select("domains")["train_domain"])):
        trained, base = (records.select(arm, train_domain=domain) for arm in ("domains", "base"))
        items = records.items[records.items["item_set"] == trained["item_set"].iloc[0]]
        for other, shift in sorted(set(zip(items["domain"], items["shift"], strict=True))):
            right, labels = records.right(trained, other, shift, "yesno")
            before, same = records.right(base, other, shift, "yesno")
            if not np.array_equal(labels, same):
                raise ValueError(f"{domain}: base and trained models were scored on other items")
            found[f"domains.{domain}.{other}"] = two_level(right, labels)
            found[f"domains.{domain}.{other}.gain"] = two_level(
                right, labels, np.repeat(before, len(right), 0)
            )
    return corrected(found)


# ===== positions =====


def _positions(lab: Lab) -> dict[str, Figure]:
    tables = lab.records.tables
    its, found = tables["collisions"], {}
    exact = its[
        np.log2(its["slope"]) % 1 == 0
    ]  # a power of two: what is rounded is the distance alone
    for length, rows in exact[exact["form"] == "relative"].groupby("length"):
        found[f"positions.first_collision.{length}"] = Figure(
            int(rows["first_collision"].min()), "computed", "tokens"
        )
    for (form, length), rows in its.groupby(["form", "length"]):
        found[f"positions.distinct.{form}.{length}"] = Figure(
            float(rows["distinct"].mean() / length), "computed"
        )
    for (form, scores), rows in tables["attention"].groupby(["form", "scores"]):
        worst = rows.groupby("seed")["moved"].max()
        found[f"positions.moved.{form}.{scores}"] = by_seed(worst, kind="computed")
    for (rounded, offset), rows in tables["rotary"].groupby(["rounded", "offset"]):
        found[f"positions.changed.{rounded}.{offset}"] = Figure(
            float(rows["changed"].iloc[0]), "computed"
        )
    return found


# ===== the head's bytes =====


def _head(lab: Lab) -> dict[str, Figure]:
    found = {}
    for model, rows in lab.records.tables["head"].groupby("model"):
        for trained, its in rows.groupby("trained"):
            extra, weight = its.set_index("head")["extra_bytes"], int(its["weight_bytes"].iloc[0])
            kind = "trained" if trained else "frozen"
            for head, size in extra.items():
                found[f"head.{model}.{kind}.{head}"] = Figure(size / GIB, "predicted", "GiB")
            price = extra["NormHead"] - extra["linear"]
            found[f"head.{model}.{kind}.price"] = Figure(price / GIB, "predicted", "GiB")
            found[f"head.{model}.{kind}.price_copies"] = Figure(
                price / weight, "predicted", "copies"
            )
            for name, dearer, cheaper in (
                ("price_fused", "NormHead, fused", "linear, fused"),
                ("fused_saves", "NormHead", "NormHead, fused"),
            ):
                found[f"head.{model}.{kind}.{name}"] = Figure(
                    (extra[dearer] - extra[cheaper]) / GIB, "predicted", "GiB"
                )
    return found | _whole_steps(lab)


def _whole_steps(lab: Lab) -> dict[str, Figure]:
    found = {}
    for model, its in lab.records.tables["step"].groupby("model"):
        peak = its.set_index("head")["peak_bytes"]
        sizes = {
            **peak,
            "price": peak["NormHead"] - peak["linear"],
            "fused_saves": peak["NormHead"] - peak["NormHead, fused"],
        }
        found |= {
            f"step.{model}.{name}": Figure(size / GIB, "predicted", "GiB")
            for name, size in sizes.items()
        }
    return found


PARTS: Mapping[tuple[str, ...], Callable[[Lab], dict[str, Figure]]] = {
    ("stability", "frequencies"): _stability,
    ("ladder", "frequencies"): _trained_ladder,
    ("shapes",): _shapes,
    ("domains", "base"): _domains,
    ("collisions", "attention", "rotary"): _positions,
    ("head", "step"): _head,
}
"""The arms a part needs -> the part."""
