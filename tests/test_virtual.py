"""The virtual GPU: what it says happens is what happens when the same step is really run, to the
byte."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import measured_step
import micro
from chosen_rows import slow_unless_chosen
from vramlab import machine
from vramlab.capture.kernels import (
    attention_kernel,
    attention_scratch_bytes,
    matrix_workspace_bytes,
)
from vramlab.capture.meter import Meter
from vramlab.forecast.virtual_gpu import autocast, virtual_gpu
from vramlab.observer import recomputing
from vramlab.regimes.regime import read_regimes, read_row
from vramlab.regimes.trains.parts import _Moving
from vramlab.training.trainer import Schedule, Trainer

REGIMES = read_regimes()
MICRO = ({}, 3, 11)
MIDDLE = (measured_step.SIZES, 2, 96)
LAYERS = measured_step.SIZES["num_hidden_layers"]


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """A random order reads numbers, which fake tensors have not."""
    monkeypatch.setattr(_Moving, "_drawn", lambda self, number, count: list(range(count)))


def _run(regime, shape, gpu=None, position="rope", steps=2):
    """(meter, trainer) after `steps` steps without a mask, on the CPU or on `gpu`."""
    sizes, rows, tokens = shape
    meter = gpu.meter() if gpu else Meter()
    with micro.ranks(regime):
        trainer = Trainer(
            micro.model(position, **sizes),
            regime,
            Schedule(1e-3, steps),
            device=gpu.device if gpu else "cpu",
            observer=meter,
        )
        with meter:
            for _ in range(steps):
                ids = torch.zeros(rows, tokens, dtype=torch.long)
                trainer.step([{"input_ids": ids, "labels": ids.clone()}], [1.0])
    return meter, trainer


def _in_order(frame):
    """Rows to compare. Releases in a row are sorted: autocast drops its copies in the order of
    their addresses."""
    rows = frame[["event", "bytes", "step", "phase", "category", "module", "op"]].itertuples(
        index=False, name=None
    )
    return [
        row
        for event, run in itertools.groupby(rows, lambda row: row[0])
        for row in (sorted(run) if event == "free" else run)
    ]


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", REGIMES)
def test_a_fake_cpu_is_the_cpu_event_by_event(name, position):
    real, _ = _run(REGIMES[name], MICRO, position=position)
    with virtual_gpu("cpu") as gpu:
        fake, _ = _run(REGIMES[name], MICRO, gpu, position)
    assert _in_order(fake.frame()) == _in_order(real.frame())
    assert fake.peak() == real.peak() and fake.host_peak_bytes == real.host_peak_bytes


def _births(meter):
    """How many storages of which size are born, by operation, whatever the attention kernel is
    called. Left out: the batch, which is one tensor on a CPU, and on a GPU one on either side;
    attention's random state; and its sums of rows, which CUDA's kernels form only where something
    trains."""
    born = meter.frame().query(
        "event == 'alloc' and category not in ('inputs', 'workspace') and bytes > 16"
    )
    born = born[~born["op"].isin(["declared", "aten.zeros.default", "aten.clone.default"])]
    ops = born["op"].str.replace(
        r"_scaled_dot_product_\w+?_attention(_for_cpu)?", "attention", regex=True
    )
    row_sums_bytes = MIDDLE[1] * measured_step.SIZES["num_attention_heads"] * MIDDLE[2] * 4
    return Counter(
        (op, size)
        for op, size in zip(ops, born["bytes"], strict=True)
        if (op, size) != ("aten.attention.default", row_sums_bytes)
    )


NOT_COMPARED = ("prompt", "prefix", "fsdp_offload")
"""peft gives the first two a mask, which a GPU's kernel wants padded; copies to the host are none
where it is the device."""


@pytest.mark.parametrize(
    "name", slow_unless_chosen(name for name in REGIMES if name not in NOT_COMPARED)
)
def test_the_virtual_gpu_differs_from_the_cpu_by_the_attention_kernel_and_the_batch_only(name):
    if REGIMES[name].values["weights"] != "fp32" and machine.needs_fp32_products()[0]:
        pytest.skip(
            f"bf16 products are formed in fp32 here, which no GPU does: {machine.needs_fp32_products()[1]}"
        )
    real, real_trainer = _run(REGIMES[name], MIDDLE)
    with virtual_gpu("vgpu") as gpu:
        virtual, trainer = _run(REGIMES[name], MIDDLE, gpu)
    assert _births(virtual) == _births(real)
    frame = virtual.frame().query("category not in ('workspace', 'host')")
    peak_bytes = frame["bytes"].where(frame["event"] == "alloc", -frame["bytes"]).cumsum().max()
    batch_bytes, random_state_bytes = 2 * MIDDLE[1] * MIDDLE[2] * 8, 24 * LAYERS
    assert abs(peak_bytes - real.peak()["peak_bytes"]) <= batch_bytes + random_state_bytes
    assert peak_bytes == pytest.approx(real.peak()["peak_bytes"], rel=1e-3)
    assert trainer.optimizer_state_bytes() == real_trainer.optimizer_state_bytes()


def test_optimizer_state_is_what_the_rule_says():
    with virtual_gpu("vgpu") as gpu:
        meter, trainer = _run(REGIMES["full"], MIDDLE, gpu)
        promised = trainer.regime.rule.bind().state_bytes(trainer.model.parameters())
    assert meter.peak()["categories"]["optimizer"] == trainer.optimizer_state_bytes() == promised


def _weight_copies(meter, trainer):
    """Births and deaths of the bf16 copies of the blocks' matrices, in the last step."""
    sizes = {
        p.numel() * 2
        for name, p in trainer.model.named_parameters()
        if "layers" in name and p.dim() == 2
    }
    frame = meter.frame().query("step == 1 and op == 'aten._to_copy.default'")
    frame = frame[frame["bytes"].isin(sizes) & frame["module"].str.contains("proj|W_pack")]
    return frame[frame["event"] == "alloc"], frame[frame["event"] == "free"]


