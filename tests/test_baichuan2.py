"""Baichuan 2's study: its measurements, and its figures from records whose outcome is known."""

import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import baichuan2_chapters as chapters
import baichuan2_head_bytes as head_bytes
from baichuan2 import figures, power_law, pretraining
from baichuan2_head_bytes import _alone
from baichuan2_ladder import frequencies, shape
from vramlab.baichuan.model import causal_loss
from vramlab.regimes.parameters import model_spec
from vramlab.runs.parameters import resolve
from vramlab.runs.preparation import prepare
from vramlab.studies.gallery import GALLERY
from vramlab.studies.plan import Pair, Plan, read_plan
from vramlab.studies.records import Records
from vramlab.studies.study import Lab


def test_the_papers_table_counts_all_but_embedding_and_head():
    quoted = read_plan("baichuan2").settings["table_10"]
    assert {
        model: round(shape(model)["counted"].iloc[0] / 1e6, 2) for model in list(quoted)[:2]
    } == dict(list(quoted.items())[:2])


def test_a_shape_counts_the_matrices_of_its_model():
    block = 4 * 96**2 + 3 * 96 * 192 + 2 * 96
    assert shape("tiny").to_dict("records") == [
        {
            "parameters": 2 * 768 * 96 + 5 * block + 96,
            "head_parameters": 768 * 96,
            "counted": 5 * block + 96,
            "hidden_size": 96,
            "layers": 5,
            "heads": 4,
        }
    ]


def test_every_head_is_measured_trained_and_frozen_and_in_a_whole_step(monkeypatch):
    monkeypatch.setattr(head_bytes, "_alone", lambda *asked: {"asked": asked})
    found = head_bytes.head_bytes("tiny", 7)
    assert [(row["head"], *row["asked"]) for row in found.to_dict("records")] == [
        (name, "tiny", 7, norm, fused, trained)
        for name, norm, fused in (
            ("linear", False, False),
            ("linear, fused", False, True),
            ("NormHead", True, False),
            ("NormHead, fused", True, True),
        )
        for trained in (True, False)
    ] and found["trained"].tolist() == [True, False] * 4

    def trace(spec, row, seq, batch):
        alive = {
            ("lm_head.weight", "weights", "x"): 30,
            ("lm_head", "temporaries", "x"): 10,
            ("model", "weights", "x"): 60,
        }
        steps.append((spec.config.norm_head, row.values["head"], row.values["weights"], seq, batch))
        return SimpleNamespace(alive=alive, peak_bytes=100, phase="update")

    steps = []
    monkeypatch.setattr(head_bytes, "trace", trace)
    found = head_bytes.step_bytes("tiny", "full", 8, "bf16")
    assert steps == [
        (False, "plain", "bf16", 8, 1),
        (False, "fused", "bf16", 8, 1),
        (True, "plain", "bf16", 8, 1),
        (True, "fused", "bf16", 8, 1),
    ]
    assert found["head_share"].tolist() == [0.4] * 4 and found["head"].tolist() == list(
        head_bytes.HEADS
    )
    assert set(found["peak_bytes"]) == {100} and set(found["phase"]) == {"update"}


def test_a_trained_head_takes_its_gradient_more_and_keeps_nothing_more():
    """Of one token, so that nothing else is as large; the weight and what comes in are there anyway
    and not counted."""
    config = model_spec("tiny").config
    trained, frozen = (_alone("tiny", 1, False, False, trained) for trained in (True, False))
    assert (
        trained["weight_bytes"]
        == frozen["weight_bytes"]
        == 2 * config.vocab_size * config.hidden_size
    )
    assert trained["extra_bytes"] - frozen["extra_bytes"] == trained["weight_bytes"]
    assert trained["kept_bytes"] == frozen["kept_bytes"]


