"""Structured gradient approximation (Zhu 2024): the figures that its claims look at, all from
records.

The paper fixes no construction, so two are held against its table. `literal` is its equations as
they stand: a module behind the final norm whose output is subtracted from a code, all trained by
the task's loss; exactly differentiated, so nothing in it approximates a gradient, and the cosine
says how near it comes to one. `residual` guesses the gradients of adapters from the head's, with a
true backward every eighth step. What each has to beat: `identity`, the head's gradient for every
block's; `random`, a fixed random map of it; `anchored identity` and `true writers`, which are
`residual` with nothing learned and with nothing guessed.

Time is a ratio of step times, taken in turns on this machine, and a ratio of FLOPs at 7B. The
residual construction's are means over its cycle; its guessing steps' FLOPs are the identity's,
since what the approximator adds is no thousandth of a forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import pandas as pd

from vramlab.studies.estimates import Figure, NotRun, available, by_seed, corrected, ratio_by_seed
from vramlab.studies.study import Lab

CYCLE = 8
"""Steps of the residual construction from anchor to anchor."""
TABLE, DEPTH = "table", "depth"
BASELINES = ("identity", "random")
COMPARED = ("full", "literal", "residual", *BASELINES)
"""Rows of every plot but the table."""
TURNS = "95%: repeats on one machine"
BOOLQ_DEV = 3270


def figures(lab: Lab) -> dict[str, Figure]:
    """Every number of the study by name; those whose runs are not there are left out."""
    found: dict[str, Figure] = {}
    for chapter in (
        _accuracies,
        _right,
        _pairs,
        _depths,
        _grids,
        _cosines,
        _times,
        _flops,
        _bytes,
        _published,
    ):
        found |= dict(chapter(lab))
    return found


def rows_of(lab: Lab, arm: str, name: str, where: Mapping | None = None) -> pd.DataFrame:
    """The arm's runs of the row called `name` in the settings, by seed. Raises: NotRun, when there
    is none."""
    return lab.records.select(arm, **lab.plan.settings["rows"][name], **(where or {}))


def _accuracies(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`accuracy.<row>.<shift>`: balanced, at the threshold of the run's own validation items;
    `trained.<row>`: share of all parameters; `loss.<row>`: of the last ten steps."""
    for name in lab.plan.settings["rows"]:
        yield from available(
            {
                f"accuracy.{name}.{shift}": lambda name=name, place=place: lab.records.balanced(
                    rows_of(lab, TABLE, name), *place
                )
                for shift, place in lab.plan.settings["places"].items()
            }
        )
        yield from available(
            {
                f"trained.{name}": lambda name=name: _trained(rows_of(lab, TABLE, name)),
                f"loss.{name}": lambda name=name: by_seed(rows_of(lab, TABLE, name)["loss_last"]),
            }
        )


def _trained(rows: pd.DataFrame) -> Figure:
    return Figure(
        float(rows["trainable_parameters"].iloc[0] / rows["parameters"].iloc[0]),
        "computed",
        "of all parameters",
    )