def test_autocast_makes_one_copy_of_each_weight_and_backward_lets_it_go_when_used():
    with virtual_gpu("vgpu") as gpu:
        born, died = _weight_copies(*_run(REGIMES["mixed"], MIDDLE, gpu))
    assert len(born) == 5 * LAYERS and set(born["phase"]) == {"forward"}
    assert len(died) == len(born) and set(died["phase"]) == {"backward"}


def test_autocast_keeps_no_copy_of_a_frozen_weight():
    row = read_row(
        "row", {"weights": "mixed", "trains": {"lora": {"rank": 2, "targets": ["down_proj"]}}}
    )
    with virtual_gpu("vgpu") as gpu:
        meter, trainer = _run(row, MIDDLE, gpu)
        frozen = {
            p.numel() * 2
            for name, p in trainer.model.named_parameters()
            if "base_layer" in name or "W_pack" in name
        }
    died = meter.frame().query("step == 1 and event == 'free' and op == 'aten._to_copy.default'")
    assert set(died[died["bytes"].isin(frozen)]["phase"]) <= {"forward", "backward"}


def test_recomputing_a_block_under_autocast_ends_with_all_copies_gone():
    row = read_row("row", {"weights": "mixed", "acts": "checkpoint"})
    with virtual_gpu("vgpu") as gpu:
        born, died = _weight_copies(*_run(row, MIDDLE, gpu))
    again = born[born["phase"] == "recompute"]
    assert len(again) == 5 * LAYERS, (
        "autocast has ended with the forward: every block makes its own"
    )
    assert len(died) == len(born) and set(died["phase"]) <= {"forward", "backward", "recompute"}


