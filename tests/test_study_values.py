"""The studies' figures by value: records made by hand, and every figure worked out from them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import baichuan2
import checkpointing
import chunkft
import gradient_approximation as approximation
import lomo
from vramlab.regimes.parameters import model_spec
from vramlab.studies.plan import Pair
from vramlab.studies.records import Records

GIB = 1 << 30
LABELS = np.array([0, 1] * 50)
NONE = ("runs", "items", "calls", "accuracy", "steps", "probes")


def judged(share: float) -> np.ndarray:
    """(items,) right calls: the first `share` of all items, as many of each label."""
    return np.arange(len(LABELS)) < round(share * len(LABELS))


def run(
    arm: str,
    seed: int,
    share: float = 1.0,
    axes: dict | None = None,
    regime: str = "chunkft",
    **more,
) -> dict:
    """A finished run, right in a share of the items. `params` hold what tells it from others."""
    asked = {
        "regime": regime,
        "seed": seed,
        "train_domain": "news",
        **({"axes": axes} if axes else {}),
        **more.pop("params", {}),
    }
    said = {
        "arm": arm,
        "outcome": "ok",
        "axes": json.dumps(axes or {}),
        "params": asked,
        "loss_last": 1.0,
        "weights_hash": "w",
        "run_id": f"{arm}-{'-'.join(map(str, asked.values()))}",
        "share": share,
        "item_set": "x",
    }
    return said | {name: value for name, value in asked.items() if name != "axes"} | more


def study(runs=(), tables=None, pairs=(), settings=None, **frames) -> SimpleNamespace:
    """A study whose records are these runs and tables."""
    calls = [
        {
            "run_id": each["run_id"],
            "item_set": "x",
            "scoring": "yesno",
            "bits": np.packbits(judged(each["share"])).tobytes(),
        }
        for each in runs
    ]
    items = pd.DataFrame(
        {
            "domain": "news",
            "shift": "none",
            "label": LABELS,
            "item_set": "x",
            "at": range(len(LABELS)),
        }
    )
    known = {
        **{name: pd.DataFrame() for name in NONE},
        "runs": pd.DataFrame(list(runs)),
        "calls": pd.DataFrame(calls),
        "items": items,
    }
    records = Records(
        **{**known, **frames},
        tables={name: pd.DataFrame(rows) for name, rows in (tables or {}).items()},
    )
    return SimpleNamespace(
        plan=SimpleNamespace(pairs=list(pairs), settings=settings or {}, arms={}), records=records
    )


def values(figures) -> dict[str, float]:
    return {name: figure.value for name, figure in dict(figures).items()}


# ChunkFT ------------------------------------------------------------------------------------------


def chunks(**fields) -> dict:
    return {"trains": {"chunks": fields}}


def forecast(peak_gib: float | None, **more) -> dict:
    size = None if peak_gib is None else peak_gib * GIB
    return {
        "peak_allocated_bytes": size,
        "peak_reserved_bytes": size and 2 * size,
        "host_bytes": 0,
        "axes": "",
        "regime": "chunkft",
        **more,
    }


def test_chunks_bytes_by_hand():
    axes = {state: json.dumps(chunks(state=state)) for state in ("host", "device")}
    lab = study(
        tables={
            "bytes_count": [
                forecast(40, regime="full"),
                forecast(10, axes=json.dumps(chunks(count=128))),
                forecast(None, axes=json.dumps(chunks(count=8))),
            ],
            "bytes_peers": [forecast(16, regime="lora"), forecast(7, regime="lomo")],
            "bytes_fate": [
                forecast(11, axes=axes["host"], host_bytes=5 * GIB),
                forecast(15, axes=axes["device"]),
            ],
            "bytes_shapes": [
                forecast(9, model="small", regime="chunkft_128", margin_bytes=3 * GIB),
                forecast(30, model="small", regime="full", margin_bytes=-2 * GIB),
            ],
        }
    )
    assert values(chunkft._bytes(lab)) == {
        "peak.K=1": 40,
        "peak.K=128": 10,
        "peak.lora": 16,
        "saved.lora": 6,
        "peak.lomo": 7,
        "saved.lomo": -3,
        "peak.host": 11,
        "host.host": 5,
        "peak.device": 15,
        "host.device": 0,
        "saved.host": 4,
        "peak.small": 9,
        "left.small": 3,
        "peak.small, full": 30,
        "left.small, full": -2,
    }
    assert chunkft.forecasts(lab, "bytes_fate")["reserved"].tolist() == [22, 30]
    assert not any(
        name.startswith("saved")
        for name in values(
            chunkft._bytes(
                study(
                    tables={
                        "bytes_peers": [forecast(16, regime="lora")],
                        "bytes_fate": [forecast(11, axes=axes["host"])],
                    }
                )
            )
        )
    )


def test_runs_are_told_apart_by_a_field_of_their_chunks():
    lab = study(
        [
            run("order", 0, axes=chunks(count=8)),
            run("order", 0, axes=chunks(count=8, order="random")),
            run("order", 1, regime="full"),
            run("other", 0, axes=chunks(count=4)),
        ]
    )
    found = chunkft.by_chunks(lab, "order", "order")
    assert {name: rows["seed"].tolist() for name, rows in found.items()} == {
        "ascending": [0, 1],
        "random": [0],
    }
    assert {name: len(rows) for name, rows in chunkft.by_chunks(lab, "order", "count").items()} == {
        8: 2,
        1: 1,
    }
    assert chunkft.by_chunks(lab, "nowhere", "count") == {}


def test_chunks_accuracies_and_losses_are_by_count_interval_and_rate():
    lab = study(
        [run("count", seed, 0.5 + seed / 10, chunks(count=8), loss_last=seed) for seed in (0, 2)]
        + [run("interval", seed, 0.8, chunks(interval=50), loss_last=3 + seed) for seed in (0, 1)]
        + [
            run("rate", 0, share, lr=lr, params={"lr": lr})
            for lr, share in ((1e-3, 0.6), (5e-3, 0.9))
        ]
    )
    assert values(chunkft._counts(lab)) == pytest.approx({"balanced.K=8": 0.6, "final_loss.K=8": 1})
    assert values(chunkft._losses(lab)) == pytest.approx(
        {
            "final_loss.T=50": 3.5,
            "balanced.T=50": 0.8,
            "balanced.lr=0.001": 0.6,
            "balanced.lr=0.005": 0.9,
        }
    )


def test_the_states_fate_changes_the_weights_of_so_many_seeds():
    def fate(state, seed, weights):
        return run("fate", seed, axes=chunks(state=state), weights_hash=weights)

    lab = study(
        [
            fate("host", 0, "a"),
            fate("host", 1, "b"),
            fate("host", 2, "c"),
            fate("device", 0, "a"),
            fate("device", 1, "z"),
            fate("device", 3, "c"),
        ]
    )
    found = dict(chunkft._same_weights(lab))["seeds_that_differ.device"]
    assert (found.value, found.seeds) == (1, 2)


def test_distances_are_those_at_the_end_of_all_weights_by_pair():
    rows = [
        {
            "seed": seed,
            "row": "K",
            "against": "dense",
            "progress": progress,
            "layer": layer,
            "relative": relative,
        }
        for progress, layer, seed, relative in (
            (0.5, "all", 0, 9),
            (1.0, "all", 0, 0.2),
            (1.0, "all", 1, 0.4),
            (1.0, "head", 0, 7),
            (1.0, "all", 2, math.nan),
        )
    ]
    found = dict(chunkft._distances(study(tables={"trajectory": rows})))
    assert (
        values(found) == pytest.approx({"distance.K against dense": 0.3})
        and found["distance.K against dense"].seeds == 2
    )
    assert not dict(chunkft._distances(study()))


@pytest.mark.parametrize(
    ("count", "first", "last"), [(30, 1, 28), (5, 0, 4), (19, 0, 18), (20, 0.5, 18.5)]
)
def test_a_runs_ends_are_the_first_and_the_last_tenth_of_its_steps(count, first, last):
    steps = pd.DataFrame(
        {
            "run_id": ["a"] * count + ["b"] * 4,
            "step": [*range(count)][::-1] + [0] * 4,
            "loss": [float(at) for at in range(count)][::-1] + [99.0] * 4,
        }
    )
    assert chunkft._ends(study(steps=steps), "a") == (first, last)


def test_a_task_counts_where_chunks_beat_dense_training_by_the_corrected_test():
    shares = {"AdamW, equal tokens": (1.0, 0.5, 5), "law": (0.5, 1.0, 3), "medicine": (0.8, 0.8, 5)}
    runs = [
        run("tasks", seed, share, regime=one, params={"train_domain": name, "pair": name})
        for name, (ours, theirs, seeds) in shares.items()
        for one, share in (("chunkft", ours), ("full", theirs))
        for seed in range(seeds)
    ]
    pairs = [
        Pair(
            name,
            "tasks",
            {"regime": "chunkft", "pair": name},
            {"regime": "full", "pair": name},
            "tokens",
        )
        for name in shares
    ]
    items = pd.DataFrame(
        {
            "domain": np.repeat([*shares], len(LABELS)),
            "shift": "none",
            "label": np.tile(LABELS, 3),
            "item_set": "x",
            "at": range(3 * len(LABELS)),
        }
    )
    calls = pd.DataFrame(
        [
            {
                "run_id": each["run_id"],
                "item_set": "x",
                "scoring": "yesno",
                "bits": np.packbits(np.tile(judged(each["share"]), 3)).tobytes(),
            }
            for each in runs
        ]
    )
    steps = pd.DataFrame(
        [
            {"run_id": each["run_id"], "step": step, "loss": loss - each["seed"]}
            for each in runs
            for step, loss in enumerate((3.0, 2.0, 1.5))
        ]
    )
    lab = study(runs, pairs=pairs, items=items, calls=calls, steps=steps)
    found = dict(chunkft._tasks(lab))
    assert values(found) == {
        "tasks_above": 1,
        **dict.fromkeys((f"fall.{name}" for name in shares), -1.5),
    }
    assert (found["tasks_above"].n, found["tasks_above"].seeds) == (100, 3)
    pairs = dict(chunkft._pairs(lab))
    assert (
        pairs["accuracy.law"].value == -0.5
        and pairs["accuracy.law"].p_holm < 0.05
        and pairs["accuracy.law"].equal == "tokens"
    )
    two = study(runs, pairs=lab.plan.pairs[:2], items=items, calls=calls, steps=steps)
    assert "tasks_above" not in dict(chunkft._tasks(two))


def test_a_comparison_of_one_seed_has_no_p_and_none_of_its_family_pays_for_it():
    runs = [
        run("a", seed, share, regime=regime, loss_last=loss + seed / 10)
        for seed in range(2)
        for regime, share, loss in (("chunkft", 0.9, 2.0), ("full", 0.6, 1.0))
    ]
    runs += [run("b", 0, 0.9), run("b", 0, 0.6, regime="full"), run("b", 7, 0.6, regime="full")]
    pairs = [Pair(arm, arm, {"regime": "chunkft"}, {"regime": "full"}, "tokens") for arm in "ab"]
    found = dict(chunkft._pairs(study(runs, pairs=pairs)))
    assert (
        math.isnan(found["accuracy.b"].p)
        and math.isnan(found["accuracy.b"].p_holm)
        and found["accuracy.b"].seeds == 1
    )
    assert found["accuracy.a"].p_holm == found["accuracy.a"].p < 1 and found[
        "loss.a"
    ].value == pytest.approx(1)
    assert found["loss.a"].equal == "tokens"


def test_a_cycles_cost_is_its_step_time_over_adamws_round_by_round():
    rows = [
        {"row": name, "round": at, "step_s": seconds * (1 + at), "updates": updates}
        for name, seconds, updates in (("full", 2.0, 1000), ("chunks", 1.0, 125))
        for at in range(3)
    ]
    found = dict(chunkft._costs(study(tables={"cost": rows})))
    assert values(found) == pytest.approx(
        {"step_time.full": 1, "step_time.chunks": 0.5, "updates.full": 1000, "updates.chunks": 125}
    )
    assert found["step_time.chunks"].low == pytest.approx(0.5)
    assert values(chunkft._slices(study(tables={"slices": [{"error": 0.25}, {"error": 0.5}]}))) == {
        "slice_error": 0.5
    }


# Structured gradient approximation ----------------------------------------------------------------


def test_answers_that_are_right_and_the_share_of_parameters_that_trains():
    places = {"none": ("news", "none")}
    runs = [
        run(
            "table",
            seed,
            0.5 + seed / 10,
            regime=regime,
            parameters=1000,
            trainable_parameters=25,
            loss_last=2.0 + seed,
        )
        for regime in ("one", "two")
        for seed in (0, 2)
    ]
    scored = [
        {
            "run_id": each["run_id"],
            "domain": domain,
            "shift": "none",
            "metric": metric,
            "scoring": scoring,
            "n": 40,
            "value": value + each["seed"] / 10,
        }
        for each in runs
        for domain, metric, scoring, value in (
            ("news", "accuracy", "yesno", 0.6),
            ("news", "accuracy", "majority", 0.3),
            ("law", "accuracy", "yesno", 0.1),
            ("news", "auc", "yesno", 0.2),
        )
        if scoring != "majority" or each["seed"] == 0
    ]
    settings = {
        "rows": {"ours": {"regime": "one"}, "absent": {"regime": "three"}},
        "places": places,
    }
    lab = study(runs, settings=settings, accuracy=pd.DataFrame(scored))
    found = dict(approximation._right(lab))
    assert (
        values(found) == pytest.approx({"right.ours": 0.7, "right.majority": 0.3})
        and found["right.ours"].n == 40
    )
    assert (
        found["right.ours"].seeds,
        found["right.majority"].seeds,
        found["right.majority"].kind,
    ) == (2, 0, "computed")
    assert values(approximation._accuracies(lab)) == pytest.approx(
        {"accuracy.ours.none": 0.6, "trained.ours": 0.025, "loss.ours": 3}
    )
    assert not dict(approximation._right(study(runs, settings=settings)))


def test_cosines_are_of_the_site_asked_for():
    bottom = "layers.0.self_attn.o_proj"
    runs = [run("table", seed, regime="residual") for seed in (0, 1)] + [
        run("depth", 0, regime="residual")
    ]
    probes = pd.DataFrame(
        [
            {"run_id": each["run_id"], "step": step, "site": site, "cosine": value + each["seed"]}
            for each in runs
            for step, site, value in (
                (0, "all", 99),
                (1, "all", 0.2),
                (2, "all", 0.4),
                (1, bottom, 0.1),
            )
        ]
    )
    settings = {
        "rows": {
            name: {"regime": name}
            for name in ("literal", "residual", "anchored identity", "identity", "random")
        },
        "depths": {"residual": {3: {"regime": "residual"}}},
        "domain": "news",
    }
    lab = study(runs, settings=settings, probes=probes)
    assert values(approximation._cosines(lab)) == pytest.approx(
        {"cosine.residual": 0.8, "cosine.residual.bottom": 0.6}
    )
    assert values(approximation._depths(lab)) == pytest.approx(
        {"depth.residual.3": 1, "depth_cosine.residual.3": 0.3}
    )


def test_grids_are_by_the_parameter_that_the_settings_name():
    runs = [
        run("samples", 0, share, regime="full", params={"train_items": count})
        for count, share in ((100, 0.5), (900, 0.8))
    ]
    lab = study(
        runs,
        settings={
            "rows": {name: {"regime": name} for name in approximation.COMPARED},
            "domain": "news",
            "grids": {"samples": "train_items"},
        },
    )
    lab.plan.arms = {"samples": [SimpleNamespace(params=each["params"]) for each in runs]}
    assert values(approximation._grids(lab)) == pytest.approx(
        {"samples.full.100": 0.5, "samples.full.900": 0.8}
    )


def test_boolqs_noise_is_that_of_a_difference_of_two_independent_shares():
    (found,) = dict(approximation._published(study())).values()
    assert found.value == pytest.approx(100 * 1.96 * (2 * 0.1204 / 3270) ** 0.5) and found.n == 3270


# LOMO ---------------------------------------------------------------------------------------------


def step(regime: str, peak_gib: float, ledger=(), **more) -> dict:
    sizes = {name: size * GIB for name, size in dict(ledger).items()}
    return {
        "model": "tiny",
        "regime": regime,
        "reason": "",
        "axes": "",
        "phase": "update",
        "peak_allocated_bytes": peak_gib * GIB,
        "ledger": json.dumps(sizes),
        "margin_bytes": None,
        **more,
    }


def test_lomos_bytes_by_hand():
    plain, sharded = json.dumps({"head": "plain"}), json.dumps({"place": "fsdp"})
    kept = json.dumps({"head": "plain", "acts": "keep"})
    checkpoint = json.dumps({"acts": "checkpoint"})
    published = [
        step("master", 102, axes=checkpoint),
        step("sgd", 52, axes=checkpoint),
        step("lomo", 14, axes=plain),
        step("lomo", 90, {"activations": 70}, axes=kept),
        step("lomo", 12),
        step("adalomo", 15.3),
        step("lomo", 99, reason="no"),
    ]
    cards = [
        step("lomo", 16, model="llama-7b", margin_bytes=4 * GIB),
        step("master", 20, model="llama-7b", axes=sharded),
        step("lomo", 200, model="llama-65b", margin_bytes=-176 * GIB),
    ]
    records = study(tables={"published": published, "cards": cards}).records
    table = lomo.memory(records, "published")
    assert table["checkpointing"].tolist() == [True, True, True, False, True, True]
    assert table["head"].tolist() == ["plain", "plain", "plain", "plain", "fused", "fused"] and set(
        table["ranks"]
    ) == {1}
    assert lomo.memory(records, "cards")["ranks"].tolist() == [1, 8, 1]
    assert table["arithmetic_gib"].tolist() == [
        lomo.states_bytes("tiny", name) / GIB
        for name in ("master", "sgd", "lomo", "lomo", "lomo", "adalomo")
    ]
    assert (
        table["rule"].tolist() == ["AdamW", "SGD", "LOMO", "LOMO", "LOMO", "AdaLomo"]
        and len(table) == 6
    )
    found = lomo._bytes(records)
    assert values(found) == pytest.approx(
        {
            "adamw_gib": 102,
            "sgd_gib": 52,
            "lomo_gib": 14,
            "activations_gib": 70,
            "lomo_one_card_gib": 16,
            "margin_7b_gib": 4,
            "margin_65b_gib": -176,
            "share_of_sharded_adamw": 16 / 160,
            "adalomo_share_of_adamw": 0.15,
        }
    )
    assert {name for name, figure in found.items() if not figure.unit} == {
        "share_of_sharded_adamw",
        "adalomo_share_of_adamw",
    }


def test_what_plain_adamw_and_sgd_keep_without_being_asked():
    table = lomo.memory(
        study(tables={"published": [step("master", 1), step("sgd", 1), step("lomo", 1)]}).records,
        "published",
    )
    assert table["checkpointing"].tolist() == [False, False, True] and table["head"].tolist() == [
        "plain",
        "plain",
        "fused",
    ]
    assert table["margin_gib"].isna().all()


def test_lomos_arithmetic_follows_the_largest_matrix():
    """2 bytes a parameter and once more the largest: of these the embedding, the packed projection
    or the mlp's."""
    shape = SimpleNamespace(hidden_size=4, vocab_size=10, intermediate_size=8, num_hidden_layers=3)
    count = 2 * 40 + 3 * (4 * 16 + 3 * 32 + 8) + 4
    for changes, more, largest in (
        ({}, 0, 48),
        ({"vocab_size": 13}, 2 * 12, 52),
        ({"intermediate_size": 13}, 3 * 3 * 20, 52),
    ):
        spec = SimpleNamespace(config=SimpleNamespace(**{**vars(shape), **changes}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lomo, "model_spec", lambda name, spec=spec: spec)
            assert lomo.states_bytes("x", "lomo") == 2 * (count + more) + 2 * largest
            assert lomo.states_bytes("x", "sgd") == 8 * (count + more)


def test_lomos_hooks_and_times_by_hand():
    seconds = [
        {"row": row, "repeat": at, "step_s": value * (1 + at)}
        for row, value in (("lomo", 2.0), ("adamw", 3.0), ("odd", 9.0))
        for at in (2, 0, 1)
    ]
    scaler = [
        {"how": how, "ratio": ratio}
        for how, ratio in (("hooks under GradScaler", 1024.0), ("ours", 1.0), ("odd", 5.0))
    ]
    alive = [
        {"row": row, "most_bytes": most, "largest_bytes": 200}
        for row, most in (("lomo", 300), ("sgd", 900))
    ]
    tables = {"scaler": scaler, "alive": alive, "seconds": seconds}
    records = study(tables=tables).records
    assert values(lomo._hooks(records)) == {
        "hooks_under_scaler": 1024,
        "ours_under_scale": 1,
        "gradients_alive": 1.5,
    }
    found = lomo._times(records)
    assert (
        values(found) == pytest.approx({"time_of_adamw": 1.5})
        and found["time_of_adamw"].equal == "tokens"
    )
    assert found["time_of_adamw"].low == pytest.approx(1.5)
    assert not lomo._times(
        study(tables={"seconds": [row for row in seconds if row["row"] != "lomo"]}).records
    )


# checkpointing ------------------------------------------------------------------------------------


def counted(
    row: str, peak: int, activations: int, host: int = 0, seq: int = 64, reason: str = ""
) -> dict:
    return {
        "row": row,
        "seq": seq,
        "peak_bytes": peak,
        "host_bytes": host,
        "reason": reason,
        "ledger": json.dumps({"activations": activations, "weights": 7}),
    }


def test_counted_bytes_by_hand():
    table = [
        counted("full, keep", 1000, 600),
        counted("full, offload", 400, 30, host=570),
        counted("lora, keep", 500, 300),
        counted("lora, checkpoint", 100, 10),
        counted("lora, offload", 1, 1, seq=128),
        counted("bf16, checkpoint", 1, 1),
        counted("full, checkpoint", 1, 1, reason="no"),
    ]
    found = checkpointing._bytes(study(tables={"bytes": table}).records)
    assert values(found) == {
        "bytes, full, offload of keep, 64": 0.4,
        "host bytes, full, offload, 64": 570,
        "bytes, lora, checkpoint of keep, 64": 0.2,
        "activations, lora of full, 64": 0.5,
    }


def test_step_times_are_over_keep_and_selective_over_checkpoint_too():
    table = [
        {
            "row": f"{regime}, {acts}",
            "seq": 64,
            "repeat": at,
            "step_s": value * (1 + at),
            "reason": "",
        }
        for regime, its in (
            ("full", {"keep": 2.0, "checkpoint": 3.0, "selective": 2.4}),
            ("lora", {"keep": 1.0, "offload": 4.0}),
        )
        for acts, value in its.items()
        for at in (1, 0, 2)
    ]
    found = checkpointing._seconds(study(tables={"seconds": table}).records)
    assert values(found) == pytest.approx(
        {
            "step time, checkpoint of keep, 64": 1.5,
            "step time, selective of keep, 64": 1.2,
            "step time, selective of checkpoint, 64": 0.8,
            "step time, lora, offload of keep, 64": 4,
        }
    )
    assert found["step time, checkpoint of keep, 64"].low == pytest.approx(1.5)


def test_lost_updates_are_those_that_full_precision_moves_and_the_row_does_not():
    table = [
        {"regime": regime, "lr": lr, "moved": moved, "reason": reason}
        for regime, lr, moved, reason in (
            ("full", 1e-4, 200, ""),
            ("bf16", 1e-4, 50, ""),
            ("bf16", 1e-3, 50, ""),
            ("bf16", 1e-2, 9, "no"),
        )
    ]
    assert values(checkpointing._lost(study(tables={"lost": table}).records)) == {
        "updates lost in bf16, lr 0.0001": 0.75
    }


def test_scores_are_by_regime_and_place_and_pairs_by_the_seeds_of_both():
    runs = [
        run("quality", seed, share, regime=regime)
        for regime, share in (("full", 0.8), ("bf16", 0.6))
        for seed in range(3)
    ]
    runs += [run("quality", 9, 0.1, regime="bf16"), run("base", 0, 0.5, regime="full")]
    pairs = [
        Pair("bf16 - full", "quality", {"regime": "bf16"}, {"regime": "full"}, "tokens"),
        Pair("absent", "quality", {"regime": "lora"}, {"regime": "full"}, "tokens"),
    ]
    lab = study(runs, pairs=pairs, settings={"scoring": "yesno"})
    assert values(checkpointing._quality(lab)) == pytest.approx(
        {"full, news: none": 0.8, "bf16, news: none": 0.475, "base, news: none": 0.5}
    )
    gap = checkpointing.differences(lab)
    assert (
        values(gap) == pytest.approx({"bf16 - full: none": -0.2})
        and gap["bf16 - full: none"].seeds == 3
    )
    gain = checkpointing.gains(lab)
    assert (
        values(gain) == pytest.approx({"full - base, news: none": 0.3})
        and gain["full - base, news: none"].seeds == 3
    )


def test_places_are_named_by_shift_at_home_and_by_domain_elsewhere():
    items = pd.DataFrame(
        {
            "item_set": ["x", "x", "x", "y"],
            "domain": ["news", "news", "law", "odd"],
            "shift": ["none", "severe", "severe", "none"],
        }
    )
    rows = pd.DataFrame([run("quality", 0)])
    assert checkpointing.places(study(items=items).records, rows) == [
        ("none", "news", "none"),
        ("severe", "news", "severe"),
        ("law", "law", "severe"),
    ]


def test_whole_runs_differ_by_so_many_weights_and_losses():
    runs = [
        run(
            arm,
            seed,
            regime="full",
            axes={"acts": acts},
            weights_hash=weights,
            steps=2,
            train_items=40,
        )
        for arm, seed, acts, weights in (
            ("exact", 0, "keep", "a"),
            ("exact", 0, "checkpoint", "a"),
            ("exact", 0, "offload", "b"),
            ("exact", 1, "keep", "a"),
            ("exact", 1, "checkpoint", "c"),
            ("quality", 0, "keep", "q"),
        )
    ]
    steps = pd.DataFrame(
        [
            {"run_id": each["run_id"], "loss": loss}
            for each in runs
            for loss in (2.0, 1.0 + (each["weights_hash"] == "c"))
        ]
    )
    found = checkpointing._exact(study(runs, steps=steps).records)
    assert values(found) == {"runs whose weights differ": 2, "runs whose losses differ": 1}
    assert all((figure.unit, figure.seeds) == ("of 3 runs", 2) for figure in found.values())


# Baichuan 2 ---------------------------------------------------------------------------------------


def test_the_ladder_by_hand():
    """Three rungs on a law with exponent .25 but for the last, which lies a tenth below what the
    others say."""
    vocabulary, law = model_spec("tiny").config.vocab_size, {16: 8.0, 32: 4.0, 64: 2.0}
    runs, steps = [], []
    for seed in range(3):
        for at, (hidden, loss) in enumerate(law.items()):
            runs.append(
                run(
                    "ladder",
                    seed,
                    lr=0.1,
                    model="tiny",
                    parameters=2 * vocabulary * hidden + 16**at,
                    params={"config": {"hidden_size": hidden}},
                )
            )
            end = loss * (1 + seed) / (1.1 if at == 2 else 1)
            steps += [
                {
                    "run_id": runs[-1]["run_id"],
                    "step": step,
                    "cross_entropy": value,
                    "highest_logit": 1.0,
                }
                for step, value in enumerate([20.0, end])
            ]
    floor = [{"seed": seed, "cross_entropy": 99.0, "reason": ""} for seed in range(3)]
    lab = study(runs, {"frequencies": floor}, settings={"spike": 0.3}, steps=pd.DataFrame(steps))
    assert sorted(set(baichuan2.ladder(lab)["counted"])) == [1, 16, 256]
    assert values(baichuan2._trained_ladder(lab)) == pytest.approx(
        {
            "ladder.exponent": 0.25,
            "ladder.predicted_over_found": 10.0,
            "ladder.smallest_minus_largest": 2 * (8 - 2 / 1.1),
        }
    )


def test_where_a_run_ended_is_its_last_tenth():
    steps = pd.DataFrame(
        [
            {
                "run_id": "r",
                "step": step,
                "cross_entropy": 40.0 - step,
                "highest_logit": float(step),
            }
            for step in range(30)
        ]
    )
    lab = study(
        [run("stability", 0, lr=0.1, parameters=5) | {"run_id": "r"}],
        {"frequencies": [{"seed": 0, "cross_entropy": 12.0}]},
        settings={"spike": 0.3},
        steps=steps,
    )
    (row,) = baichuan2.pretraining(lab).to_dict("records")
    assert (row["final"], row["logit"], row["norm_head"], row["max_z"]) == (12.0, 28.0, True, False)
    assert row["diverged"] and row["spikes"] == 0 and row["jump"] == -1


def test_counts_positions_and_the_heads_bytes_by_hand():
    head = [
        {
            "model": "m",
            "trained": trained,
            "head": name,
            "extra_bytes": size * GIB,
            "weight_bytes": GIB // 2,
        }
        for trained, sizes in ((True, (1, 4, 0.5, 1.5)), (False, (0, 2, 0, 0)))
        for name, size in zip(
            ("linear", "NormHead", "linear, fused", "NormHead, fused"), sizes, strict=True
        )
    ]
    step = [
        {"model": "m", "head": name, "peak_bytes": size * GIB}
        for name, size in (("linear", 10), ("NormHead", 13), ("NormHead, fused", 11))
    ]
    collisions = [
        {
            "form": form,
            "slope": slope,
            "length": 100,
            "first_collision": first,
            "distinct": distinct,
        }
        for form, slope, first, distinct in (
            ("relative", 0.5, 30, 50),
            ("relative", 0.25, 20, 70),
            ("relative", 0.3, 5, 30),
            ("absolute", 0.5, 3, 10),
        )
    ]
    attention = [
        {"form": "relative", "scores": "bf16", "seed": seed, "moved": moved}
        for seed, moved in ((0, 1), (0, 3), (1, 5))
    ]
    rotary = [{"rounded": "bf16", "offset": 7, "changed": 0.25}]
    lab = study(
        tables={
            "head": head,
            "step": step,
            "collisions": collisions,
            "attention": attention,
            "rotary": rotary,
            "shapes": [
                {"model": "a", "counted": 11_510_000},
                {"model": "b", "counted": 52_000_000},
            ],
        },
        settings={"table_10": {"a": 11.51, "b": 51.5}},
    )
    assert values(baichuan2._shapes(lab)) == {
        "ladder.counted.a": 11.51,
        "ladder.counted.b": 52,
        "ladder.largest_count_error": 0.5,
    }
    assert values(baichuan2._positions(lab)) == {
        "positions.first_collision.100": 20,
        "positions.distinct.relative.100": 0.5,
        "positions.distinct.absolute.100": 0.1,
        "positions.moved.relative.bf16": 4,
        "positions.changed.bf16.7": 0.25,
    }
    found = values(baichuan2._head(lab))
    assert {
        name.removeprefix("head.m.trained."): value
        for name, value in found.items()
        if "trained" in name
    } == {
        "linear": 1,
        "NormHead": 4,
        "linear, fused": 0.5,
        "NormHead, fused": 1.5,
        "price": 3,
        "price_copies": 6,
        "price_fused": 1,
        "fused_saves": 2.5,
    }
    assert found["head.m.frozen.price_copies"] == 4 and found["head.m.frozen.fused_saves"] == 2
    assert {name: value for name, value in found.items() if name.startswith("step")} == {
        "step.m.linear": 10,
        "step.m.NormHead": 13,
        "step.m.NormHead, fused": 11,
        "step.m.price": 3,
        "step.m.fused_saves": 2,
    }


def test_a_domains_gain_is_over_the_one_base_of_all_seeds():
    runs = [run("domains", seed, 0.8, regime="full") for seed in range(3)] + [
        run("base", 0, 0.5, regime="zero_shot")
    ]
    found = baichuan2._domains(study(runs))
    assert values(found) == pytest.approx({"domains.news.news": 0.8, "domains.news.news.gain": 0.3})
    assert (
        all(figure.seeds == 3 for figure in found.values())
        and found["domains.news.news.gain"].p_holm < 0.05
    )
