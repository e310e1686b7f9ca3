"""What a cell of the check on a GPU asks, times and says, by value: no step is taken and no GPU is
asked."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace as Its

import pytest
import torch

from vramlab import machine
from vramlab.baichuan import random_weights as gpu_model
from vramlab.capture.memory_limit import Ceiling
from vramlab.capture.meter import Meter
from vramlab.capture.nvml import Reader
from vramlab.forecast.forecast import Question
from vramlab.gpu_check import cell as gpu_cell

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
    assert gpu_cell._parts(Its(parts=[0, 1]), taking, {"step": step, "parts": parts}) == due


@pytest.mark.parametrize(
    ("window_s", "budget_s", "steps"),
    [(10, 1000, 6), (2000, 2000, 400), (100, 40, 10), (100, 2, 1), (0.1, 1000, 1)],
)
def test_so_many_steps_are_timed_as_the_window_and_half_of_what_is_left_are_enough_for(
    monkeypatch, window_s, budget_s, steps
):
    taken = []
    monkeypatch.setattr(
        gpu_cell,
        "_stepper",
        lambda question, trainer: (
            lambda number, read=True: (
                taken.append((number, read)),
                9.0 if len(taken) == 1 else 2.0,
            )[1]
        ),
    )
    monkeypatch.setattr(
        gpu_cell, "clock", lambda device: Its(rows=[{"step_s": 1.0 * n} for n in (4, 1, 3, 2, 5)])
    )
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([100.0, 108.0]).__next__))
    question, trainer = Its(seq=8, batch=3, row=Its(accumulate=2)), Its(observer=Its())
    found = gpu_cell._speed(question, {"window_s": window_s, "device": "cpu"}, trainer, budget_s)
    assert taken == [(0, True), (1, True), *((n, n == steps - 1) for n in range(steps))]
    assert found == {
        "step_s_median": 3.0,
        "step_s_q25": 2.0,
        "step_s_q75": 4.0,
        "steps_timed": steps,
        "window": (100.0, 108.0),
        "window_tokens": 48 * steps,
        "tokens_per_s": 6.0 * steps,
    }
    assert len(trainer.observer.to.rows) == 5


def test_a_step_takes_one_of_four_batches_and_reads_its_loss_where_asked(monkeypatch):
    made, given = [], []
    monkeypatch.setattr(
        gpu_cell, "batches", lambda *asked: made.append(asked) or f"batch {len(made) - 1}"
    )
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter(range(0, 1000, 3)).__next__))
    losses = [1.0] * 6 + [float("nan"), float("inf")]
    trainer = Its(
        regime=Its(accumulate=2), step=lambda *asked: given.append(asked) or losses[len(given) - 1]
    )
    step = gpu_cell._stepper(Its(spec="spec", seq=8, batch=3), trainer)
    assert [step(number) for number in range(6)] == [3] * 6
    assert made == [("spec", 8, 3, number, 2) for number in range(4)]
    assert given == [(f"batch {number % 4}", [0.5, 0.5]) for number in range(6)]
    assert step(6, read=False) == 3
    with pytest.raises(FloatingPointError, match="the loss is inf: random weights"):
        step(7)


@pytest.mark.parametrize(
    ("rule", "hurried", "expected"),
    [(Its(), False, False), (Its(gap=5), False, True), (Its(), True, True)],
)
def test_a_row_is_hurried_where_it_projects_or_guesses(rule, hurried, expected):
    class Grads:
        def hurried(self):
            return "others" if hurried else self

    assert gpu_cell._hurried(Its(rule=rule, grads=Grads())) is expected


def test_a_limit_is_a_share_of_the_card_and_at_most_all_of_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Its(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    for device, limit in (("cuda", 250), ("cuda:1", 3000), ("cuda", 0), ("cpu", 250)):
        gpu_cell._limit(device, limit)
    assert asked == [0.25, 1.0]


def test_who_records(monkeypatch):
    monkeypatch.setattr(
        "vramlab.capture.cuda_recorder.Recorder", lambda device: f"recorder of {device}"
    )
    assert (
        type(gpu_cell._recorder("cpu", 0)) is Meter
        and gpu_cell._recorder("cuda:1", 5) == "recorder of cuda:1"
    )
    ceiling = gpu_cell._recorder("cpu", 12345)
    assert type(ceiling) is Ceiling and ceiling.allocator.device.capacity_bytes == 12345


def test_without_torchs_own_peaks_requested_bytes_stand_for_them():
    assert gpu_cell._peaks(Its(), {"requested_peak_bytes": 7}) == {
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
    ("hurried", "interval", "new"),
    [(False, False, False), (False, True, False), (True, True, True)],
)
def test_a_row_is_timed_as_it_is_used(monkeypatch, tmp_path, hurried, interval, new):
    trains = Its(interval=3) if interval else Its()
    first = Its(regime=Its(trains="shown"))
    timed = []
    monkeypatch.setattr(Question, "row", property(lambda asked: Its(trains=trains)))
    monkeypatch.setattr(gpu_cell.nvml, "find", lambda device: Card())
    monkeypatch.setattr(
        gpu_cell, "_bytes", lambda *asked: ({"phase": "forward", "said": ["bytes"]}, first)
    )
    monkeypatch.setattr(gpu_cell, "_hurried", lambda row: hurried)
    monkeypatch.setattr(gpu_cell, "_unhurried", lambda question, device: "another")
    monkeypatch.setattr(gpu_cell.dataclasses, "replace", lambda regime, trains: Its(trains=trains))
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([10.0, 14.0]).__next__))
    monkeypatch.setattr(
        gpu_cell,
        "_speed",
        lambda question, asked, trainer, left: timed.append((trainer, left)) or {"step_s": 2},
    )
    asked = {
        "model": "tiny",
        "regime": "full",
        "seq": 8,
        "batch": 1,
        "weights": "",
        "device": "cpu",
        "folder": str(tmp_path),
        "limit_bytes": 0,
        "budget_s": 50,
    }
    found = gpu_cell.measure(asked)
    assert timed == [("another" if new else first, 46.0)]
    assert first.regime.trains == (trains if interval and not hurried else "shown")
    assert found.pop("nvml_used_bytes") == 70 and found.pop("nvml_process_bytes") is None
    assert found == {
        "phase": "forward",
        "said": ["bytes"],
        "step_s": 2,
        "energy": {"j": None, "error_j": None, "how": "N/A: no window"},
    }


def test_a_row_of_the_small_sweep_is_run_as_the_sweep_runs_it(monkeypatch, tmp_path):
    asked = []

    def execute(params, folder, progress):
        asked.append((params, folder, progress))
        (tmp_path / "result.json").write_text(
            json.dumps({"outcome": "ok", "reason": "", "speed": {"tokens_per_s": 5.0}})
        )
        return tmp_path

    monkeypatch.setattr(gpu_cell.run, "execute", execute)
    found = gpu_cell.tiny({"regime": "lora", "device": "cpu", "folder": str(tmp_path)})
    assert asked == [
        (
            {
                "regime": "lora",
                "device": "cpu",
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


def test_what_ran_out_has_its_evidence_and_what_failed_has_not():
    result: dict = {}
    with gpu_cell._evidence(result):
        raise MemoryError("no  room\n" + "x" * 500)
    assert result["outcome"] == "oom" and result["oom"]["source"] == "the host's allocator"
    assert result["reason"] == ("MemoryError: no room " + "x" * 500)[:400]
    with gpu_cell._evidence(failed := {}):
        raise KeyError("a")
    assert failed == {"outcome": "failed", "reason": "KeyError: 'a'"}


def test_a_line_is_done_and_what_is_only_for_the_way_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert gpu_cell.main() is None
    monkeypatch.setitem(gpu_cell.DOES, "measure", lambda asked: {"step_s": asked["budget_s"]})
    monkeypatch.setattr(gpu_cell, "time", Its(perf_counter=iter([10.0, 14.0]).__next__))
    asked = {"does": "measure", "folder": str(tmp_path / "a"), "budget_s": 3, "seq": 8}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    gpu_cell.main()
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == {
        "does": "measure",
        "seq": 8,
        "outcome": "ok",
        "reason": "",
        "step_s": 3,
        "took_s": 4.0,
    }


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
        gpu_model,
        "Path",
        lambda path: Its(read_text=lambda: files[path], exists=lambda: files[path] is not None),
    )
    assert machine._host_bytes() == expected


def test_the_machine_in_figures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: Its(name="card", total_memory=990)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        gpu_model.environment, "record", lambda device: {"versions": {"torch": "2"}}
    )
    monkeypatch.setattr(gpu_model, "_driver", lambda: "570")
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
        assert machine._driver() == "570"
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: {}["x"])
    assert machine._driver() == "N/A (KeyError)"


def test_a_timeline_is_what_the_recording_says_of_the_step(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_cell, "curve", lambda frame: Its(to_parquet=lambda path, compression: path.touch())
    )
    kept = Its(
        frame=lambda: None,
        peak=lambda step: {"phase": step, "categories": {"a": 1}, "owners": [2], "peak_bytes": 3},
    )
    assert gpu_cell._timeline(contextlib.ExitStack(), kept, 7, tmp_path) == {
        "phase": 7,
        "ledger": {"a": 1},
        "owners": [2],
        "requested_peak_bytes": 3,
        "said": [],
    }
