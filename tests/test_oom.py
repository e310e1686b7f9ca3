"""Running out of memory is evidence: what was asked, what there was, who held the rest, and what
would have fitted."""

from __future__ import annotations

import json
from collections import Counter

import pandas as pd
import pytest
import torch

import micro
from simulated_history import Pair, SimulatedHistory
from vramlab.allocator.settings import Settings
from vramlab.allocator.simulate import simulate
from vramlab.capture import oom
from vramlab.capture.cuda_recorder import Recorder
from vramlab.capture.memory_limit import Ceiling
from vramlab.capture.meter import Meter
from vramlab.capture.oom import RanOut, holders, of_snapshot, record_of, watched, words
from vramlab.forecast import what_fits as fitting
from vramlab.forecast.forecast import Question, forecast
from vramlab.forecast.what_fits import changes, ladder, limited, what_fits
from vramlab.processes import CallResult
from vramlab.regimes.regime import read_row
from vramlab.runs import learning
from vramlab.runs.execute import execute
from vramlab.runs.folder import read_runs
from vramlab.timeline.events import on_device, signed
from vramlab.training.trainer import Schedule, Trainer

MIB = 1 << 20
SMALL = {
    "recipe": "smoke",
    "steps": 2,
    "train_items": 64,
    "val_items": 20,
    "test_items": 20,
    "batch_size": 4,
}
BIG = {"vocab_size": 3000, "hidden_size": 200, "num_attention_heads": 4}
"""Wide enough for segments of the large pool."""


def step_under(watcher: Meter, row: dict) -> None:
    with watcher:
        trainer = Trainer(
            micro.model(**BIG), read_row("row", row), Schedule(1e-3, 4), observer=watcher
        )
        for seed in range(2):
            trainer.step([micro.batch(seed)])


def peak_reserved(row: dict) -> int:
    meter = Meter()
    step_under(meter, row)
    frame = meter.frame()
    return simulate(frame[on_device(frame)]).peak_reserved_bytes


