"""A published Baichuan-2 directory, read unchanged: .bin or safetensors, one file or shards, in its
own storage type."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from os.path import isfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..reading import BadFile, read_json
from .config import config_of
from .model import BaichuanForCausalLM

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_PICKLE_BYTES = 256 << 10
"""Of the names and shapes in a .bin: the published ones have 50 KB, and a pickle can be written to
take quadratic time."""


class BadCheckpoint(BadFile):
    """The directory does not hold a whole Baichuan-2; the message names the file, the cause and the
    way out."""


def load_model(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    config: Mapping | None = None,
) -> BaichuanForCausalLM:
    """The model in `path`, in the checkpoint's own type unless `dtype` is given; `config` replaces
    fields of its config.

    Memory: one shard at a time besides the model. Raises: BadFile, of which BadCheckpoint is one.
    """
    folder = Path(path)
    model = _model_without_weights(folder, config or {})
    missing = dict(model.state_dict())
    for file in _files(folder):
        for name, tensor in _tensors(file):
            _place(model, missing, file, name, tensor, dtype, device)
    if missing:
        raise BadCheckpoint(
            f"{folder.name}: {len(missing)} of {len(model.state_dict())} tensors are missing, first"
            f" {next(iter(missing))}: download the checkpoint again"
        )
    if model.model.rotary_emb is not None:  # in no checkpoint, and still on `meta`
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.frequencies().to(device)
    return model.eval()


def _model_without_weights(folder: Path, changes: Mapping) -> BaichuanForCausalLM:
    file = folder / "config.json"
    if not isfile(file):
        raise BadCheckpoint(
            f"{folder} has no config.json: give the folder of a downloaded Baichuan-2 checkpoint"
        )
    try:
        content = read_json(file)
        model_type, vocab_size = content.get("model_type"), content.get("vocab_size")
        if model_type != "baichuan" or vocab_size == 64000:
            raise ValueError(
                f"model_type {model_type!r} with vocab_size {vocab_size}: Baichuan-1 (64000) and"
                " other models have another head; use a Baichuan-2 checkpoint"
            )
        with torch.device("meta"):
            return BaichuanForCausalLM(config_of({**content, **changes}))
    except Exception as error:  # transformers and torch raise any kind at a value of a wrong type
        raise BadCheckpoint(f"{file}: {error}") from error


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights: the shards of an index, or a single file."""
    for index in [folder / name for name in INDEX if isfile(folder / name)]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(f)).name != f for f in files.values()):
            raise BadCheckpoint(
                f"{index} has no weight_map of tensors' names to names of files beside it: download"
                " it again"
            )
        shards = sorted(set(files.values()))
        if missing := [shard for shard in shards if not isfile(folder / shard)]:
            raise BadCheckpoint(
                f"{index.name} names {len(shards)} shards, missing: {', '.join(missing)}: download"
                f" them into {folder.name}"
            )
        return [folder / shard for shard in shards]
    for file in [folder / name for name in SINGLE if isfile(folder / name)]:
        return [file]
    raise BadCheckpoint(
        f"{folder.name} has no weights: expected one of {', '.join((*SINGLE, *INDEX))}"
    )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, not a dict
                    yield name, shard.get_tensor(name)
        else:
            with zipfile.ZipFile(file) as archive:
                pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if sum(info.file_size for info in pickles) > MOST_PICKLE_BYTES:
                raise ValueError(f"its pickle is larger than {MOST_PICKLE_BYTES} bytes")
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except Exception as error:  # a library's reader raises any kind at a broken file
        raise BadCheckpoint(
            f"{file.name} ({file.stat().st_size} bytes) cannot be read, it may be truncated, hold"
            " more than tensors or be a Git LFS pointer: download it again, or run `git lfs pull`"
            f" ({str(error)[:200].partition(chr(10))[0]})"
        ) from error


def _place(model, missing: dict, file: Path, name: str, tensor: Tensor, dtype, device: str) -> None:
    """Copy a tensor of the checkpoint into the model, and take it from the missing ones."""
    if str(name).endswith("rotary_emb.inv_freq"):
        return
    if name not in missing:
        raise BadCheckpoint(
            f"{file.name} holds {name}, which this model does not have, or holds it twice: is"
            " config.json of this checkpoint?"
        )
    shape = tuple(missing.pop(name).shape)
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.dtype not in TYPES
        or tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize
    ):
        raise BadCheckpoint(
            f"{file.name}: {name} is a {type(tensor).__name__} of"
            f" {getattr(tensor, 'dtype', 'no type')}, {getattr(tensor, 'layout', 'no layout')}: use"
            " a checkpoint of dense tensors in bfloat16, float16 or float32, neither quantized nor"
            " sparse"
        )
    if tuple(tensor.shape) != shape:
        raise BadCheckpoint(
            f"{file.name}: {name} is {tuple(tensor.shape)}, config.json says {shape}"
        )
    owner, _, attribute = name.rpartition(".")
    # a copy: a memory-mapped view would keep the whole shard's pages
    placed = torch.empty(shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor)
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(placed))
