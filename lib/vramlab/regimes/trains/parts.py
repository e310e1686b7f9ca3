"""Axis `trains`: which weights train, and when.

The weights that train are a list of parts. A part is a tuple of leaves, and no leaf is in two
parts. At each step some parts are active. If all weights train together, they are one part.
Block-wise methods have one part for each block and ChunkFT has one for each chunk, and the parts
take turns. LISA draws some blocks, and one more part, of everything outside the blocks, is always
active. A part at rest requires no gradient, so autograd saves nothing for its weights and stops
below the lowest active leaf.

When a part goes to rest, its optimizer state is dropped, moved to the host or kept (`state`). A
part that stays active keeps its state. Adapters, which add weights, are in `adapters`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...baichuan.head import next_labels
from ...baichuan.model import BaichuanRMSNorm, decoder
from ..fields import Count, CountOrNone, IllegalRegime, Range, Seed
from .leaves import Leaf, divisible

Part = tuple[Leaf, ...]


def whole(name: str, param: nn.Parameter) -> Leaf:
    """The leaf that is a whole parameter."""
    return Leaf(name, 0, param.shape[0], param.shape[0])


@dataclass(frozen=True)
class All:
    """Every parameter trains in every step."""

    state = "device"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        return [tuple(whole(name, param) for name, param in model.named_parameters())]

    def active(self, step: int, count: int) -> tuple[int, ...]:
        """Which of `count` parts are active at `step`, ascending."""
        return tuple(range(count))

    def sets(self, count: int) -> list[tuple[int, ...]]:
        """The sets of parts that are active together at some step. If parts are drawn, only some of
        the sets, but of every size."""
        return [tuple(range(count))]

    def lr_step(self, step: int, count: int) -> int:
        """The step whose learning rate is used at `step`."""
        return step

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labels of a batch that the loss counts, each at the position that predicts it; -100
        everywhere else."""
        return next_labels(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))


@dataclass(frozen=True)
class Nothing(All):
    """No parameter trains: the model is only run."""

    def parts(self, model: nn.Module) -> list[Part]:
        return []


@dataclass(frozen=True)
class Norms(All):
    """Only the weights of the norms train, which is BitFit on a model without biases. Zaken 2022,
    arXiv:2106.10199."""

    def parts(self, model: nn.Module) -> list[Part]:
        norms = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, BaichuanRMSNorm)
        }
        return [
            tuple(whole(name, param) for name, param in model.named_parameters() if name in norms)
        ]


@dataclass(frozen=True)
class Top(All):
    """The top `share` of the blocks trains, at least one block. The blocks below, embeddings and
    head are frozen. Backward stops there, so lower blocks keep no activations. Howard 2018,
    arXiv:1801.06146, without the gradual unfreezing."""

    share: Annotated[float, Range(0.001, 1)] = 0.25

    def parts(self, model: nn.Module) -> list[Part]:
        blocks = decoder(model).layers
        count = max(1, round(self.share * len(blocks)))
        chosen = {id(param) for param in blocks[len(blocks) - count :].parameters()}
        return [
            tuple(
                whole(name, param)
                for name, param in model.named_parameters()
                if id(param) in chosen
            )
        ]


