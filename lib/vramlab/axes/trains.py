"""Axis `trains`: which of the weights move, and when.

Everything that trains is a list of parts, each a tuple of leaves, of which one is active at a time: all weights at
once is one part, block-wise methods are one part a block, ChunkFT one a chunk. A part at rest requires no gradient, so
autograd saves nothing for it and stops below the lowest active leaf.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from .acts import decoder
from .leaves import Leaf, divisible

Part = tuple[Leaf, ...]

ORDERS = ("ascending", "descending", "random")
FATES = ("reset", "host", "device")


def _whole(name: str, param: nn.Parameter) -> Leaf:
    return Leaf(name, 0, param.shape[0], param.shape[0])


@dataclass(frozen=True)
class All:
    """Every parameter, every step."""

    state = "device"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        return [tuple(_whole(name, param) for name, param in model.named_parameters())]

    def active(self, step: int, count: int) -> int:
        """Which of `count` parts is active at `step`."""
        return 0


@dataclass(frozen=True)
class Nothing(All):
    """No parameter: the model is only run."""

    def parts(self, model: nn.Module) -> list[Part]:
        return []


@dataclass(frozen=True)
class Lora(All):
    """W x + (alpha / rank) B A x with W frozen, A (rank, in) and B (out, rank) trained, B starting at 0, so that the
    first forward is the base model's. By peft. Hu 2021, arXiv:2106.09685."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), lora_dropout=0.0,
                            bias="none")
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers 5.24 for an attribute by its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            torch.manual_seed(seed)
            return get_peft_model(model, config)

    def parts(self, model: nn.Module) -> list[Part]:
        return [tuple(_whole(name, p) for name, p in model.named_parameters() if "lora_" in name)]


@dataclass(frozen=True)
class _Moving(All):
    """A schedule over parts: `interval` updates on each, then the next. `state` says what becomes of a part's
    optimizer state when its turn ends: `reset` drops it, `host` parks it in host memory, `device` leaves it there."""

    interval: int = 1
    order: str = "ascending"
    state: str = "reset"
    seed: int = 0

    def __post_init__(self):
        for name, value, known in (("order", self.order, ORDERS), ("state", self.state, FATES)):
            if value not in known:
                raise ValueError(f"trains.{name} is {value!r}: use one of {', '.join(known)}")
        if self.interval < 1:
            raise ValueError(f"trains.interval is {self.interval}: it counts updates, use 1 or more")

    def active(self, step: int, count: int) -> int:
        cycle, position = divmod(step // self.interval, count)
        if self.order == "random":  # reshuffled every cycle, a pure function of the step, so that a run can resume
            generator = torch.Generator().manual_seed(self.seed + cycle)
            return int(torch.randperm(count, generator=generator)[position])
        return position if self.order == "ascending" else count - 1 - position


@dataclass(frozen=True)
class Blocks(_Moving):
    """One group of transformer blocks at a time. BAdam, Luo 2024, arXiv:2404.02827: one block, order random, state
    reset, embeddings, final norm and head left out."""

    interval: int = 50
    order: str = "random"
    count: int = 0
    """Number of groups of equal length; 0 is one group a block."""
    ends: bool = False
    """Whether embeddings (with the first group) and final norm and head (with the last) train too."""

    def parts(self, model: nn.Module) -> list[Part]:
        names = {id(param): name for name, param in model.named_parameters()}
        stack = decoder(model).layers
        units = [[names[id(p)] for p in block.parameters()] for block in stack]
        if self.ends:
            inside = {name for unit in units for name in unit}
            first = min(i for i, name in enumerate(names.values()) if name in inside)
            outside = [(i < first, name) for i, name in enumerate(names.values()) if name not in inside]
            units[0] = [name for before, name in outside if before] + units[0]
            units[-1] = units[-1] + [name for before, name in outside if not before]
        params = dict(model.named_parameters())
        return [tuple(_whole(name, params[name]) for unit in units[a:b] for name in unit)
                for a, b in _cuts(len(units), self.count or len(units))]


def _cuts(total: int, count: int) -> list[tuple[int, int]]:
    if not 1 <= count <= total:
        raise ValueError(f"trains.blocks.count is {count}: the model has {total} blocks, use 1 to {total} (or 0)")
    edges = [total * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


@dataclass(frozen=True)
class Chunks(_Moving):
    """The network's bytes, in the order of its parameters, cut into `count` equal runs at row edges: a chunk is whole
    matrices and at most two cut ones. Embeddings and head included; each chunk has its own step count. ChunkFT (2026);
    there a Linear is cut along its input features, here along its rows, which are contiguous in memory."""

    interval: int = 1
    state: str = "host"
    count: int = field(default=8, kw_only=True)
    """K of the paper; 1 is plain training."""

    def __post_init__(self):
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"trains.chunks.count is {self.count}: use 1 or more")

    def parts(self, model: nn.Module) -> list[Part]:
        params = dict(model.named_parameters())
        total = sum(p.nbytes for p in params.values())
        cuttable = divisible(model)
        parts: list[list[Leaf]] = [[] for _ in range(self.count)]
        before = 0
        for name, param in params.items():
            grain = 1 if name in cuttable else param.shape[0]
            for chunk, start, stop in _rows_by_chunk(param, before, total, self.count, grain):
                parts[chunk].append(Leaf(name, start, stop, param.shape[0]))
            before += param.nbytes
        return [tuple(part) for part in parts if part]


def _rows_by_chunk(param: nn.Parameter, before: int, total: int, count: int, grain: int):
    """(chunk, start, stop) runs of a parameter whose first byte is number `before` of `total`; a row, or `grain` rows
    that must stay together, belongs to the chunk in which its middle byte lies."""
    rows, row_bytes = param.shape[0], param.nbytes // param.shape[0]
    start, current = 0, None
    for row in range(0, rows, grain):
        middle = before + row * row_bytes + grain * row_bytes // 2
        chunk = min(middle * count // total, count - 1)
        if chunk != current:
            if current is not None:
                yield current, start, row
            start, current = row, chunk
    yield current, start, rows
