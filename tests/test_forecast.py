"""The forecast: exact where there is an exact figure, equal to the CPU's own peak where there is a
CPU run."""

from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import measured_step
import micro
from chosen_rows import slow_unless_chosen
from vramlab.baichuan import BaichuanConfig, ModelSpec
from vramlab.capture.meter import Meter
from vramlab.capture.peak_rss import peak_window
from vramlab.forecast.representative_step import Run
from vramlab.forecast.trace import trace
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.forecast.virtual_gpu.shape_cache import Shapes
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_regimes, read_row
from vramlab.training.trainer import Schedule, Trainer

REGIMES = read_regimes()
MICRO = ModelSpec("micro", micro.model().config, None)
MIDDLE = ModelSpec("middle", BaichuanConfig(position="rope", **measured_step.SIZES), None)


def _layers(spec: ModelSpec, count: int) -> ModelSpec:
    config = BaichuanConfig(**{**spec.config.to_dict(), "num_hidden_layers": count})
    return dataclasses.replace(spec, config=config)


@pytest.mark.parametrize(
    "name",
    slow_unless_chosen(
        name for name, row in REGIMES.items() if not hasattr(row.trains, "interval")
    ),
)
def test_on_a_fake_cpu_the_peak_is_the_cpus(name):
    meter, said = Meter(), trace(MICRO, REGIMES[name], 11, 3, mode="cpu")
    regime = dataclasses.replace(REGIMES[name], grads=REGIMES[name].grads.with_short_cycle())
    with micro.ranks(regime):
        trainer = Trainer(micro.model(), regime, Schedule(1e-3, 2), observer=meter)
        with meter:
            for _ in range(said.step + 1):
                ids = torch.zeros(3, 11, dtype=torch.long)
                trainer.step([{"input_ids": ids, "labels": ids.clone()}], [1.0])
    assert (said.peak_bytes, said.phase, dict(said.ledger)) == tuple(
        meter.peak(said.step)[key] for key in ("peak_bytes", "phase", "categories")
    )
    assert said.host_bytes == meter.host_peak_bytes


@pytest.mark.parametrize("name", slow_unless_chosen(REGIMES))
def test_the_ledger_adds_up_and_the_events_rebuild_the_peak(name):
    said = trace(MICRO, REGIMES[name], 11, 3)
    assert said.peak_bytes == sum(said.ledger.values()) == sum(said.alive.values())
    assert said.peak_bytes == sum(size for *_, size in said.owners(10_000))
    events = said.events
    live = np.where(events["event"] == "alloc", events["bytes"], -events["bytes"]).cumsum()
    assert live[said.reported].max() == said.peak_bytes
    assert set(events["step"][said.reported]) == {said.step} and (events["bytes"] > 0).all()


@pytest.mark.parametrize(
    ("model", "weight_bytes"), [("baichuan2-7b", 15_011_946_496), ("baichuan2-13b", 27_793_336_320)]
)
def test_published_models_weigh_what_is_published(model, weight_bytes):
    said = trace(
        model_spec(model),
        read_row("row", {"weights": "bf16", "trains": "none", "rule": "none"}),
        16,
        1,
    )
    weights = said.frame.query("category == 'weights' and event == 'alloc'")
    assert weights[~weights["module"].str.endswith("inv_freq")]["bytes"].sum() == weight_bytes


def test_a_7b_step_costs_its_arithmetic_and_no_memory_of_ours():
    trace(MICRO, REGIMES["full"], 11, 3)
    gc.collect()
    with peak_window() as peak:
        said = trace(model_spec("baichuan2-7b"), REGIMES["full"], 1024, 1)
    weights, tensors = 2 * 15_011_946_496, 227
    assert (
        said.ledger["gradients"] == weights
        and said.ledger["optimizer"] == 2 * weights + 4 * tensors
    )
    assert peak.delta_bytes < 200e6
    assert said.took_s < 60


@pytest.mark.parametrize("mode", ["vgpu", "cpu"])
def test_allocated_bytes_are_linear_in_layers(mode):
    two, three, four = (
        trace(_layers(MIDDLE, count), REGIMES["full"], 64, 2, mode=mode).peak_bytes
        for count in (2, 3, 4)
    )
    assert four - three == three - two > 0


