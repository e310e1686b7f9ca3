"""What a cell of the check on a GPU asks, times and says, by value: no step is taken and no GPU is
asked."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace as Its

import pytest
import torch

from benchmarks import trainer_peers
from vramlab import machine
from vramlab.baichuan import random_weights as gpu_model
from vramlab.capture.memory_limit import Ceiling
from vramlab.capture.nvml import Reader
from vramlab.gpu_check import cell as gpu_cell
from vramlab.gpu_check import recorded_step
from vramlab.runs.passes import limited
from vramlab.runs.schema import SPEED

NO_TURNS = Its(sets=lambda count: [(0,)], state="device", interval=1)


def turns(sets, state="device", interval=2):
    return Its(sets=lambda count: sets[:count], state=state, interval=interval)


@pytest.mark.parametrize(
    ("taking", "step", "parts", "due"),
    [
        (NO_TURNS, 0, None, [(0,)]),
        (NO_TURNS, 2, None, [(0,)] * 3),
        (NO_TURNS, None, None, [(0,)] * 2),
        (turns([(0,), (1,)]), 1, [1], [(0,), (1,), (1,)]),
        (turns([(0,), (1,)]), 1, None, [(1,), (0,), (0,)]),
        (turns([(0,), (1,)], "reset"), 1, [0], [(1,), (0,), (0,)]),
        (turns([(0,), (1,)], "reset", 1), 1, [0], [(1,), (0,)]),
        (turns([(0,), (1,)], "device", 1), 1, [0], [(1,), (0,), (0,)]),
        (turns([(0,), (0,)]), 1, [0], [(0,)] * 3),
    ],
)
def test_the_last_recorded_step_has_the_parts_that_were_forecast(taking, step, parts, due):
    assert (
        recorded_step.parts_of_steps(Its(parts=[0, 1]), taking, {"step": step, "parts": parts})
        == due
    )


class Steps:
    """A trainer whose n-th step returns the n-th loss, and a clock that says 2 s of each."""

    def __init__(self, losses=()):
        self.losses, self.batches, self.shares = list(losses), [], []
        self.regime, self.observer, self.rows = Its(accumulate=2), Its(), []

    def step(self, rows, shares):
        assert self.observer.target is self
        self.batches.append(rows)
        self.shares.append(shares)
        phases = dict.fromkeys(("forward_s", "backward_s", "update_s"), 0.5)
        step_s = 9.0 if len(self.batches) == 1 else 2.0
        self.rows.append({"step_s": step_s, **phases})
        return self.losses[len(self.batches) - 1] if self.losses else 1.0


def time_steps(monkeypatch, trainer, window_s, budget_s):
    made = []
    monkeypatch.setattr(
        gpu_cell, "batches", lambda *size: made.append(size) or f"batch {len(made) - 1}"
    )
    monkeypatch.setattr(gpu_cell, "clock", lambda device: trainer)
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([100.0, 108.0]).__next__))
    question = Its(spec="spec", seq=8, batch=3)
    timed = gpu_cell.time_steps(question, trainer, "cpu", window_s, budget_s)
    assert made == [("spec", 8, 3, number, 2) for number in range(4)]
    return timed


@pytest.mark.parametrize(
    ("window_s", "budget_s", "steps"),
    [(10, 1000, 6), (2000, 2000, 400), (100, 40, 10), (100, 2, 1), (0.1, 1000, 1)],
)
def test_so_many_steps_are_timed_as_the_window_and_half_of_what_is_left_are_enough_for(
    monkeypatch, window_s, budget_s, steps
):
    trainer = Steps()
    figures, window = time_steps(monkeypatch, trainer, window_s, budget_s)
    # two steps are not timed
    assert trainer.batches[2:] == [f"batch {number % 4}" for number in range(steps)]
    assert trainer.batches[:2] == ["batch 0", "batch 1"]
    assert {tuple(shares) for shares in trainer.shares} == {(0.5, 0.5)}
    assert window == (100.0, 108.0)
    assert figures == {
        "step_s_median": 2.0,
        "step_s_q25": 2.0,
        "step_s_q75": 2.0,
        "forward_s": 0.5,
        "backward_s": 0.5,
        "update_s": 0.5,
        "steps_timed": steps,
        "window_tokens": 48 * steps,
        "tokens_per_s": 6.0 * steps,
    }


@pytest.mark.parametrize("losses", [[math.inf], [1.0, math.nan], [1.0] * 7 + [math.inf]])
def test_a_loss_that_is_not_finite_ends_the_cell(monkeypatch, losses):
    with pytest.raises(FloatingPointError, match=f"the loss is {losses[-1]}: random weights"):
        time_steps(monkeypatch, Steps(losses), 10, 1000)


@pytest.mark.parametrize(
    ("rule", "short_cycle", "expected"),
    [(Its(), False, False), (Its(gap=5), False, True), (Its(), True, True)],
)
def test_recorded_steps_are_unusual_where_a_row_projects_or_guesses(rule, short_cycle, expected):
    class Grads:
        def with_short_cycle(self):
            return "others" if short_cycle else self

    assert recorded_step.records_unusual_steps(Its(rule=rule, grads=Grads())) is expected


def test_a_limit_is_a_share_of_the_card_and_at_most_all_of_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Its(total_memory=1000))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *limit: asked.append(limit)
    )
    for device, limit in (("cuda", 250), ("cuda:1", 3000), ("cuda", 0)):
        assert limited(device, limit) is None
    # torch takes no device without a number here; None is the current one
    assert asked == [(0.25, None), (1.0, 1)]


def test_a_limit_on_a_cpu_is_a_meter_of_a_device_with_an_end():
    ceiling = limited("cpu", 12345)
    assert type(ceiling) is Ceiling and ceiling.allocator.device.capacity_bytes == 12345
    assert limited("cpu", 0) is None


def test_without_torchs_own_peaks_requested_bytes_stand_for_them():
    assert recorded_step.peaks(Its(), {"requested_peak_bytes": 7}) == {
        "allocated_peak_bytes": 7,
        "reserved_peak_bytes": None,
        "num_alloc_retries": None,
    }


class Card(Reader):
    """A card of one sample."""

    card = "one"

    def sample(self):
        self.lost = "gone"
        return {**super().sample(), "used_bytes": 70}


@pytest.mark.parametrize(
    ("unusual", "interval", "new"),
    [(False, False, False), (False, True, False), (True, True, True)],
)
def test_a_row_is_timed_as_it_is_used(monkeypatch, unusual, interval, new):
    trains = Its(interval=3) if interval else Its()
    row, first = Its(trains=trains), Its(regime=Its(trains="of the recording"))
    monkeypatch.setattr(recorded_step, "_record", lambda *cell: ({"phase": "forward"}, first))
    monkeypatch.setattr(recorded_step, "records_unusual_steps", lambda row: unusual)
    monkeypatch.setattr(recorded_step, "random_model", lambda spec: f"model of {spec}")
    monkeypatch.setattr(recorded_step, "make_trainer", lambda *made: made[:3])
    monkeypatch.setattr(
        recorded_step.dataclasses, "replace", lambda regime, trains: Its(trains=trains)
    )
    figures, trainer = recorded_step.record_step(Its(row=row, spec="7B"), {"device": "cpu"}, None)
    assert figures == {"phase": "forward"}
    assert trainer == (("model of 7B", row, "cpu") if new else first)
    assert first.regime.trains == (trains if interval and not unusual else "of the recording")


def test_a_measured_row_has_bytes_speed_energy_and_the_drivers_figures(monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(gpu_cell.nvml, "find", lambda device: Card())
    monkeypatch.setattr(
        gpu_cell, "record_step", lambda *cell: ({"phase": "forward", "said": ["bytes"]}, "trainer")
    )
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([10.0, 14.0]).__next__))

    def time_steps(question, trainer, device, window_s, left_s):
        timed.append((trainer, device, window_s, left_s))
        return {"step_s": 2}, (1.0, 2.0)

    monkeypatch.setattr(gpu_cell, "time_steps", time_steps)
    cell = {
        "model": "tiny",
        "regime": "full",
        "seq": 8,
        "batch": 1,
        "weights": "",
        "device": "cpu",
        "folder": str(tmp_path),
        "window_s": 3,
        "budget_s": 50,
    }
    found = gpu_cell.measure(cell)
    assert timed == [("trainer", "cpu", 3, 46.0)]
    assert found.pop("nvml_used_bytes") == 70 and found.pop("nvml_process_bytes") is None
    assert found["energy"].pop("how").startswith("N/A: the window has 1.00 s")
    assert found == {
        "phase": "forward",
        "said": ["bytes"],
        "step_s": 2,
        "energy": {"j": None, "error_j": None},
    }


def test_a_row_of_the_small_sweep_is_run_as_the_sweep_runs_it(monkeypatch, tmp_path):
    asked = []

    def execute(params, folder, progress):
        asked.append((params, folder, progress))
        (tmp_path / "result.json").write_text(
            json.dumps({"outcome": "ok", "reason": "", "speed": dict.fromkeys(SPEED, 5.0)})
        )
        return tmp_path

    monkeypatch.setattr(gpu_cell, "execute", execute)
    shape = {"model": "tiny", "seq": 256, "batch": 16}
    found = gpu_cell.run_small(
        {"regime": "lora", "device": "cpu", "folder": str(tmp_path), **shape}
    )
    assert asked == [
        (
            {
                "regime": "lora",
                "device": "cpu",
                "model": "tiny",
                "max_length": 256,
                "batch_size": 16,
                "recipe": "smoke",
                "steps": 40,
                "train_items": 400,
                "val_items": 60,
                "test_items": 60,
                "measure": False,
            },
            tmp_path / "run",
            False,
        )
    ]
    assert (found["tokens_per_s"], found["outcome"], found["reason"]) == (5.0, "ok", "") and found[
        "run"
    ]["outcome"] == "ok"


def run_cell(monkeypatch, result):
    """What a cell that ends so is kept as."""
    monkeypatch.setitem(gpu_cell.KINDS, "measure", result)
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([10.0, 14.0]).__next__))
    return gpu_cell.run_cell({"does": "measure", "budget_s": 3})


def test_what_ran_out_has_its_evidence_and_what_failed_has_not(monkeypatch):
    def run_out(cell):
        raise MemoryError("no  room\n" + "x" * 500)

    result = run_cell(monkeypatch, run_out)
    assert result["outcome"] == "oom" and result["oom"]["source"] == "the host's allocator"
    assert result["reason"] == ("MemoryError: no room " + "x" * 500)[:400]
    failed = run_cell(monkeypatch, lambda cell: cell["a"])
    assert failed == {"outcome": "failed", "reason": "KeyError: 'a'", "took_s": 4.0}


def test_a_cell_does_what_it_is_asked(monkeypatch):
    result = run_cell(monkeypatch, lambda cell: {"step_s": cell["budget_s"]})
    assert result == {"outcome": "ok", "reason": "", "step_s": 3, "took_s": 4.0}


def test_a_peer_is_measured_by_its_module(monkeypatch):
    monkeypatch.setattr(trainer_peers, "measure", lambda cell: {"step_s": cell["seq"]})
    assert gpu_cell.measure_peer({"peers": "benchmarks.trainer_peers", "seq": 8}) == {"step_s": 8}


def test_a_weight_is_filled_with_what_was_drawn_over_and_over(monkeypatch):
    monkeypatch.setattr(gpu_model, "RANDOM_NUMBERS", 4)
    drawn = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for shape, filled in (
        ((2, 5), [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]),
        ((1, 3), [1, 2, 3]),
        ((2, 4), [1, 2, 3, 4] * 2),
        ((3,), [1, 1, 1]),
    ):
        weight = torch.zeros(shape)
        gpu_model._fill(weight, drawn)
        assert weight.flatten().tolist() == filled


def test_batches_are_full_rows_of_words_that_are_all_labelled():
    first, second = gpu_model.batches(Its(config=Its(vocab_size=5)), 50, 2, 0, 2)
    assert first["input_ids"].shape == (2, 50) and set(first["input_ids"].flatten().tolist()) == {
        3,
        4,
    }
    assert torch.equal(first["labels"], first["input_ids"]) and not torch.equal(
        first["input_ids"], second["input_ids"]
    )
    assert (
        first["labels"] is not first["input_ids"]
        and len(gpu_model.batches(Its(config=Its(vocab_size=5)), 2, 1, 0)) == 1
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [(None, 10 << 10), ("max\n", 10 << 10), ("5000\n", 5000), ("99999\n", 10 << 10)],
)
def test_host_memory_is_what_is_free_or_a_containers_share(monkeypatch, share, expected):
    files = {
        "/proc/meminfo": "MemTotal: 20 kB\nMemAvailable:   10 kB",
        "/sys/fs/cgroup/memory.max": share,
    }
    monkeypatch.setattr(
        machine,
        "Path",
        lambda path: Its(read_text=lambda: files[path], exists=lambda: files.get(path) is not None),
    )
    total, free, limit = machine.host_memory()
    assert total == 20 << 10 and min(free, limit) == expected


def test_the_machine_in_figures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: Its(name="card", total_memory=990)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "record", lambda device: {"versions": {"torch": "2"}})
    monkeypatch.setattr(machine, "driver", lambda: "570")
    found = machine.describe({"device": "cuda"})
    told = [
        found[name]
        for name in (
            "name",
            "total_bytes",
            "context_bytes",
            "compute_capability",
            "driver",
            "versions",
        )
    ]
    assert told == ["card", 990, 650, [9, 0], "570", {"torch": "2"}]
    found = machine.describe({"device": "cpu"})
    assert (found["name"], found["total_bytes"], found["driver"]) == ("CPU", None, None)


def test_the_driver_is_told_as_text_or_why_not(monkeypatch):
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    for said in ("570", b"570"):
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda said=said: said)
        assert machine.driver() == "570"
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: {}["x"])
    assert machine.driver() == "N/A: KeyError: 'x'"


def test_a_timeline_is_what_the_recording_says_of_the_step(monkeypatch, tmp_path):
    monkeypatch.setattr(
        recorded_step, "curve", lambda frame: Its(to_parquet=lambda path, compression: path.touch())
    )
    kept = Its(
        frame=lambda: None,
        peak=lambda step: {"phase": step, "categories": {"a": 1}, "owners": [2], "peak_bytes": 3},
    )
    assert recorded_step.read_timeline(contextlib.ExitStack(), kept, 7, tmp_path) == {
        "phase": 7,
        "ledger": {"a": 1},
        "owners": [2],
        "requested_peak_bytes": 3,
        "said": [],
    }
