"""A published Baichuan-2 directory, read as it is: .bin or safetensors, one file or shards, its own
type kept."""

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
    """The model in `path`, in the checkpoint's own type unless `dtype` is given; `config` sets
    fields of its config anew.

    Memory: one shard at a time besides the model. Raises: BadFile, of which BadCheckpoint is one.
    """
    folder = Path(path)
    model = _model_without_weights(folder, config or {})
    wanted = dict(model.state_dict())
    for file in _files(folder):
        for name, tensor in _tensors(file):
            _place(model, wanted, file, name, tensor, dtype, device)
    if wanted:
        raise BadCheckpoint(
            f"{folder.name}: {len(wanted)} of {len(model.state_dict())} tensors are missing, first "
            f"{next(iter(wanted))}: download the checkpoint again"
        )
    if model.model.rotary_emb is not None:  # in no checkpoint: form it where the model lives
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
        if content.get("model_type") != "baichuan" or content.get("vocab_size") == 64000:
            raise ValueError(
                f"model_type {content.get('model_type')!r} with vocab_size"
                f" {content.get('vocab_size')}: Baichuan-1 (64000) and other models have another"
                " head; use a Baichuan-2 checkpoint"
            )
        with torch.device("meta"):
            return BaichuanForCausalLM(config_of({**content, **changes}, "config"))
    except (
        Exception
    ) as error:  # ours, and whatever transformers and torch raise at a value of another type
        raise BadCheckpoint(f"{file}: {error}") from error


def _files(folder: Path) -> list[Path]:
    for name in INDEX:
        if isfile(folder / name):
            files = read_json(folder / name).get("weight_map")
            if not isinstance(files, dict) or any(
                Path(str(shard)).name != shard for shard in files.values()
            ):
                raise BadCheckpoint(
                    f"{folder / name} has no weight_map of tensors' names to names of files beside"
                    " it: download it again"
                )
            shards = sorted(set(files.values()))
            missing = [shard for shard in shards if not isfile(folder / shard)]
            if missing:
                raise BadCheckpoint(
                    f"{name} names {len(shards)} shards, missing: {', '.join(missing)}: download"
                    f" them into {folder.name}"
                )
            return [folder / shard for shard in shards]
    found = [folder / name for name in SINGLE if isfile(folder / name)]
    if not found:
        raise BadCheckpoint(
            f"{folder.name} has no weights: expected one of {', '.join((*SINGLE, *INDEX))}"
        )
    return found[:1]


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, not a dict
                    yield name, shard.get_tensor(name)
        else:
            with zipfile.ZipFile(file) as archive:
                if (
                    sum(
                        one.file_size for one in archive.infolist() if one.filename.endswith(".pkl")
                    )
                    > MOST_PICKLE_BYTES
                ):
                    raise ValueError(f"its pickle is larger than {MOST_PICKLE_BYTES} bytes")
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except Exception as error:  # whatever a library's reader raises at a broken file
        raise BadCheckpoint(
            f"{file.name} ({file.stat().st_size} bytes) cannot be read, it may be truncated, hold"
            " more than tensors or be a Git LFS pointer: download it again, or run `git lfs pull`"
            f" ({str(error)[:200].partition(chr(10))[0]})"
        ) from error


def _place(model, wanted: dict, file: Path, name: str, tensor: Tensor, dtype, device: str) -> None:
    if str(name).endswith("rotary_emb.inv_freq"):
        return
    if name not in wanted:
        raise BadCheckpoint(
            f"{file.name} holds {name}, which this model has not, or twice: is config.json of this"
            " checkpoint?"
        )
    shape = tuple(wanted.pop(name).shape)
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
    # cloned: a memory-mapped view would keep the whole shard's pages
    placed = torch.empty(shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor)
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(placed))
