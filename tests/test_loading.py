"""A published checkpoint directory is read as it is, and what is wrong with one is said."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict

import pytest
import torch

import micro
import released
from vramlab.baichuan import BaichuanConfig, load_model
from vramlab.baichuan.loading import BadCheckpoint
from vramlab.reading import BadFile

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
    assert wide(IDS).logits.isfinite().all() and {p.dtype for p in wide.parameters()} == {
        torch.float32
    }
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
    with pytest.raises(
        BadCheckpoint, match=r"gate_proj.weight is \(33, 20\), config.json says \(34, 20\)"
    ):
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


# every input ends in a model or in one error of our own, soon -------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ed5f8630\nsize 9934632960\n"
NORM = "model.norm.weight"
VALUES = (None, True, -1, 0, 1.5, 10**30, float("nan"), "20", [20], {"a": 1})
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "position",
    "model_max_length",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "z_loss_weight",
    "norm_head",
    "pad_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
    "model_type",
    "dtype",
    "architectures",
    "quantization_config",
    "head_dim",
    "id2label",
    "attn_implementation",
    "_name_or_path",
)
FILES = {
    "empty": b"",
    "LFS pointer": LFS,
    "html": b"<!doctype html>",
    "zeros": bytes(64),
    "not UTF-8": b"\xff\xfe\xfd{",
    "zip": b"PK\3\4",
    "pickle": pickle.dumps({NORM: [1.0]}),
    "a list": b"[]",
    "a number": b"7",
    "a string": b'"a"',
    "deep": b"[" * 100_000,
    "cut": b'{"model_type": "baichuan", "vocab',
    "null": b"null",
    "huge": b'{"a": ' + b"9" * 5000 + b"}",
}
COLLIDING = {k * (2**61 - 1): 0 for k in range(1, 2_000)}


TENSORS = {
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t[:, None].to_sparse_csr(),
    "bool": lambda t: t > 0,
    "int8": lambda t: t.to(torch.int8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "None": lambda t: None,
    "complex": lambda t: t.to(torch.complex64),
    "a list": lambda t: t.tolist(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8),
    "a dict": lambda t: {"weight": t},
    "one number, expanded": lambda t: torch.ones(1).expand(20),
    "wrong shape": lambda t: t[:-1],
    "a number": lambda t: t[0],
    "no rows": lambda t: t[:0],
}


def _ends(folder, cpu_s=10.0) -> str:
    """ok, or the message of the one error that is allowed, which names the folder or a file of
    it."""
    start = time.process_time()
    try:
        load_model(folder)
        message = "ok"
    except BadFile as error:
        message = str(error)
        assert any(
            name in message
            for name in (folder.name, "config.json", "pytorch_model", "model.safetensors")
        ), message
    assert time.process_time() - start < cpu_s
    return message


@pytest.fixture
def checkpoint(tmp_path):
    model = micro.model(num_hidden_layers=1)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    released.checkpoint(tmp_path / "c", model, dtype=torch.float32)
    return tmp_path / "c", state


def test_every_config_field_of_any_type_ends_in_a_model_or_our_error(checkpoint):
    folder, _ = checkpoint
    content = json.loads((folder / "config.json").read_text())
    loaded = 0
    for field in FIELDS:
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps({**content, field: value}))
            loaded += _ends(folder) == "ok"
    assert (
        20 < loaded < len(FIELDS) * len(VALUES) - 100
    )  # some change nothing, most cannot be meant


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json",
    ],
)
def test_every_file_of_any_content_ends_in_a_model_or_our_error(checkpoint, name):
    folder, _ = checkpoint
    if name == "model.safetensors":
        (folder / "pytorch_model.bin").unlink()
    for kind, content in FILES.items():
        (folder / name).write_bytes(content)
        assert _ends(folder) != "ok", kind
    (folder / name).unlink()
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink(path, path),
        lambda path: os.symlink("/nowhere", path),
    ):
        make(folder / name)
        _ends(folder)
        (folder / name).rmdir() if os.path.isdir(folder / name) else (folder / name).unlink()


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # torch's, of its own sparse and quantized tensors
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_any_kind_ends_in_a_model_or_our_error_which_names_it(checkpoint, kind):
    folder, state = checkpoint
    torch.save({**state, NORM: TENSORS[kind](state[NORM])}, folder / "pytorch_model.bin")
    message = _ends(folder)
    assert f"{NORM} is " in message or "cannot be read" in message and "tensor" in message.lower()


@pytest.mark.parametrize(
    "content",
    [
        [],
        7,
        "a",
        None,
        {7: torch.ones(2)},
        {("a",): torch.ones(2)},
        OrderedDict(),
        {"x": {}},
        COLLIDING,
        torch.ones(3),
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_bin_that_holds_something_else_ends_in_our_error(checkpoint, content):
    folder, _ = checkpoint
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in _ends(folder) or not content


@pytest.mark.parametrize(
    "files",
    [
        None,
        [],
        "a",
        {"a": 7},
        {"a": None},
        {"a": ["b"]},
        {"a": "../c/pytorch_model.bin"},
        {},
        {"a": "/etc/hosts"},
        {"a": ""},
        {"a": "."},
        {"a": "config.json"},
        {"a": "none.bin"},
    ],
    ids=repr,
)
def test_an_index_of_any_content_ends_in_our_error_and_opens_no_file_outside(checkpoint, files):
    folder, _ = checkpoint
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert _ends(folder) != "ok"


def test_a_pickle_too_large_for_names_and_shapes_is_not_read(checkpoint, monkeypatch):
    folder, _ = checkpoint
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(300_000))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    assert "larger than" in _ends(folder)


@pytest.mark.parametrize("safe", [False, True])
def test_bytes_changed_or_cut_anywhere_end_in_a_model_or_our_error(tmp_path, safe):
    model = micro.model(num_hidden_layers=1, vocab_size=5)
    released.checkpoint(tmp_path / "c", model, safe=safe)
    file = tmp_path / "c" / ("model.safetensors" if safe else "pytorch_model.bin")
    whole, chance = file.read_bytes(), random.Random(0)
    for _ in range(60):
        content = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(4) if content else 0):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(content)
        _ends(tmp_path / "c")


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(LFS)
    os.mkfifo(tmp_path / "fifo")
    for path in (
        tmp_path / "file",
        tmp_path / "fifo",
        tmp_path / "none",
        tmp_path / "a\0b",
        tmp_path / ("x" * 400),
    ):
        with pytest.raises(BadCheckpoint, match="no config.json"):
            load_model(path)


def test_a_git_lfs_pointer_in_place_of_weights_is_named(checkpoint):
    folder, _ = checkpoint
    (folder / "pytorch_model.bin").write_bytes(LFS)
    assert "git lfs pull" in _ends(folder)


def test_the_design_follows_from_the_published_shapes_and_else_must_be_said():
    assert BaichuanConfig(hidden_size=4096, num_hidden_layers=32).position == "rope"
    assert (
        BaichuanConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40).position
        == "alibi"
    )
    with pytest.raises(ValueError, match="position: rope"):
        BaichuanConfig(hidden_size=64, num_hidden_layers=2)
