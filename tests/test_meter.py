"""The event meter: what it sees is what happens, to the byte; and the operating system agrees to
one percent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

import measured_step
import micro
from vramlab.capture.meter import COLUMNS, Meter
from vramlab.capture.peak_rss import peak_window
from vramlab.observer import CATEGORIES
from vramlab.processes import MALLOC_ENV, call_once
from vramlab.regimes.regime import read_regimes, read_row
from vramlab.regimes.sharded import local
from vramlab.training.trainer import Schedule, Trainer

REGIMES = read_regimes()


def _trained(regime, observer, steps=3):
    torch.manual_seed(0)
    with micro.ranks(regime):
        trainer = Trainer(micro.model(), regime, Schedule(1e-2, steps), observer=observer)
        with observer if observer else contextlib.nullcontext():
            losses = [float(trainer.step([micro.batch(step)])) for step in range(steps)]
    return losses, trainer


@pytest.mark.parametrize("name", REGIMES)
def test_watching_changes_no_loss_and_no_weight(name):
    losses, trainer = _trained(REGIMES[name], None)
    watched_losses, watched = _trained(REGIMES[name], Meter())
    assert watched_losses == losses
    wanted = trainer.finish().state_dict()
    assert all(
        torch.equal(local(wanted[key]), local(tensor))
        for key, tensor in watched.finish().state_dict().items()
    )


@pytest.mark.parametrize("name", REGIMES)
def test_live_bytes_are_the_sum_of_what_lives_and_never_negative(name):
    meter = Meter()
    _trained(REGIMES[name], meter)
    frame = meter.frame()
    device = frame[frame["category"] != "host"]
    signed = device["bytes"].where(device["event"] == "alloc", -device["bytes"])
    assert tuple(frame.columns) == COLUMNS
    assert (signed.cumsum() == device["live_bytes"]).all() and (frame["live_bytes"] >= 0).all()
    assert set(frame["category"]) <= {*CATEGORIES, "host"}
    peak = meter.peak()
    assert peak["peak_bytes"] == frame["live_bytes"].max() == sum(peak["categories"].values())
    assert frame["t_s"].is_monotonic_increasing


def test_categories_hold_the_bytes_the_regime_promises():
    meter = Meter()
    _, trainer = _trained(REGIMES["full"], meter)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    moments = trainer.optimizer_state_bytes()
    assert meter.peak()["categories"]["optimizer"] == moments
    born = meter.frame().query("event == 'alloc' and step == 1")
    assert born.query("category == 'gradients'")["bytes"].sum() == weights


def test_one_gradient_at_a_time_inside_backward():
    meter = Meter()
    _, trainer = _trained(REGIMES["lomo"], meter)
    frame = meter.frame()
    gradients = frame[frame["category"] == "gradients"]
    alive = gradients["bytes"].where(gradients["event"] == "alloc", -gradients["bytes"]).cumsum()
    largest = sorted((p.nbytes for p in trainer.model.parameters()), reverse=True)
    assert alive.max() <= largest[0] + largest[1]
    assert set(frame.query("event == 'free' and category == 'gradients'")["phase"]) == {"backward"}


def test_checkpointing_has_a_recompute_phase_and_nobody_else_has():
    for name, has in (("checkpoint", True), ("full", False)):
        meter = Meter()
        _trained(REGIMES[name], meter)
        assert ("recompute" in set(meter.frame()["phase"])) is has


def test_offloaded_bytes_are_on_the_host_and_not_on_the_device():
    full, offload = Meter(), Meter()
    _trained(REGIMES["full"], full)
    _trained(REGIMES["offload"], offload)
    assert full.host_peak_bytes == 0 < offload.host_peak_bytes
    kept = offload.peak()["categories"].get("activations", 0)
    assert kept < 0.1 * full.peak()["categories"]["activations"]


def test_gradients_accumulated_in_place_are_not_counted_twice():
    regime = read_row("row", {"accumulate": 3})
    meter = Meter()
    trainer = Trainer(micro.model(), regime, Schedule(1e-2, 2), observer=meter)
    with meter:
        trainer.step([micro.batch(i) for i in range(3)])
    frame = meter.frame()
    gradients = frame[frame["category"] == "gradients"]
    alive = gradients["bytes"].where(gradients["event"] == "alloc", -gradients["bytes"]).cumsum()
    assert alive.max() == sum(p.nbytes for p in trainer.model.parameters())


def test_backward_bytes_are_given_to_the_module_whose_forward_made_the_node():
    meter = Meter()
    _trained(REGIMES["full"], meter)
    backward = meter.frame().query("phase == 'backward' and event == 'alloc'")
    assert (
        backward["module"].str.contains("layers.1.mlp").any()
        and (backward["module"] != "").mean() > 0.8
    )


def _measured(target, payload, limit_s, environment=None):
    return call_once(target, payload, limit_s, MALLOC_ENV | (environment or {})).to_dict()


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({}, id="full"),
        pytest.param({"acts": "checkpoint"}, id="checkpoint", marks=pytest.mark.slow),
        pytest.param({"until": "backward", "rule": "sgd"}, id="lomo", marks=pytest.mark.slow),
        pytest.param({"weights": "mixed"}, id="mixed", marks=pytest.mark.slow),
    ],
)
def test_the_operating_system_agrees_to_one_percent(row, monkeypatch):
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc here: the kernel's high-water mark cannot be read")
    monkeypatch.setenv("PYTHONPATH", str(Path(measured_step.__file__).parent))
    meter = Meter()
    with meter:
        measured_step.steps(row, meter)
    answer = _measured("measured_step:measured", {"row": row}, 120, {"OMP_NUM_THREADS": "1"})
    assert answer["outcome"] == "ok", answer["reason"]
    assert answer["peak_bytes"] == pytest.approx(meter.peak()["peak_bytes"], rel=0.01)


def test_a_process_that_dies_is_a_result(tmp_path, monkeypatch):
    (tmp_path / "victim.py").write_text(
        "import os, signal, time\n"
        "def killed(_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def full(_): raise MemoryError('no room')\n"
        "def wrong(_): raise KeyError('what')\n"
        "def slow(_): time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = {name: _measured(f"victim:{name}", {}, 20) for name in ("killed", "full", "wrong")}
    assert {name: answer["outcome"] for name, answer in outcome.items()} == {
        "killed": "oom",
        "full": "oom",
        "wrong": "failed",
    }
    assert "no room" in outcome["full"]["reason"] and "what" in outcome["wrong"]["reason"]
    assert "no answer" in _measured("victim:slow", {}, 0.5)["reason"]


def test_where_the_high_water_mark_cannot_be_reset_the_peak_is_sampled(monkeypatch):
    monkeypatch.setattr("vramlab.capture.peak_rss._reset_high_water", lambda: False)
    with peak_window() as peak:
        block = torch.ones(16 << 20)
        for _ in range(20):
            block.add_(1)
    assert "sampled" in peak.method and peak.delta_bytes == pytest.approx(block.nbytes, rel=0.1)