@pytest.mark.parametrize(
    "row", [{}, {"acts": "checkpoint", "until": "backward", "rule": "sgd"}], ids=["full", "lomo"]
)
def test_a_device_one_segment_too_small_refuses_the_step_and_one_that_is_enough_does_not(row):
    enough = peak_reserved(row)
    unhindered = Ceiling(enough)
    step_under(unhindered, row)
    assert unhindered.allocator.peak_reserved_bytes <= enough
    with pytest.raises(RanOut) as caught:
        step_under(Ceiling(enough // 2), row)
    found = caught.value.record
    assert found["capacity_bytes"] == enough // 2 and found["source"] == "the simulated allocator"
    assert found["reserved_bytes"] + found["free_bytes"] == enough // 2
    assert found["allocated_bytes"] <= found["reserved_bytes"]
    assert found["largest_free_block_bytes"] <= found["reserved_bytes"] - found["allocated_bytes"]
    assert found["asked_bytes"] > 0 and found["phase"] in (
        "init",
        "forward",
        "backward",
        "recompute",
        "update",
    )


def test_the_owners_are_all_that_was_alive_largest_first_and_round_up_to_what_was_allocated():
    with pytest.raises(RanOut) as caught:
        step_under(Ceiling(peak_reserved({}) * 3 // 4), {})
    found = caught.value.record
    held = sum(found["categories"].values())
    assert (
        held <= found["allocated_bytes"] < held + 512 * 400
    )  # a request is rounded up to 512 bytes or a rest too small to cut
    sizes = [owner["bytes"] for owner in found["owners"]]
    assert (
        sizes == sorted(sizes, reverse=True)
        and sum(sizes) <= held
        and found["categories"]["weights"] > 0
    )
    assert json.loads(json.dumps(found)) == found


def test_what_forward_made_and_nobody_freed_is_an_activation():
    """In a forward that is cut off nothing has survived its phase yet."""
    meter = Meter()
    with meter:
        layer = torch.nn.Linear(8, 8)
        meter.own("weights", layer.named_parameters())
        with meter.phase("forward"):
            kept = layer(torch.ones(4, 8)).relu()
            alive = holders(meter.frame())
    kinds = {category for _, category, _ in alive}
    assert kinds == {"weights", "activations"} and kept.shape == (4, 8)
    frame = meter.frame()
    assert sum(holders(frame).values()) == signed(frame[on_device(frame)]).sum()


def test_another_step_can_be_taken_after_running_out():
    with pytest.raises(RanOut):
        step_under(Ceiling(4 * MIB), {})
    step_under(Ceiling(64 * MIB), {})


# CUDA's observer, faked: what torch does is call it while the step is still alive -----------------

RAW = {
    "segments": [
        {
            "device": 0,
            "total_size": 20 * MIB,
            "allocated_size": 12 * MIB,
            "blocks": [
                {"size": 12 * MIB, "state": "active_allocated"},
                {"size": 5 * MIB, "state": "inactive"},
                {"size": 3 * MIB, "state": "active_awaiting_free"},
            ],
        },
        {
            "device": 1,
            "total_size": 90 * MIB,
            "allocated_size": 0,
            "blocks": [{"size": 90 * MIB, "state": "inactive"}],
        },
    ],
    "device_traces": [
        [{"action": "alloc", "size": 1}, {"action": "oom", "size": 31 * MIB, "device_free": MIB}],
        [],
    ],
}


@pytest.fixture
def cuda(monkeypatch):
    """A torch that lends its observer out, and a snapshot."""
    attached = []
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False
    )
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device=None: RAW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(oom._Watch, "attached", False)
    return attached


def test_the_observer_is_attached_once_and_records_before_anything_unwinds(cuda):
    frames, embed = Meter(), torch.zeros(100)
    with frames:
        frames.own("weights", [("embed", embed)])
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError) as caught, watched("cuda:0", frames.frame):
                cuda[0](0, 32 * MIB, 24 * MIB, 2 * MIB)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 31.00 MiB")
    found = record_of(caught.value)
    assert len(cuda) == 1 and found["source"] == "torch's out-of-memory observer"
    assert {name: found[name] // MIB for name in oom.FIGURES} == {
        "asked_bytes": 31,
        "free_bytes": 2,
        "allocated_bytes": 12,
        "reserved_bytes": 20,
        "largest_free_block_bytes": 5,
        "capacity_bytes": 24,
    }
    assert (
        found["owners"] == [{"category": "weights", "module": "embed", "bytes": 400}]
        and not found["said"]
    )


def test_the_observer_never_raises_whatever_breaks_and_says_what_did(cuda, monkeypatch, tmp_path):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", broken)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", broken)
    with watched("cuda", broken, tmp_path / "oom.pickle"):
        cuda[0](0, 32 * MIB, 24 * MIB, 2 * MIB)
    found = record_of(torch.OutOfMemoryError("x"))
    assert (
        found["asked_bytes"] == 32 * MIB
        and found["reserved_bytes"] is None
        and found["owners"] == []
    )
    assert all(
        part in found["said"] for part in ("no snapshot", "no owners", "no dump", "no space left")
    )
    assert not (tmp_path / "oom.pickle").exists()


def test_outside_the_window_and_on_a_cpu_nothing_is_recorded(cuda):
    with watched("cpu"):
        assert cuda == []
    with watched("cuda"):
        pass
    cuda[0](0, 1, 2, 3)
    assert oom._watch.seen is None
    said = record_of(torch.OutOfMemoryError("no room"))
    assert (
        said["asked_bytes"] is None
        and "no room" in said["said"]
        and said["source"] == "torch's exception"
    )
    assert record_of(MemoryError("none"))["source"] == "the host's allocator"


def test_without_a_history_the_segment_stands_for_the_request():
    assert of_snapshot({**RAW, "device_traces": []}, 0, 32 * MIB, 0, 1)["asked_bytes"] == 32 * MIB
    assert of_snapshot(RAW, 1, 7, 0, 1) == {
        "asked_bytes": 7,
        "free_bytes": 0,
        "capacity_bytes": 1,
        "allocated_bytes": 0,
        "reserved_bytes": 90 * MIB,
        "largest_free_block_bytes": 90 * MIB,
    }


def test_a_recorder_knows_the_owners_while_the_step_is_still_alive():
    """What the observer asks of it on CUDA: the history up to now, read in mid-step, is the
    beginning of the whole one."""
    kept, seen = SimulatedHistory(), []
    recorder = Recorder(history=kept)

    class Asks(Pair):
        def phase(self, name):
            if name == "update":
                seen.append(recorder.so_far())
            return super().phase(name)

    with recorder:
        trainer = Trainer(
            micro.model(), read_row("row", {}), Schedule(1e-2, 2), observer=Asks(kept, recorder)
        )
        trainer.step([micro.batch(0)])
        trainer.step([micro.batch(1)])
    first, whole = seen[-1], recorder.frame()
    same = ["event", "bytes", "live_bytes", "phase", "step"]
    pd.testing.assert_frame_equal(first[same], whole[same].iloc[: len(first)])
    kinds = Counter()
    for (_, category, _), size in holders(first).items():
        kinds[category] += size
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert (
        kinds["weights"] == weights
        and kinds["gradients"] == weights
        and kinds["optimizer"] >= 2 * weights
    )


# what would have fitted ---------------------------------------------------------------------------

ASKED = Question("tiny", "full", 128, 4)


@pytest.mark.slow
def test_each_change_is_the_forecast_of_that_change():
    settings, half = Settings(), limited(forecast(ASKED, cache_dir=None).reserved_peak_bytes // 2)
    found = {
        answer["change"]: answer for answer in what_fits(ASKED, half, settings, cache_dir=None)
    }
    assert list(found)[:5] == [
        "activation checkpointing",
        "a fused head",
        "activation checkpointing and a fused head",
        "half the batch, 2",
        "expandable segments",
    ]
    assert list(found)[5].startswith("the next regime down, ") and len(found) == 6
    rewritten = forecast(Question("tiny", "checkpoint", 128, 4), half, cache_dir=None)
    assert found["activation checkpointing"]["peak_reserved_bytes"] == rewritten.reserved_peak_bytes
    assert (
        found["half the batch, 2"]["peak_allocated_bytes"]
        == forecast(Question("tiny", "full", 128, 2), cache_dir=None).allocated_peak_bytes
    )
    assert all(
        answer["kind"] == "predicted" and answer["fits"] in (True, False)
        for answer in found.values()
    )


def test_what_the_row_has_already_is_not_offered_and_what_it_excludes_says_why(monkeypatch):
    lomo = Question("tiny", "lomo", 128, 1)
    assert [change for change, *_ in changes(lomo, Settings(expandable_segments=True))] == [
        "half the tokens, 64"
    ]
    excluded = Question(
        "tiny", "checkpoint", 16, 1, axes='{"acts": "offload", "grads": "zeroth_order"}'
    )
    answer = fitting._answer("x", excluded, Settings(), limited(MIB), None)
    assert answer["fits"] is None and "not possible" in answer["reason"]


@pytest.mark.parametrize(
    ("regime", "weights", "first"),
    [
        ("full", "bf16", "adam8bit"),
        ("bf16", "", "adam8bit"),
        ("full", "", "master"),
        ("qlora", "", None),
        ("mezo", "bf16", "mixed"),
    ],
)
def test_the_ladder_goes_down_from_where_the_question_stands(regime, weights, first):
    assert (
        next((rung.regime for rung in ladder(Question("tiny", regime, 16, 1, weights))), None)
        == first
    )


@pytest.mark.slow
def test_a_run_with_a_limit_ends_with_the_evidence_and_the_next_one_goes_on(tmp_path):
    for name, limit_mib in (("a", 12.0), ("b", 4000.0)):
        execute(
            {**SMALL, "regime": "full", "limit_mib": limit_mib, "measure": False},
            tmp_path / name,
            progress=False,
        )
    lost, kept = read_runs(tmp_path)
    assert (
        lost.result["outcome"] == "oom" and kept.ok and not (lost.folder / "steps.parquet").exists()
    )
    found = lost.result["oom"]
    assert (
        found["capacity_bytes"] == 12 * MIB and found["owners"] and found["free_bytes"] < 12 * MIB
    )
    fitted = found["would_fit"]
    assert {"activation checkpointing", "expandable segments"} <= {
        change["change"] for change in fitted
    }
    assert all(change["fits"] is not None for change in fitted), fitted
    text = words(found)
    assert (
        "out of memory in" in text
        and "with activation checkpointing:" in text
        and "12.0 MiB" in text
    )


def test_a_host_that_runs_out_has_no_card_to_ask_of(tmp_path, monkeypatch):
    def learn(*_):
        raise MemoryError("none")

    monkeypatch.setattr(learning, "learn", learn)
    execute({**SMALL, "measure": False}, tmp_path / "r", progress=False)
    found = json.loads((tmp_path / "r" / "result.json").read_text())["oom"]
    assert found["would_fit"] == [] and found["asked_bytes"] is None


@pytest.mark.parametrize(
    ("batch", "seq", "expandable", "offered"),
    [
        (5, 9, True, ["half the batch, 2"]),
        (2, 9, True, ["half the batch, 1"]),
        (1, 9, True, ["half the tokens, 4"]),
        (1, 2, True, ["half the tokens, 1"]),
        (1, 1, True, []),
        (1, 1, False, ["expandable segments"]),
    ],
)
def test_a_half_is_offered_of_what_can_be_halved(batch, seq, expandable, offered):
    question = Question("tiny", "full", seq, batch, axes='{"acts": "checkpoint", "head": "fused"}')
    found = list(changes(question, Settings(expandable_segments=expandable)))
    assert [change for change, *_ in found] == offered
    for change, changed, settings in found:
        assert (changed.batch, changed.seq) == {
            "half the batch": (batch // 2, seq),
            "half the tokens": (batch, seq // 2),
        }.get(change.split(",")[0], (batch, seq))
        assert settings.expandable_segments is (change == "expandable segments" or expandable)


def test_one_missing_change_is_not_offered_together_with_itself():
    for axes, offered in (
        ('{"acts": "checkpoint"}', ["a fused head"]),
        ('{"head": "fused"}', ["activation checkpointing"]),
    ):
        found = list(
            changes(Question("tiny", "full", 1, 1, axes=axes), Settings(expandable_segments=True))
        )
        assert [change for change, *_ in found] == offered
        assert json.loads(found[0][1].axes) == {"acts": "checkpoint", "head": "fused"}


def test_the_next_regime_down_is_the_first_that_fits(monkeypatch):
    asked, fits = [], {"badam", "lomo"}

    def answer(change, question, settings, card, cache_dir):
        asked.append(change)
        return {"change": change, "fits": question.regime in fits and change.startswith("the next")}

    monkeypatch.setattr(fitting, "_answer", answer)
    monkeypatch.setattr(
        fitting, "changes", lambda question, settings: [("one", question, settings)]
    )
    full = Question("tiny", "full", 8, 1, "bf16")
    assert [row["change"] for row in what_fits(full, limited(1024), cache_dir=None)] == [
        "one",
        "the next regime down, badam (bf16)",
    ]
    assert asked == [
        "one",
        *(f"the next regime down, {name} (bf16)" for name in ("adam8bit", "galore", "badam")),
    ]
    fits.clear()
    assert [row["change"] for row in what_fits(full, limited(1024), cache_dir=None)] == ["one"], (
        "none of them fits"
    )
    assert [
        row["change"]
        for row in what_fits(Question("tiny", "qlora", 8, 1), limited(1024), cache_dir=None)
    ] == ["one"]


def test_a_limit_is_a_card_of_just_these_bytes_and_no_speed():
    made = limited(12_345_678_901, (9, 0))
    assert (made.capacity_bytes, made.total_bytes, made.context_bytes) == (
        12_345_678_901,
        12_345_678_901,
        0,
    )
    assert made.compute_capability == (9, 0)
    assert {made.bf16_tflops, made.fp32_tflops, made.gb_per_s, made.host_gb_per_s} == {
        1.0
    } and limited(1024).capacity_bytes == 1024
    assert limited(1024).compute_capability == (8, 0)


def test_what_fits_is_asked_of_a_process_that_sees_no_gpu(monkeypatch):
    asked, answers = (
        [],
        [CallResult({"fitted": [{"change": "one"}]}, ""), CallResult(None, "killed")],
    )

    def apart(target, payload, limit_s, environment):
        asked.append((target, limit_s, environment))
        monkeypatch.setattr(fitting, "what_fits", lambda *what: what)
        question, card, settings = fitting._answered(json.loads(json.dumps(payload)))["fitted"]
        assert (question, card, settings) == (
            ASKED,
            limited(77),
            Settings(expandable_segments=True),
        )
        return answers.pop(0)

    monkeypatch.setattr(fitting, "call_once", apart)
    assert fitting.asked_apart(ASKED, 77, "expandable_segments:True", 5.0) == [{"change": "one"}]
    assert fitting.asked_apart(ASKED, 77, "expandable_segments:True", 5.0) == [
        {"change": "any change", "fits": None, "reason": "no forecast: killed"}
    ]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert asked == [("vramlab.forecast.what_fits:_answered", 5.0, environment)] * 2
