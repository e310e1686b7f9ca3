"""The study of gradient approximation: its file says what its figures need; figures of known
records."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import gradient_approximation as study
import gradient_approximation_figures as chapters
from vramlab.studies.claims import decide, read_claims
from vramlab.studies.plan import PARAMS, read_plan
from vramlab.studies.records import Records
from vramlab.studies.study import Lab

PLAN = read_plan("gradient_approximation")
FILES = ("gradient_approximation.yml", "gradient_approximation-gpu.yml")


@pytest.mark.parametrize("file", FILES)
def test_every_row_pair_and_depth_is_five_runs_and_no_others(file):
    plan = read_plan(PARAMS / file)

    def runs(arm, where):
        return [cell for cell in plan.arms[arm] if where.items() <= cell.params.items()]

    sides = [(pair.arm, where) for pair in plan.pairs for where in (pair.one, pair.other)]
    asked = [("table", where) for where in plan.settings["rows"].values()] + sides
    asked += [
        ("depth", where) for depths in plan.settings["depths"].values() for where in depths.values()
    ]
    assert all(
        sorted(cell.params["seed"] for cell in runs(*one)) == [0, 1, 2, 3, 4] for one in asked
    )
    assert sum(len(runs("table", where)) for where in plan.settings["rows"].values()) == len(
        plan.arms["table"]
    )
    # the table's literal and residual runs are the depth arm's: made once
    assert (
        len({cell.name for cell in plan.arms["table"]} & {cell.name for cell in plan.arms["depth"]})
        >= 10
    )
    for arm, parameter in plan.settings["grids"].items():
        assert {"full", "literal", "residual", "identity", "random"} == {
            name for name, where in plan.settings["rows"].items() if runs(arm, where)
        }
        assert all(parameter in cell.params for cell in plan.arms[arm])


def _lab(**changes) -> Lab:
    empty = {
        name: pd.DataFrame() for name in ("runs", "items", "calls", "accuracy", "steps", "probes")
    }
    return Lab(PLAN, Path(), Records(**{**empty, "tables": {}, **changes}))


def test_time_and_work_of_the_residual_construction_are_means_of_its_cycle():
    step_s = {
        "full": 4.0,
        "literal": 1.0,
        "residual, guess": 1.0,
        "residual, anchor": 5.0,
        "lora": 2.0,
        "splitlora": 2.0,
    }
    time = pd.DataFrame(
        [
            {"row": row, "seq": 128, "repeat": repeat, "step_s": value * (1 + repeat)}
            for row, value in step_s.items()
            for repeat in range(3)
        ]
    )  # a slower machine slows all alike
    flops = {"full": 8.0, "approx_residual": 16.0, "approx_identity": 2.0, "lora": 6.0}
    forecast = pd.DataFrame(
        [
            {
                "regime": regime,
                "seq": 512,
                "flops": value,
                "peak_allocated_bytes": 3 << 30,
                "reason": "",
            }
            for regime, value in flops.items()
        ]
    )
    found = _lab(tables={"time": time, "forecast": forecast}).figures
    assert found["time.residual.128"].value == pytest.approx((7 * 1 + 5) / 8 / 4)
    assert found["time.literal.128"].high == pytest.approx(0.25)
    assert (
        found["time.splitlora over lora.128"].value == pytest.approx(1)
        and found["time.lora.128"].kind == "measured"
    )
    assert (
        found["flops.residual"].value == (7 * 2 + 16) / 8 / 8 and found["flops.lora"].value == 0.75
    )
    assert found["peak.residual.512"].value == 3 and "flops.full" not in found
    verdicts = {
        claim.id: decide(claim, found).word
        for claim in read_claims()
        if claim.study == "gradient_approximation"
    }
    assert (
        verdicts["zhu-time"] == verdicts["zhu-time-lora"] == "reproduced"
        and verdicts["zhu-time-splitlora"] == "not reproduced"
    )
    assert verdicts["zhu-accuracy"] == verdicts["zhu-boolq"] == "cannot be tested here"


def _probed(name: str, cosines: list[float]) -> tuple[list[dict], list[dict]]:
    """One run a seed, probed at steps 0, 20 and 40; only the last two count."""
    where = PLAN.settings["rows"][name]
    runs = [
        {
            "arm": "table",
            "outcome": "ok",
            "run_id": f"{name}-{seed}",
            "seed": seed,
            "params": {**where, "seed": seed},
            "parameters": 1000,
            "trainable_parameters": 20,
            "loss_last": 0.5,
        }
        for seed in range(len(cosines))
    ]
    probes = [
        {"run_id": f"{name}-{seed}", "step": step, "site": "all", "cosine": value}
        for seed, mean in enumerate(cosines)
        for step, value in ((0, -1.0), (20, mean - 0.1), (40, mean + 0.1))
    ]
    return runs, probes


def test_cosines_are_means_over_training_after_the_first_step_then_over_seeds():
    (runs, probes), (others, more) = (
        _probed("literal", [0.0, 0.02, 0.01, -0.02, -0.01]),
        _probed("identity", [0.7] * 5),
    )
    found = _lab(runs=pd.DataFrame(runs + others), probes=pd.DataFrame(probes + more)).figures
    assert found["cosine.literal"].value == pytest.approx(0) and found[
        "cosine.identity"
    ].value == pytest.approx(0.7)
    assert found["trained.literal"].value == 0.02 and found["loss.literal"].seeds == 5
    claim = next(claim for claim in read_claims() if claim.id == "zhu-gradient")
    assert decide(claim, found).word == "not reproduced"


def test_without_runs_there_is_only_arithmetic_and_every_chapter_says_so():
    lab = _lab()
    assert set(lab.figures) == {"boolq_noise"} and 1.6 < lab.figures["boolq_noise"].value < 1.7
    drawn = (
        chapters.curves(lab),
        chapters.cosines(lab),
        *chapters.depth(lab),
        chapters.times(lab),
        chapters.length(lab),
        chapters.shift(lab),
        chapters.grid(lab, "samples", "", ""),
    )
    assert not any(drawn) and chapters.memory(lab).empty and chapters.pairs(lab).empty


def test_the_notebook_shows_every_chapter_of_the_study():
    notebook = json.loads(
        (PARAMS.parents[1] / "notebooks" / "studies" / "gradient_approximation.ipynb").read_text()
    )
    code = "\n".join(
        "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"
    )
    made = [
        name
        for name, its in vars(chapters).items()
        if getattr(its, "__module__", "") == chapters.__name__
        and "lab" in its.__annotations__
        and not name.startswith("_")
    ]
    inner = {"against", "baselines", "grid"}  # called by others
    assert all(f"chapters.{name}(" in code for name in set(made) - inner) and set(
        study.COMPARED
    ) >= set(study.BASELINES)
