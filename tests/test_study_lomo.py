"""LOMO's study: arithmetic against the model, hooks on real steps, and the choice of a best
learning rate, by hand."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

import lomo
import lomo_figures
from lomo_hooks import gradients_alive, scaled_updates
from vramlab.baichuan import BaichuanForCausalLM
from vramlab.regimes.parameters import model_spec
from vramlab.studies.plan import read_plan
from vramlab.studies.records import Records
from vramlab.studies.study import Lab

LABELS = np.array([0, 1] * 50)
SHARES = {("sgd", 0.3): 0.6, ("sgd", 1.2): 0.5, ("full", 2.5e-3): 0.8, ("full", 1e-2): 0.78}
LOSSES = {("sgd", 0.3): 0.9, ("sgd", 1.2): np.nan, ("full", 2.5e-3): 0.5, ("full", 1e-2): 0.6}


def _records(rows=(), **frames) -> Records:
    """Runs of arm rates: (regime, lr, seed), right in SHARES of the items, the same number of each
    label."""
    runs, calls = [], []
    for regime, lr, seed in rows:
        count = round(SHARES[regime, lr] * len(LABELS))
        right = np.arange(len(LABELS)) < count
        name = f"{regime}-{lr}-{seed}"
        params = {
            "regime": regime,
            "lr": lr,
            "seed": seed,
            **({"axes": {}} if regime == "full" else {}),
        }
        runs.append(
            {
                "arm": "rates",
                "outcome": "ok",
                "run_id": name,
                "params": params,
                "seed": seed,
                "lr": lr,
                "regime": regime,
                "loss_last": LOSSES[regime, lr],
                "weights_hash": name,
            }
        )
        calls.append(
            {
                "run_id": name,
                "item_set": "x",
                "scoring": "yesno",
                "bits": np.packbits(right).tobytes(),
            }
        )
    items = pd.DataFrame(
        {
            "domain": "news",
            "shift": "none",
            "label": LABELS,
            "item_set": "x",
            "at": range(len(LABELS)),
        }
    )
    known = {field.name: pd.DataFrame() for field in fields(Records)} | {"tables": {}}
    return Records(
        **{
            **known,
            "runs": pd.DataFrame(runs),
            "calls": pd.DataFrame(calls),
            "items": items,
            **frames,
        }
    )


@pytest.fixture(scope="module")
def plan():
    return read_plan("lomo")


def test_the_best_rate_is_chosen_by_training_loss_and_not_by_what_is_scored(plan):
    lab = Lab(
        plan,
        plan.path.parent,
        _records((regime, lr, seed) for regime, lr in SHARES for seed in range(5)),
    )
    table = lomo.rates(lab)
    assert len(table) == 4 and set(table[table["best"]]["lr"]) == {0.3, 2.5e-3}
    assert (
        lab.figures["lomo_minus_adamw"].value == pytest.approx(-0.2)
        and lab.figures["lomo_minus_adamw"].seeds == 5
    )
    assert lab.figures["rate_drop_lomo"].value == pytest.approx(0.1)
    assert (
        lab.figures["rate_drop_lomo_minus_adamw"].value == pytest.approx(0.08)
        and lab.figures["rate_drop_adamw"].n == 100
    )
    assert lab.figures["lomo_against_adamw"].value == pytest.approx(
        -0.2
    )  # as the file names it, at the rows' own rates
    drawn, shown, compared = lomo_figures.learning_rates(lab)
    assert (
        {trace.name for trace in drawn.data} == {"LOMO", "AdamW"}
        and len(shown) == 4
        and "-20.0" in set(compared["points"])
    )
    assert "-20.0" in lomo_figures.takeaway(lab)


def test_one_rate_has_no_best_and_nothing_has_no_figures(plan):
    one = _records((name, lr, 0) for name, lr in (("sgd", 0.3), ("full", 2.5e-3)))
    assert "lomo_minus_adamw" not in Lab(plan, plan.path.parent, one).figures
    lab = Lab(plan, plan.path.parent, _records())
    assert lab.figures == {} and not any(chapter(lab) for chapter in lomo_figures.CHAPTERS.values())
    assert "not there" in lomo_figures.takeaway(lab) and "not there" in lomo_figures.same(lab)


def test_same_weights_are_counted_by_seed(plan):
    rows = pd.DataFrame(
        [
            {
                "arm": "same",
                "outcome": "ok",
                "run_id": f"{name}{seed}",
                "params": {"regime": name},
                "seed": seed,
                "weights_hash": f"{seed}" if seed else name,
            }
            for name in ("lomo", "sgd")
            for seed in range(5)
        ]
    )
    assert (
        lomo.figures(Lab(plan, plan.path.parent, _records(runs=rows)))["seeds_that_differ"].value
        == 1
    )


def test_arithmetic_counts_the_models_parameters():
    model = BaichuanForCausalLM(model_spec("tiny").config)
    sizes = [param.numel() for param in model.parameters()]
    assert lomo.states_bytes("tiny", "master") == 16 * sum(sizes) and lomo.states_bytes(
        "tiny", "sgd"
    ) == 8 * sum(sizes)
    assert lomo.states_bytes("tiny", "lomo") == 2 * (sum(sizes) + max(sizes))
    assert lomo.states_bytes("llama-7b", "master") == 16 * 6_738_415_616  # as published of LLaMA-7B


def test_one_gradient_lives_where_hooks_use_it_and_all_where_a_step_does():
    lives = gradients_alive("tiny").set_index("row")
    assert lives["most_bytes"].tolist() == [
        lives["largest_bytes"]["lomo"],
        lives["gradients_bytes"]["sgd"],
    ]


def test_hooks_under_a_scaler_step_too_far_and_ours_do_not():
    ratio = scaled_updates("tiny", 1024.0).set_index("how")["ratio"]
    assert ratio["hooks under GradScaler"] == pytest.approx(1024, rel=1e-3) and ratio[
        "ours"
    ] == pytest.approx(1, rel=1e-4)
