"""The check of forecasts on a GPU, taken all the way on a CPU with the tiny model, by a Python that
lacks what such a machine lacks; its plan, its table and what it does with processes that die, hang
or come too late."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import micro
from benchmarks import trainer_peers
from vramlab.baichuan import random_weights as gpu_model
from vramlab.baichuan import read_model_file
from vramlab.capture.meter import Meter
from vramlab.cards import card
from vramlab.files import ROOT
from vramlab.gpu_check import cell as gpu_cell
from vramlab.gpu_check import check as gpu_check
from vramlab.gpu_check import plan as gpu_plan
from vramlab.gpu_check import recorded_step
from vramlab.gpu_check import table as gpu_table
from vramlab.gpu_check.check import Check
from vramlab.gpu_check.forecasts import forecast_all
from vramlab.gpu_check.plan import Cell
from vramlab.observer import Observer
from vramlab.regimes.regime import read_row, regime_row
from vramlab.runs.parameters import resolve
from vramlab.runs.sweep_file import read_sweep
from vramlab.timeline.thin import curve
from vramlab.training.trainer import Schedule, Trainer

GONE = (
    "plotly",
    "papermill",
    "bitsandbytes",
    "torchao",
    "nbformat",
    "nbclient",
    "IPython",
    "ipywidgets",
    "jupyterlab",
    "sentencepiece",
    "hypothesis",
    "playwright",
    "galore_torch",
    "lomo_optim",
    "badam",
    "pynvml",
    "scipy",
)
WITHOUT = f"""
import sys
GONE = {GONE!r}
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest): return None if name.partition(".")[0] in GONE else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
ONLY = ("lora", "galore", "qlora")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(folder, what it printed, its exit code, a function that runs it again) of a check without
    those packages."""
    place = tmp_path_factory.mktemp("check")
    (place / "sitecustomize.py").write_text(WITHOUT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place), str(ROOT / "lib"), str(ROOT / "tests")]),
        "OUT": str(place),
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*more: str):
        command = [
            sys.executable,
            "-m",
            "vramlab.gpu_check",
            "--device",
            "cpu",
            "--peers",
            "benchmarks.trainer_peers",
            "--seq",
            "32",
            "--only",
            *ONLY,
            *more,
        ]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, cwd=place
        )

    done = run()
    return place / "gpu-check", done.stdout + done.stderr, done.returncode, run


def results(folder: Path) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}


@pytest.mark.slow
def test_on_a_cpu_every_forecast_is_exact_and_every_cell_ends_as_it_should(checked):
    folder, said, code, _ = checked
    table = pd.read_parquet(folder / "table.parquet").set_index("cell")
    measured = table[(table["does"] == "measure") & ~table["on_purpose"]]
    assert code == 0 and set(measured["outcome"]) == {"ok"}, said
    assert set(measured.index) == {"lora-bf16-1x32", "galore-bf16-1x32"}
    assert (measured["measured_allocated_bytes"] == measured["predicted_allocated_bytes"]).all()
    assert (measured["tokens_per_s"] > 0).all() and (measured["step_s"] > 0).all()
    told = json.loads((folder / "summary.json").read_text())
    assert (
        told["allocated"]["n"] == 2
        and told["allocated"]["worst_error"] == 0.0
        and told["reserved"]["n"] == 0
    )


@pytest.mark.slow
def test_what_the_machine_lacks_is_left_out_and_said(checked):
    folder, said, _, _ = checked
    assert not list(folder.glob("qlora*"))
    assert "qlora-1x32: no forecast, ModuleNotFoundError: No module named 'bitsandbytes'" in said
    assert "the small sweep is left out: it needs sentencepiece" in said and not list(
        folder.glob("tiny*")
    )


@pytest.mark.slow
def test_one_cell_runs_out_on_purpose_and_says_who_held_the_rest_and_what_would_have_fitted(
    checked,
):
    folder, said, _, _ = checked
    ((name, found),) = [
        (name, found) for name, found in results(folder).items() if found["outcome"] == "oom"
    ]
    evidence = found["oom"]
    assert name.endswith("-oom") and evidence["capacity_bytes"] == found["limit_bytes"]
    assert (
        evidence["owners"][0]["bytes"] > 0
        and evidence["reserved_bytes"] + evidence["free_bytes"] == found["limit_bytes"]
    )
    assert any(change["change"] == "expandable segments" for change in evidence["would_fit"])
    assert f"{name}: out of memory in {evidence['phase']}" in said
    assert (
        pd.read_parquet(folder / name / "curve.parquet")["live_bytes"].max()
        <= evidence["allocated_bytes"]
    )


@pytest.mark.slow
def test_the_peer_is_held_against_our_row(checked):
    folder, _, _, _ = checked
    table, found = pd.read_parquet(folder / "table.parquet").set_index("cell"), results(folder)
    ours, theirs = found["lora-bf16-1x32"], found["lora-bf16-1x32-trainer"]
    assert theirs["steps_timed"] >= 1 and theirs["tokens_per_s"] > 0
    assert table.loc["lora-bf16-1x32", "over_trainer"] == pytest.approx(
        ours["tokens_per_s"] / theirs["tokens_per_s"]
    )


@pytest.mark.slow
def test_the_table_comes_last_and_nothing_names_the_machine(checked):
    folder, said, _, _ = checked
    assert (
        said.strip().splitlines()[-1].startswith("CPU, driver None, torch ")
        and "| lora-bf16-1x32 | ok |" in said
    )
    secret = {
        str(ROOT),
        str(Path.home()),
        socket.gethostname(),
        os.environ.get("USER") or "no user",
        sys.prefix,
    }
    secret = {word for word in secret if len(word) > 5}
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    for file in files:
        assert not [word for word in secret if word.encode() in file.read_bytes()], file
    assert {file.suffix for file in files} == {".json", ".parquet"}


@pytest.mark.slow
def test_the_same_command_goes_on_and_measures_nothing_again(checked):
    folder, _, _, run = checked
    lost = folder / "galore-bf16-1x32" / "result.json"
    lost.unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    done = run()
    assert done.returncode == 0 and json.loads(lost.read_text())["outcome"] == "ok", (
        done.stdout + done.stderr
    )
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_without_time_nothing_is_begun_and_the_table_says_so(checked, tmp_path, capsys):
    folder, _, _, _ = checked
    check = Check(tmp_path, 0.0, "cpu", "tiny", (32,))
    cells = gpu_plan.plan(ASKED, known(), MACHINE, (), PEERS)
    check.measure(cells, None)
    assert check.report(cells, json.loads((folder / "machine.json").read_text()), None) == 1
    assert not list(tmp_path.glob("*/result.json"))
    assert (
        "13 of 13 cells were not begun: the same command goes on from here"
        in capsys.readouterr().out
    )


# the plan -----------------------------------------------------------------------------------------

ASKED = gpu_plan.questions("tiny", (32, 64), ("lora", "full", "lomo", "galore", "badam"))
MACHINE = {"host_bytes": 10**12}
PEERS = trainer_peers.ROWS


def known(**changed) -> dict:
    told = {
        "reason": "",
        "fits": True,
        "host_bytes": 0,
        "reserved_peak_bytes": 100,
        "requested_peak_bytes": 90,
    }
    return {
        Cell("measure", asked).name: {**told, **changed.get(asked.regime, {})} for asked in ASKED
    }


def names(cells) -> list[str]:
    return [cell.name for cell in cells]


def test_the_most_informative_come_first_and_the_small_sweep_after_the_first_length():
    cells = gpu_plan.plan(ASKED, known(), MACHINE, ("full",), PEERS)
    order = names(cells)
    assert order[:3] == ["lora-bf16-1x32", "full-bf16-1x32", "lomo-bf16-1x32"] and order[
        3
    ].endswith("-oom")
    assert order[4:8] == [
        "lora-bf16-1x64",
        "lora-bf16-1x64-trainer",
        "full-bf16-1x64",
        "full-bf16-1x64-trainer",
    ]
    assert (
        order.index("badam-bf16-1x32") < order.index("tiny-full") < order.index("badam-bf16-1x64")
    )
    assert order[-2:] == ["galore-bf16-1x32", "galore-bf16-1x64"]
    assert len(set(order)) == len(order) == 10 + 1 + 2 + 1


def test_with_one_length_no_cell_comes_twice():
    order = names(
        gpu_plan.plan([asked for asked in ASKED if asked.seq == 32], known(), MACHINE, (), PEERS)
    )
    assert len(set(order)) == len(order) == 5 + 1 + 2 and order[4:6] == [
        "lora-bf16-1x32-trainer",
        "full-bf16-1x32-trainer",
    ]


def test_the_cell_that_runs_out_is_the_one_that_lacks_least_or_a_limited_one_where_all_fit():
    short = known(
        full={"fits": False, "reserved_peak_bytes": 900},
        galore={"fits": False, "reserved_peak_bytes": 300},
    )
    cells = gpu_plan.plan(ASKED, short, MACHINE, ())
    (cell,) = [cell for cell in cells if cell.meant_to_run_out]
    assert cell.name == "galore-bf16-1x32-oom" and not cell.limit_bytes
    assert not [name for name in names(cells) if name.startswith("full")]
    (cell,) = [
        cell
        for cell in gpu_plan.plan(ASKED, known(badam={"requested_peak_bytes": 99}), MACHINE, ())
        if cell.meant_to_run_out
    ]
    assert cell.question.regime == "badam" and cell.limit_bytes == 75


def test_rows_for_more_host_memory_than_there_is_or_another_machine_are_left_out_and_unknown_ones_come_last():
    told = known(
        lomo={"host_bytes": 10**12},
        badam={"reason": "ImpossibleHere: no library"},
        galore={"reason": "TypeError: x"},
    )
    order = names(gpu_plan.plan(ASKED, told, MACHINE, ()))
    assert not [name for name in order if name.startswith(("lomo", "badam"))]
    assert order[-2:] == ["galore-bf16-1x32", "galore-bf16-1x64"]


def test_every_row_that_one_card_can_take_is_asked_for_at_both_lengths():
    asked = gpu_plan.questions("baichuan2-7b", (1024, 4096))
    rows = {question.regime for question in asked}
    assert {question.seq for question in asked} == {1024, 4096}
    assert len({Cell("measure", each).name for each in asked}) == len(asked)
    assert {"qlora", "mixed", "mezo", "host_weights"} <= rows and "fsdp" not in rows
    assert asked[0].regime == "lora" and asked[0].row.values["weights"] == "bf16"


def test_the_card_is_the_one_that_is_there_with_rates_of_its_kind():
    machine = {
        "name": "NVIDIA H100 80GB HBM3",
        "total_bytes": 85_000_000_000,
        "context_bytes": 600_000_000,
        "compute_capability": [9, 0],
    }
    found = gpu_plan.card_of(machine)
    assert (
        found.total_bytes == 85_000_000_000
        and found.context_bytes == 600_000_000
        and found.name == machine["name"]
    )
    assert found.bf16_tflops == card("h100").bf16_tflops and found.compute_capability == (9, 0)
    assert gpu_plan.card_of({**machine, "total_bytes": None}) is None


def test_forecasts_end_with_their_time_and_keep_what_they_have(tmp_path):
    began = time.monotonic()
    assert forecast_all(ASKED, None, tmp_path / "f.json", "now", 0.0, jobs=1) == {}
    assert time.monotonic() - began < 30
    (tmp_path / "f.json").write_text(json.dumps({"code": "now", "steps": known()}))
    assert forecast_all(ASKED, None, tmp_path / "f.json", "now", 0.0) == known()


def test_a_recording_that_cannot_be_read_costs_the_timeline_and_not_the_peaks(tmp_path):
    class Broken:
        peaks = [
            {"allocated_peak_bytes": 7, "reserved_peak_bytes": 30, "num_alloc_retries": 0},
            {"allocated_peak_bytes": 9, "reserved_peak_bytes": 20, "num_alloc_retries": 1},
        ]

        def frame(self):
            raise KeyError("time_us")

    seen = recorded_step.read_timeline(contextlib.ExitStack(), Broken(), 1, tmp_path)
    assert (
        seen["said"] == ["no timeline (KeyError: 'time_us')"]
        and seen["requested_peak_bytes"] is None
    )
    assert recorded_step.peaks(Broken(), seen) == {
        "allocated_peak_bytes": 9,
        "reserved_peak_bytes": 30,
        "num_alloc_retries": 1,
    }


# processes ----------------------------------------------------------------------------------------


def test_a_cell_that_hangs_is_ended_and_one_that_dies_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CELL", "cell_endings:end")
    check = Check(tmp_path, 1, "cpu", "tiny", (32,))
    check._next_child = check._start_child(gpu_check.CELL, {})
    for regime, limit_s, reason in (
        ("hang", 3.0, "no answer from cell_endings:end in 3 s"),
        ("die", 60.0, "its process was killed by signal 9"),
        ("raise", 60.0, "ValueError: raise"),
    ):
        cell = Cell("tiny", gpu_check.plan.Question("tiny", regime, 32, 1))
        result = check.run_cell(cell, limit_s)
        assert (result["outcome"], result["reason"]) == ("failed", reason)
        assert "folder" not in result and check.read_result(cell) == result
    check._children.close()
    assert not check._next_child.alive


def test_a_cell_that_fails_says_why_and_leaves_no_path(tmp_path, monkeypatch):
    def broken(cell):
        raise FileNotFoundError(f"{Path.home()}/secret is not there")

    monkeypatch.setitem(gpu_cell.KINDS, "measure", broken)
    result = gpu_cell.run_cell({"does": "measure", "folder": str(tmp_path), "budget_s": 9})
    assert result["outcome"] == "failed"
    assert result["reason"] == "FileNotFoundError: ~/secret is not there"


def test_a_check_without_an_answer_from_the_device_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "call_once", lambda *call: (None, "no GPU", False))
    assert Check(tmp_path, 1, "cuda", "tiny", (32,)).run() == 1
    assert "no answer from cuda: no GPU" in capsys.readouterr().out


# figures ------------------------------------------------------------------------------------------


def test_errors_are_predicted_over_measured_and_the_summary_is_their_median_and_worst():
    h100 = dataclasses.replace(card("h100"), context_mib=1.0)
    told = {
        "allocated_peak_bytes": 990,
        "reserved_peak_bytes": 2200,
        "fits": True,
        "flops": {
            "forward": 10**12,
            "backward": 2 * 10**12,
            "recompute": 5 * 10**12,
            "update": 10**12,
        },
    }
    kept = {
        "outcome": "ok",
        "reason": "",
        "allocated_peak_bytes": 1000,
        "reserved_peak_bytes": 2000,
        "step_s_median": 0.01,
        "tokens_per_s": 100.0,
        "nvml_process_bytes": 2200 + 2**20,
        "energy": {"j": 50.0},
        "window_tokens": 2000,
        "num_alloc_retries": 0,
    }
    cells = [
        (Cell("measure", ASKED[0], told), kept),
        (Cell("measure", ASKED[1], {**told, "allocated_peak_bytes": 1020}), kept),
        (
            Cell("measure", ASKED[2], {**told, "fits": False}),
            {"outcome": "oom", "reason": "no room"},
        ),
        (Cell("measure", ASKED[3], told), {"outcome": "oom", "reason": "no room"}),
    ]
    table = gpu_table.build_table(cells, h100)
    first = table.iloc[0]
    assert first["allocated_error"] == pytest.approx(-0.01) and first[
        "reserved_error"
    ] == pytest.approx(0.1)
    assert first["nvml_error"] == 0.0 and first["j_per_1000_tokens"] == 25.0
    assert first["mfu"] == pytest.approx(3e12 / 0.01 / 989.4e12)
    total = gpu_table.summarise(table)
    assert total["allocated"] == {
        "n": 2,
        "median_error": pytest.approx(0.015),
        "worst_error": pytest.approx(0.02),
        "under_rate": 0.5,
        "under_rate_beyond": 0.5,
    }
    assert total["fits"] == {
        "n": 4,
        "false_refusal_rate": 0.0,
        "false_promise_rate": 0.5,
    }  # of the two that ran out, one
    assert gpu_table.summarise(gpu_table.build_table([], None))["reserved"]["n"] == 0


@pytest.mark.parametrize("moments", [50, 400, 10**6])
def test_a_thinned_timeline_keeps_every_peak_and_its_categories_add_up(moments):
    meter = Meter()
    with meter:
        trainer = Trainer(
            micro.model(),
            read_row("row", {"acts": "checkpoint"}),
            Schedule(1e-3, 4),
            observer=meter,
        )
        for seed in range(3):
            trainer.step([micro.batch(seed)])
    frame = meter.frame()
    thin = curve(frame, moments)
    assert len(thin) <= max(moments, 2) + 2 + frame.groupby(["step", "phase"]).ngroups
    whole = frame.groupby(["step", "phase"])["live_bytes"].max()
    pd.testing.assert_series_equal(thin.groupby(["step", "phase"])["live_bytes"].max(), whole)
    assert (
        thin.drop(columns=["t_s", "step", "phase", "live_bytes"]).sum(axis=1) == thin["live_bytes"]
    ).all()
    assert (
        thin["live_bytes"].to_numpy() == frame["live_bytes"].to_numpy()[thin.index]
    ).all() and np.all(np.diff(thin.index) > 0)


def test_random_weights_are_spread_as_a_model_is_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(gpu_model, "RANDOM_NUMBERS", 1000)
    spec = read_model_file(ROOT / "params" / "models" / "tiny.yml")
    one, other = gpu_model.random_model(spec), gpu_model.random_model(spec)
    for (name, weight), again in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, again), name
        assert (
            torch.equal(weight, torch.ones_like(weight))
            if weight.dim() < 2
            else 0.018 < float(weight.detach().std()) < 0.022
        )
    loss = one(**gpu_model.batches(spec, 16, 2, 0)[0], use_cache=False).loss
    assert torch.isfinite(loss) and float(loss.detach()) == pytest.approx(
        np.log(spec.config.vocab_size), rel=0.2
    )


def test_the_observer_in_between_forwards_everything_and_can_be_switched():
    meter = Meter()
    with meter:
        passed = recorded_step.Switch(meter)
        layer = torch.nn.Linear(3, 3)
        passed.own("weights", layer.named_parameters())
        passed.begin_step(4)
        with passed.phase("forward"):
            layer(torch.ones(2, 3))
        with passed.region("host"):
            kept = torch.zeros(5)
        passed.end_step()
        passed.target = Observer()
        with passed.phase("backward"):
            torch.ones(2)
    frame = meter.frame()
    assert (
        set(frame["phase"]) <= {"init", "forward"}
        and (frame["step"] >= 0).all()
        and 4 in set(frame["step"])
    )
    assert frame[frame["category"] == "host"]["bytes"].max() == kept.nbytes


@pytest.mark.parametrize("name", ["h100", "rtx4090"])
def test_the_sweeps_for_real_cards_read_and_resolve(name):
    notebook, folder, cells = read_sweep(ROOT / "params" / f"{name}.yml")
    assert (
        notebook.exists()
        and folder.name == name
        and len({cell.run_id for cell in cells}) == len(cells) > 8
    )
    for cell in cells:
        assert (
            cell.full["device"] == "cuda"
            and cell.full["model"] == "baichuan2-7b"
            and cell.full["limit_mib"] == 0.0
        )
        own = regime_row(cell.full["regime"]).get("weights")
        assert resolve(cell.params)["regime_row"]["weights"]["value"] == (own or "bf16")
    assert {*read_sweep_regimes("quick")} <= {*gpu_check.SMALL_SWEEP}


def read_sweep_regimes(name: str) -> list[str]:
    return list(
        dict.fromkeys(
            cell.params["regime"] for cell in read_sweep(ROOT / "params" / f"{name}.yml")[2]
        )
    )