def test_autocast_lists_are_those_of_torch():
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = re.sub(r"\\\n", "", header.read_text())
    known = {}
    for macro in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        body = re.search(rf"#define AT_FORALL_{macro}\(_\)([^#]*?)\n\n", text).group(1)
        known[macro] = {
            ".".join(part.strip() for part in entry.split(","))
            for entry in re.findall(r"_\(([^)]*)\)", body)
        }
    for macro, ours in (
        ("LOWER_PRECISION_FP", autocast.LOWER),
        ("FP32", autocast.WIDE),
        ("FP32_SET_OPT_DTYPE", autocast.WIDE_RESULT),
        ("PROMOTE", autocast.PROMOTED),
    ):
        assert set(ours) <= known[macro]


def test_types_under_autocast_are_those_of_the_cpu():
    def types(device):
        x, w = (
            torch.ones(2, 8, 16, device=device),
            torch.ones(16, 16, device=device, requires_grad=True),
        )
        with torch.autocast(device, torch.bfloat16):
            y = F.linear(x, w)
            heads = y.view(2, 8, 2, 8).transpose(1, 2)
            made = [
                y,
                y @ w,
                y + x,
                F.softmax(y, -1).float(),
                F.scaled_dot_product_attention(heads, heads, heads),
                F.silu(y),
            ]
        made[0].sum().backward()
        return [tensor.dtype for tensor in (*made, w.grad)]

    with virtual_gpu("vgpu"):
        assert types("vgpu") == types("cpu")


def test_offloaded_bytes_are_host_bytes():
    with virtual_gpu("vgpu") as gpu:
        full, _ = _run(REGIMES["full"], MIDDLE, gpu)
        offload, _ = _run(REGIMES["offload"], MIDDLE, gpu)
    saved = full.peak(1)["categories"]["activations"]
    assert (
        offload.host_peak_bytes > 0.9 * saved
        and offload.peak(1)["categories"]["activations"] < 0.01 * saved
    )
    assert "host" not in offload.peak(1)["categories"]


@pytest.mark.parametrize("mode", ["real", "cpu", "vgpu"])
def test_a_recomputed_block_is_recompute_to_its_last_sum(mode):
    with virtual_gpu(mode) if mode != "real" else pytest.MonkeyPatch.context() as gpu:
        meter, _ = _run(REGIMES["checkpoint"], MICRO, None if mode == "real" else gpu)
    again = meter.frame().query("event == 'alloc' and phase == 'recompute' and step == 1")
    forward = meter.frame().query("event == 'alloc' and phase == 'forward' and step == 1")
    sums = forward[
        (forward["op"] == "aten.add.Tensor") & forward["module"].str.fullmatch(r"model\.layers\.\d")
    ]
    assert len(sums) == 6, "two a block"
    # the block's last sum is saved by nobody, and so never formed again
    blocks = again[
        (again["op"] == "aten.add.Tensor") & again["module"].str.fullmatch(r"model\.layers\.\d")
    ]
    assert sorted(blocks["module"]) == [f"model.layers.{index}" for index in range(3)]
    assert not recomputing


def test_workspaces_are_a_category_of_their_own():
    with virtual_gpu("vgpu") as gpu:
        meter, _ = _run(REGIMES["full"], MIDDLE, gpu)
    frame = meter.frame().query("category == 'workspace'")
    kept = frame[
        (frame["event"] == "alloc")
        & ~frame["storage"].isin(frame[frame["event"] == "free"]["storage"])
    ]
    assert kept["bytes"].tolist() == [
        8_519_680,
        8_519_680,
    ], "one a thread's handle: forward's and backward's"
    assert len(frame[frame["op"].str.contains("attention_backward")]) == 2 * 2 * LAYERS