def _right(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`right.<row>`: share of answers that are right where yes and no are compared as they are,
    BoolQ's metric; `right.majority`: of always giving the answer that training questions have more
    often."""

    def made(rows: pd.DataFrame, scoring: str) -> Figure:
        domain, shift = lab.plan.settings["places"]["none"]
        found = lab.records.accuracy
        if not len(found):
            raise NotRun("no run was scored")
        its = found[
            (found["domain"] == domain)
            & (found["shift"] == shift)
            & (found["metric"] == "accuracy")
            & (found["scoring"] == scoring)
        ].set_index("run_id")
        shown = its.loc[its.index.intersection(rows["run_id"], sort=False)]
        return replace(by_seed(shown["value"]), n=int(shown["n"].iloc[0]))

    for name in lab.plan.settings["rows"]:
        yield from available(
            {f"right.{name}": lambda name=name: made(rows_of(lab, TABLE, name), "yesno")}
        )
    yield from available(
        {
            "right.majority": lambda: replace(
                made(lab.records.select(TABLE), "majority"), kind="computed", seeds=0, contains=""
            )
        }
    )


def _pairs(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`difference.<pair>`: balanced accuracy of one minus the other's, Holm over all pairs named in
    the file."""

    def made(pair) -> Figure:
        one, other = (lab.records.select(pair.arm, **where) for where in (pair.one, pair.other))
        return lab.records.difference(one, other, lab.plan.settings["domain"], pair.equal)

    yield from corrected(
        dict(
            available(
                {f"difference.{pair.name}": lambda pair=pair: made(pair) for pair in lab.plan.pairs}
            )
        )
    ).items()


def _depths(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`depth.<construction>.<layers>` and `depth_cosine.<construction>.<layers>`"""
    for construction, depths in lab.plan.settings["depths"].items():
        for layers, where in depths.items():
            yield from available(
                {
                    f"depth.{construction}.{layers}": lambda where=where: lab.records.balanced(
                        lab.records.select(DEPTH, **where), lab.plan.settings["domain"]
                    ),
                    f"depth_cosine.{construction}.{layers}": lambda where=where: _cosine(
                        lab, lab.records.select(DEPTH, **where)
                    ),
                }
            )


def _grids(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`samples.<row>.<training items>` and `length.<row>.<records>`, each arm by the parameter that
    the settings name."""
    for arm, parameter in lab.plan.settings["grids"].items():
        for value in sorted({cell.params[parameter] for cell in lab.plan.arms[arm]}):
            yield from available(
                {
                    f"{arm}.{name}.{value}": partial(_balanced, lab, arm, name, {parameter: value})
                    for name in COMPARED
                }
            )


def _balanced(lab: Lab, arm: str, name: str, where: Mapping) -> Figure:
    return lab.records.balanced(rows_of(lab, arm, name, where), lab.plan.settings["domain"])


def probes_of(lab: Lab, rows: pd.DataFrame) -> pd.DataFrame:
    """Cosines of the runs `rows`, with their seed; the first step, where an approximator is still
    what it was made as, is left out. Raises: NotRun, when they were not probed."""
    probes = lab.records.probes
    its = (
        probes[probes["run_id"].isin(rows["run_id"]) & (probes["step"] > 0)]
        if len(probes)
        else probes
    )
    if not len(its):
        raise NotRun("no probes")
    return its.merge(rows[["run_id", "seed"]], on="run_id")


def _cosine(lab: Lab, rows: pd.DataFrame, site: str = "all") -> Figure:
    """Mean over probes, then over seeds."""
    its = probes_of(lab, rows)
    means = its[its["site"] == site].groupby("seed")["cosine"].mean()
    if not len(means):
        raise NotRun(site)
    return by_seed(means)


def _cosines(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`cosine.<row>`: of the guess and the true gradient on the same batch, all sites together;
    `cosine.<row>.bottom`: of the lowest site that is guessed."""
    for name in ("literal", "residual", "anchored identity", *BASELINES):
        yield from available(
            {
                f"cosine.{name}": lambda name=name: _cosine(lab, rows_of(lab, TABLE, name)),
                f"cosine.{name}.bottom": lambda name=name: _cosine(
                    lab, rows_of(lab, TABLE, name), "layers.0.self_attn.o_proj"
                ),
            }
        )


def seconds(lab: Lab) -> pd.DataFrame:
    """Step times by `seq`, `repeat` (index) and row (columns), the residual construction's as the
    mean of its cycle; empty without the measurement."""
    table = lab.records.tables.get("time", pd.DataFrame())
    if "step_s" not in table:
        return pd.DataFrame()
    wide = table.pivot_table(index=["seq", "repeat"], columns="row", values="step_s")
    wide["residual"] = ((CYCLE - 1) * wide["residual, guess"] + wide["residual, anchor"]) / CYCLE
    return wide


def _times(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`time.<row>.<seq>`: step time over full's; `time.splitlora over lora`"""
    wide = seconds(lab)
    for seq, its in wide.groupby(level="seq") if len(wide) else ():
        pairs = {f"time.{name}.{seq}": (name, "full") for name in its.columns if name != "full"}
        for figure, (one, other) in (
            pairs | {f"time.splitlora over lora.{seq}": ("splitlora", "lora")}
        ).items():
            yield figure, replace(ratio_by_seed(its[one], its[other]), seeds=0, contains=TURNS)


def predicted(lab: Lab) -> pd.DataFrame:
    """Forecasts that could be made, by regime and length; empty without any."""
    table = lab.records.tables.get("forecast", pd.DataFrame())
    return (
        table[table["reason"] == ""]
        if "flops" in table
        else pd.DataFrame(columns=["regime", "seq"])
    )


def _flops(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`flops.<row>`: of one step at 7B, 512 tokens, over full's."""
    table = predicted(lab)
    its = table[table["seq"] == 512].set_index("regime")["flops"].to_dict() if len(table) else {}
    if {"approx_residual", "approx_identity"} <= its.keys():
        its["approx_residual"] = (
            (CYCLE - 1) * its["approx_identity"] + its["approx_residual"]
        ) / CYCLE
    for name, regime in lab.plan.settings["regimes"].items() if "full" in its else ():
        if regime in its and name != "full":
            yield f"flops.{name}", Figure(its[regime] / its["full"], "predicted", "times")


def _bytes(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`peak.<row>.<seq>`: allocated at 7B, one sequence."""
    for name, regime in lab.plan.settings["regimes"].items():
        for _, row in (table := predicted(lab))[table["regime"] == regime].iterrows():
            yield (
                f"peak.{name}.{row['seq']}",
                Figure(row["peak_allocated_bytes"] / 2**30, "predicted", "GiB"),
            )


def _published(lab: Lab) -> Iterator[tuple[str, Figure]]:
    """`boolq_noise`: half the width of a 95 % interval of the difference of two models near .86 on
    BoolQ's validation split, were their errors independent; of errors that coincide it is less."""
    each = 0.86 * (1 - 0.86) / BOOLQ_DEV
    yield "boolq_noise", Figure(100 * 1.96 * math.sqrt(2 * each), "computed", "points", n=BOOLQ_DEV)
