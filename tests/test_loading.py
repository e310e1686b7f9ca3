"""A published checkpoint directory is read as it is, and what is wrong with one is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import micro
from vramlab.baichuan import BaichuanConfig, load_model
from vramlab.baichuan.loading import BadCheckpoint

IDS = torch.arange(3, 13)[None]


def _released(folder, model, shards=1, safe=False, dtype=torch.bfloat16, **config):
    """Write `model` the way the published repositories look: config.json, shards, index, a rotary buffer in the file."""
    folder.mkdir(exist_ok=True)
    content = {**model.config.to_dict(), "architectures": ["BaichuanForCausalLM"], "auto_map": {"AutoModel": "x.Y"},
               "gradient_checkpointing": [False], **config}
    (folder / "config.json").write_text(json.dumps(content))
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    write = save_file if safe else torch.save
    names = list(state)
    if shards == 1:
        write(state, folder / f"{stem}.{suffix}")
        return state
    files = {}
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name] for name in names[index::shards]}
        write(part, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return state


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("shards, safe", [(1, False), (3, False), (1, True), (3, True)])
def test_weights_and_their_type_are_kept(tmp_path, position, shards, safe):
    model = micro.model(position).eval()
    state = _released(tmp_path / "c", model, shards, safe)
    loaded = load_model(tmp_path / "c")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and not loaded.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    wide = load_model(tmp_path / "c", dtype=torch.float32)
    assert wide(IDS).logits.isfinite().all() and {p.dtype for p in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(wide(IDS).logits, model(IDS).logits, rtol=0.05, atol=0.05)


def test_checkpointing_stays_off_though_the_13b_file_holds_a_tuple(tmp_path):
    _released(tmp_path / "c", micro.model("alibi"))
    loaded = load_model(tmp_path / "c").train()
    assert not any(layer.gradient_checkpointing for layer in loaded.model.layers)


def test_a_missing_shard_is_named(tmp_path):
    _released(tmp_path / "c", micro.model(), shards=3)
    (tmp_path / "c" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(BadCheckpoint, match="missing: pytorch_model-00002-of-00003.bin"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("safe", [False, True])
def test_a_truncated_file_is_named(tmp_path, safe):
    _released(tmp_path / "c", micro.model(), safe=safe)
    file = tmp_path / "c" / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(BadCheckpoint, match=rf"{file.name}.*truncated"):
        load_model(tmp_path / "c")


def test_a_wrong_shape_is_named_with_both(tmp_path):
    _released(tmp_path / "c", micro.model(), intermediate_size=34)
    with pytest.raises(BadCheckpoint, match=r"gate_proj.weight is \(33, 20\), config.json says \(34, 20\)"):
        load_model(tmp_path / "c")


def test_a_missing_tensor_is_named(tmp_path):
    model = micro.model()
    _released(tmp_path / "c", model, num_hidden_layers=4)
    with pytest.raises(BadCheckpoint, match="tensors are missing, first model.layers.3"):
        load_model(tmp_path / "c")


def test_baichuan_1_is_refused(tmp_path):
    _released(tmp_path / "c", micro.model(), vocab_size=64000)
    with pytest.raises(BadCheckpoint, match="Baichuan-1"):
        load_model(tmp_path / "c")


def test_a_folder_without_weights_or_config_says_what_was_expected(tmp_path):
    with pytest.raises(BadCheckpoint, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(micro.model().config.to_dict()))
    with pytest.raises(BadCheckpoint, match="has no weights"):
        load_model(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    _released(tmp_path / "c", micro.model())

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
