"""A published Baichuan-2 directory, read as it is: .bin or safetensors, one file or shards, its own type kept."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..reading import read_json
from .config import BaichuanConfig, config_of
from .model import BaichuanForCausalLM

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class BadCheckpoint(ValueError):
    """The directory does not hold a whole Baichuan-2; the message names the file, the cause and the way out."""


def load_model(path: Path | str, dtype: torch.dtype | None = None, device: str = "cpu",
               config: Mapping | None = None) -> BaichuanForCausalLM:
    """The model in `path`, in the checkpoint's own type unless `dtype` is given; `config` sets fields of its config anew.

    Memory: one shard at a time besides the model. Raises: BadCheckpoint.
    """
    folder = Path(path)
    shape = _config(folder, config or {})
    with torch.device("meta"):
        model = BaichuanForCausalLM(shape)
    wanted = dict(model.state_dict())
    for file in _files(folder):
        for name, tensor in _tensors(file):
            _place(model, wanted, file, name, tensor, dtype, device)
    if wanted:
        raise BadCheckpoint(f"{folder.name}: {len(wanted)} of {len(model.state_dict())} tensors are missing, first "
                            f"{next(iter(wanted))}: download the checkpoint again")
    if model.model.rotary_emb is not None:  # in no checkpoint: form it where the model lives
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.frequencies().to(device)
    return model.eval()


def _config(folder: Path, changes: Mapping) -> BaichuanConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise BadCheckpoint(f"{folder} has no config.json: give the folder of a downloaded Baichuan-2 checkpoint")
    try:
        content = read_json(file)
        if content.get("model_type") != "baichuan" or content.get("vocab_size") == 64000:
            raise ValueError(f"model_type {content.get('model_type')!r} with vocab_size {content.get('vocab_size')}: "
                             "Baichuan-1 (64000) and other models have another head; use a Baichuan-2 checkpoint")
        return config_of({**content, **changes}, "config")
    except ValueError as error:
        raise BadCheckpoint(f"{file}: {error}") from None


def _files(folder: Path) -> list[Path]:
    for name in INDEX:
        if (folder / name).is_file():
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise BadCheckpoint(f"{name} names {len(shards)} shards, missing: {', '.join(missing)}: download them into "
                                    f"{folder.name}")
            return [folder / shard for shard in shards]
    found = [folder / name for name in SINGLE if (folder / name).is_file()]
    if not found:
        raise BadCheckpoint(f"{folder.name} has no weights: expected one of {', '.join((*SINGLE, *INDEX))}")
    return found[:1]


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, not a dict
                    yield name, shard.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except (RuntimeError, EOFError, OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise BadCheckpoint(f"{file.name} ({file.stat().st_size} bytes) cannot be read, it may be truncated or hold more than "
                            f"tensors: download it again ({str(error).splitlines()[0]})") from error


def _place(model, wanted: dict, file: Path, name: str, tensor: Tensor, dtype, device: str) -> None:
    if name.endswith("rotary_emb.inv_freq"):
        return
    if name not in wanted:
        raise BadCheckpoint(f"{file.name} holds {name}, which this model has not, or twice: is config.json of this checkpoint?")
    shape = tuple(wanted.pop(name).shape)
    if tuple(tensor.shape) != shape:
        raise BadCheckpoint(f"{file.name}: {name} is {tuple(tensor.shape)}, config.json says {shape}")
    owner, _, attribute = name.rpartition(".")
    # cloned: a memory-mapped view would keep the whole shard's pages
    placed = torch.empty(shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor)
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(placed))
