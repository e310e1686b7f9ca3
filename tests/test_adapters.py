"""Adapters leave the base alone, begin as the base, and train as the library they come from does;
packed bases are exact."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from micro import batch, model, train
from test_laws import _saved_bytes
from vramlab.capture.meter import Meter
from vramlab.regimes.regime import IllegalRegime, read_row
from vramlab.regimes.trains.adapters import _seeded_peft, link
from vramlab.regimes.weights.quantized_linear import Int8Linear, Nf4Linear, Product, dynamic_codes
from vramlab.timeline.sides import side, sides
from vramlab.training.trainer import Schedule, Trainer

ONE_STEP = 3 * 11 * 20 * 4  # rows, tokens, width, fp32


def _trainer(row: dict) -> Trainer:
    return Trainer(model(), read_row("row", row), Schedule(1e-2, 4))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize(
    "fields", [{}, {"dora": True}, {"frozen_a": True}, {"adapters": "bf16"}], ids=str
)
def test_lora_starts_as_the_identity(weights, fields):
    if weights in ("nf4", "int8") and "dora" in fields:
        pytest.skip("refused")
    adapted = _trainer({"weights": weights, "trains": {"lora": fields}})
    base = _trainer({"weights": weights, "trains": "none", "rule": "none"})
    with torch.no_grad(), adapted.regime.weights.compute("cpu"):
        assert torch.equal(
            adapted.model.eval()(**batch(3)).logits, base.model.eval()(**batch(3)).logits
        )


@pytest.mark.parametrize("fields", [{}, {"dora": True}], ids=str)
def test_lora_is_pefts(fields):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        use_dora=fields.get("dora", False),
        target_modules=["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    base = model()
    with _seeded_peft(seed=0):  # the trainer's, so that A is drawn alike
        reference = get_peft_model(base, config)
    leaves = [p for p in reference.parameters() if p.requires_grad]
    optimizer, schedule = torch.optim.AdamW(leaves, weight_decay=0.0), Schedule(1e-2, 4)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        reference(**batch(100 * step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _, weights, _ = train({"trains": {"lora": fields}})
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_lora_fa_keeps_rank_numbers_a_token_in_place_of_the_input():
    lora, frozen = (
        {"trains": {"lora": {"rank": 2, "targets": ["down_proj"], "frozen_a": on}}}
        for on in (False, True)
    )
    # three blocks, 33 tokens, 33 numbers that nothing else in the block keeps; both keep A x
    assert _saved_bytes(lora) - _saved_bytes(frozen) == 3 * 33 * 33 * 4
    _, after, trainer = train(frozen)
    assert all(".lora_B." in name for name in trainer.active) or not trainer.active
    before = _trainer(frozen).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_B" in name for name in moved)


@pytest.mark.parametrize("trains", ["prompt", "prefix"])
def test_a_prompt_is_all_that_moves_and_a_mask_of_ones_changes_nothing(trains):
    trainer = _trainer({"trains": {trains: {"tokens": 5}}})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    masked = float(trainer.model(**batch(2)).loss.detach())
    whole = {name: tensor for name, tensor in batch(2).items() if name != "attention_mask"}
    assert float(trainer.model(**whole).loss.detach()) == pytest.approx(masked, rel=1e-6)
    trainer.step([batch(2)])
    moved = [
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    ]
    assert moved == ["prompt_encoder.default.embedding.weight"]
    assert trainer.trainable_parameters() == 5 * 20 * (1 if trains == "prompt" else 2 * 3)


def test_a_prompt_starts_as_words():
    trainer = _trainer({"trains": "prompt"})
    prompt = trainer.model.prompt_encoder["default"].embedding.weight
    words = trainer.model.get_input_embeddings().weight
    assert all((words == row).all(1).any() for row in prompt)


def test_norms_and_top_blocks_are_what_is_said():
    *_, trainer = train({"trains": "norms"})
    assert trainer.trainable_parameters() == (2 * 3 + 1) * 20
    top = read_row("row", {"trains": {"top": {"share": 0.34}}}).trains.parts(model())
    assert {leaf.name.split(".")[2] for leaf in top[0]} == {"2"}
    row = {"trains": {"top": {"share": 0.01}}}
    assert _saved_bytes(row, num_hidden_layers=2) == _saved_bytes(row, num_hidden_layers=6)


# packed bases -------------------------------------------------------------------------------------


def dequantized(linear, dtype):
    """The matrix that products are formed with, (O, I)."""
    return linear.unpack(dtype, *(getattr(linear, name) for name in linear.names))


@pytest.mark.parametrize("shape", [(33, 20), (128, 64), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nf4_is_bitsandbytes(shape, dtype):
    from bitsandbytes import functional

    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    packed, state = functional.quantize_4bit(
        linear.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = Nf4Linear(linear)
    assert torch.equal(ours.weight, packed)
    torch.testing.assert_close(dequantized(ours, dtype), functional.dequantize_4bit(packed, state))
    torch.testing.assert_close(
        torch.tensor(dynamic_codes()), functional.create_dynamic_map(), atol=1e-7, rtol=0
    )


def test_packed_bytes_are_exact():
    linear = nn.Linear(512, 384, bias=False).bfloat16()
    count = 512 * 384
    assert (
        sum(p.nbytes for p in Nf4Linear(linear).parameters())
        == count // 2 + count // 64 + 4 * count // 64 // 256 + 1024 + 4
    )
    assert sum(p.nbytes for p in Int8Linear(linear).parameters()) == count + 2 * 384


def test_int8_errs_by_half_a_step_of_its_row():
    torch.manual_seed(0)
    linear = nn.Linear(50, 30, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    quantized = Int8Linear(linear)
    error = (dequantized(quantized, torch.float32) - linear.weight).abs()
    assert (error <= 0.5001 * quantized.scale).all() and error[3].max() == 0


@pytest.mark.parametrize("kind", [Nf4Linear, Int8Linear])
def test_packed_products_pass_gradcheck(kind):
    torch.manual_seed(0)
    quantized = kind(nn.Linear(5, 7, bias=False))
    stored = [getattr(quantized, name) for name in quantized.names]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Product.apply(x, quantized.unpack, *stored), (x,))


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_a_packed_base_stands_still_and_keeps_no_input(weights):
    row = {"weights": weights, "trains": {"lora": {"frozen_a": True, "rank": 1}}}
    _, after, trainer = train(row)
    base = {
        name: tensor
        for name, tensor in _trainer(row).model.state_dict().items()
        if "lora_" not in name
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    assert (
        sum(
            "base_layer" in name and tensor.dtype in (torch.uint8, torch.int8)
            for name, tensor in base.items()
        )
        >= 15
    )
    assert _saved_bytes(row) <= _saved_bytes({**row, "weights": "bf16"})


# a model cut in two -------------------------------------------------------------------------------


def test_a_cut_model_trains_as_lora_and_sends_what_its_shape_says():
    for acts in ("keep", "checkpoint"):
        row = {"acts": acts, "trains": {"split_lora": {"cut": 2}}}
        _, cut, trainer = train(row)
        _, uncut, _ = train({**row, "trains": "lora"})
        assert all(torch.equal(cut[name], uncut[name]) for name in uncut)
        assert link(trainer.model).read() == {
            "up_bytes": 4 * ONE_STEP,
            "down_bytes": 4 * ONE_STEP,
        }, acts


def test_client_and_server_hold_the_model_between_them():
    meter = Meter()
    trainer = Trainer(
        model(),
        read_row("row", {"trains": {"split_lora": {"cut": 1}}}),
        Schedule(1e-2, 4),
        observer=meter,
    )
    with meter:
        for step in range(2):
            trainer.step([batch(step)])
    crossed = {"up_bytes": ONE_STEP, "down_bytes": ONE_STEP}
    held = sides(meter.frame(), 1, 1, crossed)
    weights = {name: p.nbytes for name, p in trainer.model.named_parameters()}
    client = sum(
        size for name, size in weights.items() if "embed_tokens" in name or ".layers.0." in name
    )
    assert held["client"]["weights_bytes"] == client
    assert held["server"]["weights_bytes"] == sum(weights.values()) - client
    whole = meter.peak(1)["peak_bytes"]
    assert max(one["peak_bytes"] for one in held.values()) < whole + ONE_STEP
    assert whole <= sum(one["peak_bytes"] for one in held.values())


def test_the_bytes_of_each_side_by_hand():
    """Cut at 1. Each side's peak is of the step alone, and what it receives is added; host,
    workspaces and later steps are not."""
    rows = [
        (0, "alloc", 900, "temporaries", "layers.0"),
        (0, "free", 900, "temporaries", "layers.0"),
        (0, "alloc", 100, "weights", "layers.0.mlp"),
        (0, "alloc", 200, "weights", "layers.1.mlp"),
        (1, "alloc", 7000, "workspace", "layers.0"),
        (1, "alloc", 8000, "host", "layers.1"),
        (1, "alloc", 30, "activations", "layers.0"),
        (1, "alloc", 40, "activations", ""),
        (1, "free", 30, "activations", "layers.0"),
        (1, "alloc", 5, "weights", "embed_tokens"),
        (2, "alloc", 6000, "activations", "layers.0"),
        (2, "alloc", 6000, "weights", "layers.0"),
    ]
    frame = pd.DataFrame(rows, columns=["step", "event", "bytes", "category", "module"])
    assert sides(frame, 1, 1, {"up_bytes": 3, "down_bytes": 2}) == {
        "client": {"peak_bytes": 130 + 2, "weights_bytes": 105, "sends_bytes": 3},
        "server": {"peak_bytes": 240 + 3, "weights_bytes": 200, "sends_bytes": 2},
    }


def test_a_side_is_known_by_the_name():
    names = [
        "base_model.model.model.layers.1.mlp",
        "base_model.model.model.layers.11.mlp",
        "model.embed_tokens",
        "lm_head",
        "",
    ]
    assert [side(name, 2) for name in names] == ["client", "server", "client", "server", "server"]
    assert [side(f"layers.{block}", 2) for block in (0, 1, 2, 3)] == [
        "client",
        "client",
        "server",
        "server",
    ]
    assert [
        side(name, 1)
        for name in ("input_ids", "attention_mask", "labels", "my_embed_tokens", "rotary_emb")
    ] == ["client", "client", "server", "server", "server"]


def test_a_cut_leaves_the_server_a_block():
    with pytest.raises(ValueError, match="1 to 2"):
        _trainer({"trains": {"split_lora": {"cut": 3}}})


def test_a_packed_base_trains_adapters_only():
    with pytest.raises(IllegalRegime, match="use trains: lora"):
        read_row("row", {"weights": "nf4", "trains": "blocks"})