@dataclass(frozen=True)
class _Moving(All):
    """Parts take turns of `interval` updates each. When a turn ends, `state: reset` drops the
    part's optimizer state, `host` moves it to host memory, and `device` leaves it on the device.

    `order: ascending` begins with the embeddings. `random` is drawn anew in every cycle, `shuffled`
    once.
    """

    interval: Count = 1
    order: Literal["ascending", "descending", "random", "shuffled"] = "ascending"
    state: Literal["reset", "host", "device"] = "reset"
    seed: Seed = 0
    delayed_lr: bool = False
    """Whether the learning rate changes only when every part has had its turn (HiFT), so that all
    parts of a cycle train at the same rate."""

    def active(self, step: int, count: int) -> tuple[int, ...]:
        cycle, position = divmod(step // self.interval, count)
        if self.order == "ascending":
            return (position,)
        if self.order == "descending":
            return (count - 1 - position,)
        return (self._drawn(cycle if self.order == "random" else 0, count)[position],)

    def _drawn(self, number: int, count: int) -> list[int]:
        """`count` parts in the order of draw `number`, which depends on nothing else, so that a run
        can resume."""
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randperm(count, generator=generator).tolist()

    def sets(self, count: int) -> list[tuple[int, ...]]:
        return [(part,) for part in range(count)]

    def lr_step(self, step: int, count: int) -> int:
        cycle = self.interval * count
        return step // cycle * cycle if self.delayed_lr else step


@dataclass(frozen=True)
class Blocks(_Moving):
    """Groups of transformer blocks take turns, or some of them are drawn for each turn.

    BAdam, Luo 2024, arXiv:2404.02827: one block at a time, order random, state reset, ends at rest.
    Not exact: a block that is last in one cycle and first in the next keeps its state, and BAdam
    resets it. badam 1.4 also leaves out the last step of the first block.

    HiFT, Liu 2024, arXiv:2401.15207: interval 1, state host, ends as units, delayed_lr; its random
    order is `shuffled`. The published code trains the final norm as a unit between the last block
    and the head: `norm: own`.

    LISA, Pan 2024, arXiv:2403.17919: `sample` blocks drawn for each turn, state reset, ends always.
    Backward then runs down to the embeddings in every step: blocks at rest save nothing for their
    own weights, but gradients pass through them. A block that is drawn twice in a row keeps its
    state. The published code (LMFlow) has one optimizer that never drops state: `state: device`,
    whose bytes grow to those of full AdamW as blocks are drawn.
    """

    interval: Count = 50
    order: Literal["ascending", "descending", "random", "shuffled"] = "random"
    count: CountOrNone = 0
    """Number of groups of equal length; 0: one group for each block."""
    ends: Literal["rest", "units", "always"] = "rest"
    """Whether embeddings, and final norm and head, are at `rest`, take turns as the first and the
    last of the `units`, or train in every step, with state that lasts (`always`)."""
    norm: Literal["head", "own"] = "head"
    """With ends: units, whether the final norm trains with the `head` or is a unit of its `own`."""
    sample: CountOrNone = 0
    """How many groups are drawn for each turn, uniformly and without replacement; 0: groups take
    turns in `order`."""

    def parts(self, model: nn.Module) -> list[Part]:
        params, stack = dict(model.named_parameters()), decoder(model)
        names = {id(param): name for name, param in params.items()}
        units = [[names.pop(id(param)) for param in block.parameters()] for block in stack.layers]
        outside = list(names.values())
        norm = outside.index(names[id(stack.norm.weight)])
        below, above = outside[:norm], outside[norm:]
        if self.ends == "units":
            units = [
                below,
                *units,
                *([[name] for name in above] if self.norm == "own" else [above]),
            ]
        groups = [
            [name for unit in units[first:last] for name in unit]
            for first, last in _cuts(len(units), self.count or len(units))
        ]
        if self.sample > len(groups):
            raise IllegalRegime(
                f"trains.blocks.sample is {self.sample}: there are {len(groups)} groups, use 1 to"
                f" {len(groups)}"
            )
        if self.ends == "always":
            groups.append(outside)
        return [tuple(whole(name, params[name]) for name in group) for group in groups]

    def active(self, step: int, count: int) -> tuple[int, ...]:
        groups = count - (self.ends == "always")
        always = range(groups, count)
        if not self.sample:
            return (*super().active(step, groups), *always)
        drawn = self._drawn(step // self.interval, groups)[: self.sample]
        return (*sorted(drawn), *always)

    def sets(self, count: int) -> list[tuple[int, ...]]:
        groups, size = count - (self.ends == "always"), self.sample or 1
        # neighbours only: any other groups are as large
        return [
            (*range(first, first + size), *range(groups, count))
            for first in range(groups - size + 1)
        ]

    def lr_step(self, step: int, count: int) -> int:
        return super().lr_step(step, count - (self.ends == "always"))


def _cuts(total: int, count: int) -> list[tuple[int, int]]:
    if not 1 <= count <= total:
        raise IllegalRegime(
            f"trains.blocks.count is {count}: there are {total} units, use 1 to {total} (or 0)"
        )
    return list(itertools.pairwise(total * i // count for i in range(count + 1)))


@dataclass(frozen=True)
class Chunks(_Moving):
    """The network's bytes, in the order of its parameters, are cut between rows into `count` equal
    chunks, which take turns: whole matrices and at most two cut ones each. Embeddings and head are
    included, and each chunk counts its own steps. ChunkFT (2026), which cuts a Linear along its
    input features; here it is cut along its rows, which are contiguous in memory.
    """

    interval: Count = 1
    state: Literal["reset", "host", "device"] = "host"
    count: Annotated[int, Range(1, 1_000_000)] = field(default=8, kw_only=True)
    """K in the paper; 1 is plain training."""

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


def _rows_by_chunk(
    param: nn.Parameter, before: int, total: int, count: int, grain: int
) -> list[tuple[int, int, int]]:
    """The runs (chunk, start, stop) of a parameter whose first byte is number `before` of `total`.
    A row, or `grain` rows that must stay together, belongs to the chunk that has its middle
    byte."""
    rows, row_bytes = param.shape[0], param.nbytes // param.shape[0]
    first = np.arange(0, rows, grain, dtype=np.int64)
    middle = before + first * row_bytes + grain * row_bytes // 2
    chunk = np.minimum(middle * count // total, count - 1)
    starts = [0, *(1 + np.flatnonzero(np.diff(chunk))).tolist()]
    return [
        (int(chunk[at]), at * grain, min(end * grain, rows))
        for at, end in itertools.pairwise([*starts, len(first)])
    ]