@pytest.mark.parametrize(
    ("dtype", "head_dim", "masked", "architecture", "kernel"),
    [
        (torch.bfloat16, 128, False, (8, 0), "flash"),
        (torch.bfloat16, 128, True, (8, 0), "efficient"),
        (torch.float32, 128, False, (8, 9), "efficient"),
        (torch.float32, 10, False, (8, 0), "math"),
        (torch.bfloat16, 10, False, (8, 0), "flash"),
        (torch.bfloat16, 10, True, (8, 0), "math"),
        (torch.bfloat16, 128, True, (9, 0), "cudnn"),
        (torch.float32, 128, True, (9, 0), "efficient"),
        (torch.bfloat16, 128, False, (7, 5), "math"),
        (torch.float16, 128, False, (7, 5), "efficient"),
    ],
)
def test_attention_is_chosen_as_on_cuda(dtype, head_dim, masked, architecture, kernel):
    assert attention_kernel(dtype, head_dim, masked, architecture) == kernel


def test_workspace_sizes():
    assert (matrix_workspace_bytes((8, 0)), matrix_workspace_bytes((9, 0))) == (
        8_519_680,
        33_554_432,
    )
    assert attention_scratch_bytes(torch.empty(2, 3, 100, 40, device="meta")) == 4 * 2 * 3 * (
        128 * 64 + 128
    )


def test_a_resized_storage_is_seen():
    meter = Meter()
    with meter:
        block = torch.ones(1000)
        block.untyped_storage().resize_(0)
        block.untyped_storage().resize_(8000)
    assert meter.frame()[["event", "bytes"]].values.tolist() == [
        ["alloc", 4000],
        ["free", 4000],
        ["alloc", 0],
        ["free", 0],
        ["alloc", 8000],
    ]


@pytest.mark.parametrize("mode", ["real", "cpu", "vgpu"])
@pytest.mark.parametrize(("expanded_first", "sums"), [(False, 0), (True, 1)])
def test_gradients_of_one_tensor_are_added_as_the_engine_does(mode, expanded_first, sums):
    """In place into the first, unless that is an expanded number: then once out of place, and in
    place from there on."""
    with virtual_gpu(mode) if mode != "real" else pytest.MonkeyPatch.context() as gpu:
        meter = gpu.meter() if mode != "real" else Meter()
        x = torch.arange(1000.0).to("cpu" if mode == "real" else gpu.device).requires_grad_()
        with meter:
            y = x * 1
            loss = (y * 2).sum() + (y * 3).sum()
            loss = loss + (
                y.sum() if expanded_first else (y * 4).sum()
            )  # the node made last runs first
            with meter.phase("backward"):
                loss.backward()
    frame = meter.frame().query(
        "event == 'alloc' and phase == 'backward' and op == 'aten.add.Tensor' and bytes == 4000"
    )
    assert len(frame) == sums
    if mode == "real":
        assert (x.grad == (6 if expanded_first else 9)).all()


def test_a_view_is_its_storage():
    with virtual_gpu("vgpu") as gpu, gpu.meter() as meter:
        block = torch.empty(10, 10, device=gpu.device)
        view = block[2:].t()
        del block
        assert len(meter.frame()) == 1
        del view
        assert meter.frame()["event"].tolist() == ["alloc", "free"]


def _patched():
    return (
        F.scaled_dot_product_attention,
        torch.nn.Module._apply,
        torch.clear_autocast_cache,
        torch.autocast_increment_nesting,
        torch.autocast_decrement_nesting,
        torch.UntypedStorage.resize_,
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("mode", ["vgpu", "cpu"])
def test_nothing_stays_patched_and_real_training_goes_on_as_before(mode):
    before, losses = _patched(), micro.train({"weights": "mixed", "acts": "checkpoint"}, steps=2)[0]
    with pytest.raises(KeyError), virtual_gpu(mode) as gpu:
        assert _patched() != before
        _run(REGIMES["mixed"], MICRO, gpu)
        raise KeyError("a run that fails")
    assert _patched() == before and "resize_" not in vars(torch.UntypedStorage)
    assert (
        torch._C._is_multithreading_enabled()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
    )
    assert not hasattr(torch, "vgpu") or not torch.vgpu.is_available()
    assert micro.train({"weights": "mixed", "acts": "checkpoint"}, steps=2)[0] == losses


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="auto, vgpu, cuda, cpu"), virtual_gpu("tpu"):
        pass
