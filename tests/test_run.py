"""A run's folder holds everything its figures are drawn from, whole, however the run ended."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest
import torch
import yaml

from vramlab.factcc.dataset import dataset
from vramlab.files import ROOT
from vramlab.regimes.regime import ImpossibleHere
from vramlab.runs import execute as run
from vramlab.runs import learning, preparation
from vramlab.runs.execute import execute
from vramlab.runs.folder import Run, read_runs
from vramlab.runs.parameters import KNOWN_PARAMETERS, config_hash, resolve, run_id

SMALL = {
    "recipe": "smoke",
    "steps": 4,
    "train_items": 64,
    "val_items": 20,
    "test_items": 20,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def lomo(tmp_path_factory):
    return Run(
        execute(
            {**SMALL, "regime": "lomo"}, tmp_path_factory.mktemp("runs") / "lomo-x", progress=False
        )
    )


def test_the_folder_is_the_contract(lomo):
    names = {path.name for path in lomo.folder.iterdir()}
    tables = {f"{table}.parquet" for table in ("steps", "timeline", "scores", "accuracy")}
    assert names == {"params.yml", "env.json", "result.json", "checksums.json", *tables}
    assert (
        lomo.ok
        and lomo.params["lr"] == 0.3
        and lomo.params["regime_row"]["until"]["value"] == "backward"
    )
    assert set(KNOWN_PARAMETERS) <= set(lomo.params)
    assert {"python", "versions", "device", "commit", "seed", "config_hash"} <= set(
        lomo.environment
    )
    assert lomo.environment["config_hash"] == config_hash({**SMALL, "regime": "lomo"})


def test_steps_are_timed_by_phase_and_the_phases_fit_into_the_step(lomo):
    steps = lomo.steps
    assert (
        list(steps["step"]) == [0, 1, 2, 3]
        and (steps["tokens"] > 0).all()
        and steps["loss"].notna().all()
    )
    inside = steps["forward_s"] + steps["backward_s"] + steps["update_s"]
    assert (inside <= steps["step_s"]).all() and (inside > 0.8 * steps["step_s"]).all()


def test_both_meters_saw_the_run(lomo):
    peaks = lomo.result["peak_bytes"]
    assert (
        peaks["meter"]
        == lomo.timeline["live_bytes"].max()
        == sum(lomo.result["memory_ledger"].values())
    )
    assert peaks["process"] == pytest.approx(
        peaks["meter"], rel=0.3
    )  # a small step: fixed costs show
    assert lomo.result["process"]["allocator"]["MALLOC_MMAP_THRESHOLD_"] == "65536"
    assert lomo.result["optimizer_state_bytes"] == 0
    assert "init" in set(lomo.timeline["phase"]) and (lomo.timeline["phase"] == "init").mean() < 0.2


def test_scores_carry_every_domain_and_the_judges_without_a_model(lomo):
    assert set(lomo.accuracy["domain"]) == {"news", "general", "law", "medicine"}
    assert {
        "yesno",
        "likelihood",
        "claim_only",
        "unigram_overlap",
        "bigram_overlap",
        "majority",
    } == set(lomo.accuracy["scoring"])
    assert set(lomo.scores["split"]) == {"val", "test"}


def test_the_same_parameters_give_the_same_losses_and_scores(lomo, tmp_path):
    again = Run(
        execute({**SMALL, "regime": "lomo", "measure": False}, tmp_path / "again", progress=False)
    )
    assert list(again.steps["loss"]) == list(lomo.steps["loss"])
    pd.testing.assert_series_equal(again.scores["yesno"], lomo.scores["yesno"])
    assert not again.has_timeline


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("no room"), "oom"),
        (MemoryError("none"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"),
        (RuntimeError("else"), "failed"),
    ],
)
def test_running_out_of_memory_is_a_result_and_other_errors_are_recorded_and_raised(
    tmp_path, monkeypatch, error, outcome
):
    def learn(*_):
        raise error

    monkeypatch.setattr(learning, "learn", learn)
    if outcome == "failed":
        with pytest.raises(RuntimeError, match="else"):
            execute({**SMALL, "measure": False}, tmp_path / "r", progress=False)
    else:
        execute({**SMALL, "measure": False}, tmp_path / "r", progress=False)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == outcome and str(error) in result["reason"]
    assert [run.ok for run in read_runs(tmp_path)] == [False]


def test_an_interrupted_run_is_not_there(tmp_path, monkeypatch):
    def learn(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        execute({**SMALL, "measure": False}, tmp_path / "r", progress=False)
    assert not (tmp_path / "r" / "result.json").exists()
    with pytest.raises(FileNotFoundError, match="vramlab sweep"):
        read_runs(tmp_path)


def test_whatever_decides_numbers_changes_the_hash(tmp_path):
    base = config_hash(SMALL)
    for changed in (
        {"steps": 5},
        {"seed": 1},
        {"regime": "lora"},
        {"lr": 0.5},
        {"model": "baichuan2-7b"},
        {"data_seed": 1},
        {"config": {"norm_head": False}},
    ):
        assert config_hash({**SMALL, **changed}) != base
    file = tmp_path / "model.yml"
    shape = yaml.safe_load((ROOT / "params" / "models" / "tiny.yml").read_text())
    hashes = []
    for layers in (4, 5):
        file.write_text(
            yaml.safe_dump({**shape, "config": {**shape["config"], "num_hidden_layers": layers}})
        )
        hashes.append(config_hash({**SMALL, "model": str(file)}))
    items = tmp_path / "items.jsonl"
    for text in ("one", "two"):
        items.write_text(text)
        os.utime(items, ns=(0, 10**9 * len(hashes)))
        hashes.append(config_hash({**SMALL, "items": str(items)}))
    assert len(set(hashes)) == 4 and run_id(SMALL) == f"full-{base[:8]}"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"regimes": "full"}, "known: regime, model"),
        ({"steps": "4"}, "it takes int"),
        ({"measure": 1}, "it takes bool"),
        ({"regime": "lomoo"}, "it has: zero_shot"),
        ({"lr": True}, "it takes float"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        resolve({**SMALL, **wrong})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train_domain": "sports"}, "general, news, law, medicine"),
        ({"items": "nowhere"}, "does not exist"),
        ({"recipe": "quick"}, "standard, reading, smoke"),
        ({"objective": "all"}, "objective is 'all': use one of answer"),
        ({"config": {"norm": 1}}, "config: unknown 'norm'.*a Baichuan-2 has vocab_size"),
    ],
)
def test_a_run_that_cannot_be_prepared_says_why(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        execute({**SMALL, **wrong}, tmp_path / "r", progress=False)


def test_pre_training_starts_from_random_weights_of_its_seed_and_watches_the_logits(tmp_path):
    asked = {
        **SMALL,
        "recipe": "none",
        "objective": "lm",
        "train_domain": "all",
        "watch_logits": True,
        "measure": False,
        "config": {"norm_head": False, "z_loss_weight": 0.5},
    }
    first, other = (
        Run(execute({**asked, "seed": seed}, tmp_path / str(seed), progress=False))
        for seed in (0, 1)
    )
    steps = first.steps
    # of the model as it was before the first update, on batches of another seed
    assert (
        first.result["loss_first"] != other.result["loss_first"]
        and first.result["base"]["recipe"] == "none"
    )
    excess = (steps["loss"] - steps["cross_entropy"]) / 0.5  # the mean square of the highest logits
    assert (excess > 0).all() and (excess <= steps["highest_logit"] ** 2 + 1e-4).all()
    assert set(first.scores["domain"]) == {"news", "general", "law", "medicine"}
    prepared = preparation.prepare(resolve(asked), progress=False)
    assert {item.domain for item in prepared.data.train} == {"news", "general", "law", "medicine"}
    batch = next(prepared.batches())[0]
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
    with pytest.raises(ValueError, match="head: fused never has all logits"):
        execute({**asked, "regime": "adafactor_backward"}, tmp_path / "fused", progress=False)


def test_a_gpu_that_is_not_there_is_one_error_with_the_way_out(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ImpossibleHere, match="'cuda'.*no GPU here: use device: cpu"):
        execute({"device": "cuda"}, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["outcome"] == "failed"


@pytest.mark.slow
def test_a_row_that_shards_trains_as_the_only_rank(tmp_path):
    folder = execute({"regime": "fsdp", **SMALL}, tmp_path / "run", progress=False)
    result = json.loads((folder / "result.json").read_text())
    assert result["outcome"] == "ok" and any("1 rank(s)" in note for note in result["notes"])
    assert not torch.distributed.is_initialized()


def test_axes_and_places_are_chosen_by_parameters():
    changed = resolve({"regime": "full", "axes": {"acts": "checkpoint", "clip": 1.0}})
    assert changed["regime_row"]["acts"]["value"] == "checkpoint" and changed["clip"] == 1.0
    assert config_hash({"regime": "full", "axes": {"acts": "checkpoint"}}) != config_hash(
        {"regime": "full"}
    )
    with pytest.raises(ValueError, match="a row has no 'act': use acts"):
        resolve({"regime": "full", "axes": {"act": "checkpoint"}})
    few = {**KNOWN_PARAMETERS, "train_items": 4, "val_items": 2, "test_items": 3}

    def places(**said):
        return sorted({(item.domain, item.shift) for item in dataset({**few, **said}).test})

    assert places(test_domains="news", test_shifts="none,mild") == [
        ("news", "mild"),
        ("news", "none"),
    ]
    assert len(places()) == 6
    with pytest.raises(ValueError, match="test_shifts has far: there are none, mild, moderate"):
        places(test_shifts="far")


def test_one_more_parameter_renames_no_run(monkeypatch):
    before, given = config_hash(SMALL), config_hash({**SMALL, "seed": 1})
    monkeypatch.setitem(run.KNOWN_PARAMETERS, "novel", 0)
    assert config_hash(SMALL) == config_hash({**SMALL, "novel": 0}) == before
    assert (
        config_hash({**SMALL, "novel": 1}) != before and config_hash({**SMALL, "seed": 1}) == given
    )
