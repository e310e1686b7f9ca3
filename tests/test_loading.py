"""A published checkpoint directory is read as it is, and what is wrong with one is said."""

from __future__ import annotations

import json

import pytest
import torch

import micro
import released
from vramlab.baichuan import BaichuanConfig, load_model
from vramlab.baichuan.loading import BadCheckpoint

IDS = torch.arange(3, 13)[None]


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("shards, safe", [(1, False), (3, False), (1, True), (3, True)])
def test_weights_and_their_type_are_kept(tmp_path, position, shards, safe):
    model = micro.model(position).eval()
    state = released.checkpoint(tmp_path / "c", model, shards, safe)
    loaded = load_model(tmp_path / "c")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and not loaded.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    wide = load_model(tmp_path / "c", dtype=torch.float32)
    assert wide(IDS).logits.isfinite().all() and {p.dtype for p in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(wide(IDS).logits, model(IDS).logits, rtol=0.05, atol=0.05)


def test_checkpointing_stays_off_though_the_13b_file_holds_a_tuple(tmp_path):
    released.checkpoint(tmp_path / "c", micro.model("alibi"))
    loaded = load_model(tmp_path / "c").train()
    assert not any(layer.gradient_checkpointing for layer in loaded.model.layers)


def test_a_missing_shard_is_named(tmp_path):
    released.checkpoint(tmp_path / "c", micro.model(), shards=3)
    (tmp_path / "c" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(BadCheckpoint, match="missing: pytorch_model-00002-of-00003.bin"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("safe", [False, True])
def test_a_truncated_file_is_named(tmp_path, safe):
    released.checkpoint(tmp_path / "c", micro.model(), safe=safe)
    file = tmp_path / "c" / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(BadCheckpoint, match=rf"{file.name}.*truncated"):
        load_model(tmp_path / "c")


def test_a_wrong_shape_is_named_with_both(tmp_path):
    released.checkpoint(tmp_path / "c", micro.model(), intermediate_size=34)
    with pytest.raises(BadCheckpoint, match=r"gate_proj.weight is \(33, 20\), config.json says \(34, 20\)"):
        load_model(tmp_path / "c")


def test_a_missing_tensor_is_named(tmp_path):
    model = micro.model()
    released.checkpoint(tmp_path / "c", model, num_hidden_layers=4)
    with pytest.raises(BadCheckpoint, match="tensors are missing, first model.layers.3"):
        load_model(tmp_path / "c")


def test_baichuan_1_is_refused(tmp_path):
    released.checkpoint(tmp_path / "c", micro.model(), vocab_size=64000)
    with pytest.raises(BadCheckpoint, match="Baichuan-1"):
        load_model(tmp_path / "c")


def test_a_folder_without_weights_or_config_says_what_was_expected(tmp_path):
    with pytest.raises(BadCheckpoint, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(micro.model().config.to_dict()))
    with pytest.raises(BadCheckpoint, match="has no weights"):
        load_model(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    released.checkpoint(tmp_path / "c", micro.model())

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model.norm.weight": Evil()}, tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="more than tensors"):
        load_model(tmp_path / "c")


def test_the_design_follows_from_the_published_shapes_and_else_must_be_said():
    assert BaichuanConfig(hidden_size=4096, num_hidden_layers=32).position == "rope"
    assert BaichuanConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40).position == "alibi"
    with pytest.raises(ValueError, match="position: rope"):
        BaichuanConfig(hidden_size=64, num_hidden_layers=2)