@pytest.mark.parametrize(
    "row",
    [
        {"trains": {"blocks": {"interval": 10}}},
        {"trains": {"blocks": {"interval": 1, "ends": "units", "state": "host"}}},
        {"trains": {"blocks": {"interval": 1}}},
        {"trains": {"chunks": {"count": 8}}},
        {"trains": {"blocks": {"count": 2}}},
        {"trains": {"blocks": {"interval": 2, "sample": 2, "ends": "always"}}},
    ],
    ids=["badam", "ends", "first steps only", "chunkft", "uneven", "lisa"],
)
def test_the_part_found_has_the_highest_peak_of_all(row):
    regime = read_row("row", row)
    found, second = trace(MICRO, regime, 11, 3), {}
    with virtual_gpu() as gpu:
        run = Run(gpu, MICRO, regime, 11, 3)
        with run.meter:
            keeps_nothing = regime.trains.state == "reset" and regime.trains.interval == 1
            rounds = 2 if regime.trains.state == "reset" and not keeps_nothing else 1
            for _ in range(2):  # twice round, so that the second time state is there, if it ever is
                for parts in run.sets:
                    second[parts] = [run.step(parts) for _ in range(rounds)][-1]
    peaks = {parts: run.meter.peak(step)["peak_bytes"] for parts, step in second.items()}
    assert found.peak_bytes == max(peaks.values()) == peaks[found.parts]
    assert found.host_bytes == run.meter.host_peak_bytes


def test_parked_state_is_on_the_host_of_parts_never_visited_too():
    said = trace(MIDDLE, REGIMES["chunkft"], 32, 2)
    moments = 2 * sum(p.numel() for p in micro.model(**measured_step.SIZES).parameters()) * 4
    batches = 2 * 2 * 32 * 8
    assert moments < said.host_bytes < moments + batches + 4 * 100, (
        "and a step count for each piece"
    )


def test_a_turn_that_resets_reports_a_step_with_state():
    said = trace(MICRO, REGIMES["badam"], 11, 3)
    assert len(said.parts) == 1 and said.ledger.get("optimizer", 0) > 0


def test_micro_batches_are_added_up():
    one, two = (trace(MIDDLE, read_row("row", {"accumulate": count}), 32, 2) for count in (1, 2))
    gradient_bytes = sum(p.nbytes for p in micro.model(**measured_step.SIZES).parameters())
    assert one.peak_bytes < two.peak_bytes < one.peak_bytes + gradient_bytes + 1_000_000


def test_the_same_question_has_the_same_answer():
    one, two = (trace(MIDDLE, REGIMES["mixed"], 32, 2) for _ in range(2))
    assert all((one.events[name] == two.events[name]).all() for name in one.events)
    assert (one.peak_bytes, one.alive) == (two.peak_bytes, two.alive)


def test_a_card_decides_the_attention_and_the_workspace():
    ampere = trace(MIDDLE, read_row("row", {"weights": "bf16"}), 32, 2)
    hopper = trace(
        MIDDLE,
        read_row("row", {"weights": "bf16"}),
        32,
        2,
        card=SimpleNamespace(compute_capability=(9, 0)),
    )
    kernels = [
        set(said.frame["op"][said.frame["op"].str.contains("attention")])
        for said in (ampere, hopper)
    ]
    assert kernels[0] == {
        f"aten._scaled_dot_product_flash_attention{end}.default" for end in ("", "_backward")
    }
    assert kernels[1] == {
        f"aten._scaled_dot_product_cudnn_attention{end}.default" for end in ("", "_backward")
    }
    assert hopper.ledger["workspace"] - ampere.ledger["workspace"] == 2 * ((32 << 20) - 8_519_680)


@pytest.mark.parametrize("model", ["baichuan2-7b", "baichuan2-13b"])
def test_modes_agree_on_what_is_not_a_kernels_choice(model):
    spec, row = (
        _layers(model_spec(model), 2),
        read_row("row", {"rule": "sgd", "trains": {"blocks": {"interval": 2}}}),
    )
    cpu, vgpu = (trace(spec, row, 64, 1, mode=mode) for mode in ("cpu", "vgpu"))
    assert cpu.ledger["weights"] == vgpu.ledger["weights"]
    assert vgpu.peak_bytes - vgpu.ledger["workspace"] == pytest.approx(cpu.peak_bytes, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["mixed", "adam4bit", "galore_layerwise", "qlora", "lisa", "fsdp", "host_weights"]
)
def test_remembered_shapes_change_nothing(name, monkeypatch):
    """The same timeline with every operation worked out anew; and most operations were not."""
    outputs, asked, worked_out = Shapes.outputs, [], []

    def counted(self, func, args, kwargs, work_out):
        asked.append(func)
        return outputs(self, func, args, kwargs, lambda: worked_out.append(func) or work_out())

    monkeypatch.setattr(Shapes, "outputs", counted)
    remembered = trace(MICRO, REGIMES[name], 16, 2).frame
    monkeypatch.setattr(Shapes, "outputs", lambda self, func, args, kwargs, work_out: work_out())
    anew = trace(MICRO, REGIMES[name], 16, 2).frame
    assert remembered.drop(columns="t_s").equals(anew.drop(columns="t_s"))
    assert len(worked_out) < len(asked) / 2