def test_frequencies_are_the_best_that_constant_logits_reach():
    asked = {
        "steps": 2,
        "batch_size": 2,
        "max_length": 128,
        "train_items": 40,
        "train_domain": "all",
    }
    row = frequencies("tiny", 3, **asked).iloc[0]
    found = row["cross_entropy"]
    prepared = prepare(
        resolve({**asked, "recipe": "none", "objective": "lm", "seed": 3}), progress=False
    )
    batches = prepared.batches()
    labels = torch.cat([next(batches)[0]["labels"][:, 1:].flatten() for _ in range(2)])
    logits = torch.zeros(prepared.model.config.vocab_size, dtype=torch.float64, requires_grad=True)
    counts = torch.bincount(labels[labels >= 0], minlength=len(logits)).double()
    assert row["tokens"] == counts.sum() > 0
    with torch.no_grad():
        logits.copy_((counts / counts.sum()).clamp_min(1e-12).log())
    loss = causal_loss(logits.expand(len(labels), -1), labels)
    (slope,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(found, rel=1e-5) and slope.abs().max() < 1e-6


def test_normalising_the_published_head_keeps_one_copy_and_peaks_at_five_and_takes_nothing_fused():
    extra = {
        (norm, fused): _alone("baichuan2-7b", 1024, norm, fused, trained=True)
        for norm in (False, True)
        for fused in (False, True)
    }
    weight = extra[True, False]["weight_bytes"]
    peak = extra[True, False]["extra_bytes"] / weight
    kept = (extra[True, False]["kept_bytes"] - extra[False, False]["kept_bytes"]) / weight
    fused = (extra[True, True]["extra_bytes"] - extra[False, True]["extra_bytes"]) / weight
    assert 5 < peak < 5.1 and 0.99 < kept < 1.01 and 0 <= fused < 0.01


def _lab(entropies: dict) -> Lab:
    """(norm_head, z_loss_weight, seed) -> cross-entropies, of one learning rate; frequencies come
    to 4."""
    runs, steps = [], []
    for index, ((norm, weight, seed), entropy) in enumerate(entropies.items()):
        params = {"lr": 0.1, "seed": seed, "config": {"norm_head": norm, "z_loss_weight": weight}}
        runs.append(
            {
                "arm": "stability",
                "outcome": "ok",
                "run_id": f"r{index}",
                "lr": 0.1,
                "seed": seed,
                "parameters": 1,
                "params": params,
            }
        )
        steps += [
            {
                "run_id": f"r{index}",
                "step": at,
                "cross_entropy": value,
                "highest_logit": 9.0 - weight,
            }
            for at, value in enumerate(entropy)
        ]
    floor = pd.DataFrame(
        {"seed": sorted({seed for _, _, seed in entropies}), "cross_entropy": 4.0, "reason": ""}
    )
    pairs = [
        Pair(
            "apart",
            "stability",
            {"norm_head": False, "max_z": False},
            {"norm_head": True, "max_z": False},
            "tokens",
        )
    ]
    none = pd.DataFrame()
    records = Records(
        pd.DataFrame(runs), none, none, none, pd.DataFrame(steps), none, {"frequencies": floor}
    )
    return Lab(
        Plan("baichuan2", "", {}, pairs, {"spike": 0.3}, Path("none.yml"), ""),
        Path("none"),
        records,
    )


def test_a_run_diverges_above_the_frequencies_or_as_nan_and_a_spike_is_above_the_lowest_before_it():
    steady, jumps, lost = [7.0, 5.0, 5.2, 3.0], [7.0, 9.0, 5.0, 4.5], [7.0, 6.0, math.nan, math.nan]
    lab = _lab(
        {
            (norm, weight, seed): steady if norm else lost if seed == 1 else jumps
            for norm in (True, False)
            for weight in (0.0, 1.0)
            for seed in range(5)
        }
    )
    table = pretraining(lab)
    linear = table[~table["norm_head"]].set_index(["max_z", "seed"])
    assert linear["diverged"].all() and not table[table["norm_head"]]["diverged"].any()
    assert (
        linear.loc[(False, 0), "spikes"] == pytest.approx(1 / 3)
        and linear.loc[(False, 0), "jump"] == 2
    )
    assert linear.loc[(False, 1), "spikes"] == pytest.approx(
        2 / 3
    )  # what is no number is no better
    assert table[table["norm_head"]]["spikes"].max() == 0
    found = figures(lab)
    assert (
        found["stability.diverged.linear+max_z"].value == 1
        and found["stability.diverged.NormHead"].value == 0
    )
    assert found["stability.diverged.linear_minus_norm"].value == 1
    assert found["stability.logit_with_over_without_max_z.linear"].value == pytest.approx(8 / 9)


def test_pairs_are_compared_seed_by_seed():
    entropies = {
        (norm, 0.0, seed): [7.0, 3.0 + seed / 10 + (0 if norm else 0.5 + seed / 100)]
        for norm in (True, False)
        for seed in range(5)
    }
    lab = _lab(
        entropies | {(norm, 1.0, seed): [7.0, 3.0] for norm in (True, False) for seed in range(5)}
    )
    pair = figures(lab)["stability.pair.apart"]
    assert (
        pair.value == pytest.approx(0.52)
        and pair.low > 0.5
        and pair.p_holm < 1e-5
        and pair.seeds == 5
    )


def test_a_power_law_is_found_again():
    a, b = power_law(
        torch.tensor([1e5, 1e6, 1e7]).numpy(),
        9.0 * torch.tensor([1e5, 1e6, 1e7]).double().numpy() ** -0.1,
    )
    assert a == pytest.approx(9.0, rel=1e-4) and b == pytest.approx(0.1, rel=1e-4)


@pytest.mark.skipif(
    not (GALLERY / "baichuan2").exists(), reason="the study is not in outputs/gallery: make studies"
)
def test_every_chapter_is_drawn_from_what_was_committed():
    lab = Lab.committed("baichuan2")
    for chapter in (
        chapters.curves,
        chapters.ends,
        chapters.rungs,
        chapters.collisions,
        chapters.attention,
        chapters.rotary,
        chapters.head,
    ):
        figure = chapter(lab)
        assert figure.data and all(
            len(trace.x) == len(trace.y) > 0 for trace in figure.data if trace.y is not None
        )
    for chapter in (
        chapters.stability,
        chapters.pairs,
        chapters.shapes,
        chapters.domains,
        chapters.steps,
    ):
        table = chapter(lab)
        assert len(table) and table.notna().any(axis=None)
    answer = chapters.answer(lab)
    for name in (
        "stability.jump.linear_minus_norm",
        "ladder.predicted_over_found",
        "head.baichuan2-7b.trained.price",
    ):
        assert lab.figures[name].words() in answer
