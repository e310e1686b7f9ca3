"""Axis `trains`: which of the weights move, and when.

Everything that trains is a list of parts, each a tuple of leaves, no leaf in two. At each step a
set of parts is active: all weights at once are one part; block-wise methods take turns with one
part a block, ChunkFT with one a chunk; LISA draws some blocks and keeps one part, of what is
outside the blocks, active always. A part at rest requires no gradient, so autograd saves nothing
for its weights and stops below the lowest active leaf.

The state of a part that goes to rest is dropped, parked or kept (`state`); a part that stays active
keeps its own. Adapters, which add weights, are in `adapters`.
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
    """All of a parameter."""
    return Leaf(name, 0, param.shape[0], param.shape[0])


@dataclass(frozen=True)
class All:
    """Every parameter, every step."""

    state = "device"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        return [tuple(whole(name, param) for name, param in model.named_parameters())]

    def active(self, step: int, count: int) -> tuple[int, ...]:
        """Which of `count` parts are active at `step`, ascending."""
        return tuple(range(count))

    def sets(self, count: int) -> list[tuple[int, ...]]:
        """The sets of parts that are active together at some step; where parts are drawn, enough of
        them to show every size."""
        return [tuple(range(count))]

    def lr_step(self, step: int, count: int) -> int:
        """The step whose learning rate `step` uses."""
        return step

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labels of a batch that the loss counts, each where it is predicted; -100 everywhere
        else."""
        return next_labels(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))


@dataclass(frozen=True)
class Nothing(All):
    """No parameter: the model is only run."""

    def parts(self, model: nn.Module) -> list[Part]:
        return []


@dataclass(frozen=True)
class Norms(All):
    """The weights of the norms: what BitFit is on a model that has no biases. Zaken 2022,
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
    """The top `share` of the blocks, at least one; all below, embeddings and head are frozen, and
    backward stops there: a lower block keeps nothing. Howard 2018, arXiv:1801.06146, without the
    gradual unfreezing."""

    share: Annotated[float, Range(0.001, 1)] = 0.25

    def parts(self, model: nn.Module) -> list[Part]:
        stack = decoder(model).layers
        chosen = {
            id(p)
            for block in stack[len(stack) - max(1, round(self.share * len(stack))) :]
            for p in block.parameters()
        }
        return [
            tuple(
                whole(name, param)
                for name, param in model.named_parameters()
                if id(param) in chosen
            )
        ]


@dataclass(frozen=True)
class _Moving(All):
    """A schedule over parts: `interval` updates on each, then the next. `state` says what becomes
    of a part's optimizer state when its turn ends: `reset` drops it, `host` parks it in host
    memory, `device` leaves it there.

    `order`: ascending is from the embeddings up; random is drawn anew every cycle, shuffled once
    for all.
    """

    interval: Count = 1
    order: Literal["ascending", "descending", "random", "shuffled"] = "ascending"
    state: Literal["reset", "host", "device"] = "reset"
    seed: Seed = 0
    delayed_lr: bool = False
    """Whether the learning rate advances only when every part has had its turn (HiFT): it stands
    still within a cycle, so that no part is trained at a higher rate than another."""

    def active(self, step: int, count: int) -> tuple[int, ...]:
        cycle, position = divmod(step // self.interval, count)
        if self.order == "ascending":
            return (position,)
        if self.order == "descending":
            return (count - 1 - position,)
        return (self._drawn(cycle if self.order == "random" else 0, count)[position],)

    def _drawn(self, number: int, count: int) -> list[int]:
        """`count` parts in the order of draw `number`: a pure function of it, so that a run can
        resume."""
        return torch.randperm(
            count, generator=torch.Generator().manual_seed(self.seed + number)
        ).tolist()

    def sets(self, count: int) -> list[tuple[int, ...]]:
        return [(part,) for part in range(count)]

    def lr_step(self, step: int, count: int) -> int:
        cycle = self.interval * count
        return step // cycle * cycle if self.delayed_lr else step


@dataclass(frozen=True)
class Blocks(_Moving):
    """Groups of transformer blocks take turns, or some of them are drawn.

    BAdam, Luo 2024, arXiv:2404.02827: one block at a time, order random, state reset, ends at rest.
    Not exact: a block that two cycles' edge gives two turns in a row keeps its state, where BAdam
    resets it. badam 1.4 leaves out the first block's last step, too. HiFT, Liu 2024,
    arXiv:2401.15207: interval 1, state host, ends as units, delayed_lr; its random order is
    `shuffled`. The published code trains the final norm as a unit between the last block and the
    head: `norm: own`. LISA, Pan 2024, arXiv:2403.17919: `sample` blocks drawn each turn, state
    reset, ends always. Backward then runs to the embeddings at every step: blocks at rest save
    nothing for their own weights, but it passes through them. A block drawn twice in a row keeps
    its state. The published code (LMFlow) has one optimizer, which never drops a state: `state:
    device`, whose bytes grow to full AdamW's as blocks are drawn.
    """

    interval: Count = 50
    order: Literal["ascending", "descending", "random", "shuffled"] = "random"
    count: CountOrNone = 0
    """Number of groups of equal length; 0 is one group a block."""
    ends: Literal["rest", "units", "always"] = "rest"
    """What embeddings, and final norm and head, do: `rest`, take part as the first and the last
    unit (`units`), or train at every step, with a state that lasts (`always`)."""
    norm: Literal["head", "own"] = "head"
    """With ends: units, whether the final norm trains with the head or is a unit of its own."""
    sample: CountOrNone = 0
    """How many groups each turn draws, uniformly and without replacement; 0 is one after the
    other."""

    def parts(self, model: nn.Module) -> list[Part]:
        names = {id(param): name for name, param in model.named_parameters()}
        units = [[names.pop(id(p)) for p in block.parameters()] for block in decoder(model).layers]
        below = list(names.values()).index(f"{_stem(units)}norm.weight")
        ends = [list(names.values())[:below], list(names.values())[below:]]
        if self.ends == "units":
            units = [
                ends[0],
                *units,
                *([[name] for name in ends[1]] if self.norm == "own" else [ends[1]]),
            ]
        params = dict(model.named_parameters())
        groups = [
            [name for unit in units[a:b] for name in unit]
            for a, b in _cuts(len(units), self.count or len(units))
        ]
        if self.sample > len(groups):
            raise IllegalRegime(
                f"trains.blocks.sample is {self.sample}: there are {len(groups)} groups, use 1 to"
                f" {len(groups)}"
            )
        always = [[*ends[0], *ends[1]]] if self.ends == "always" else []
        return [tuple(whole(name, params[name]) for name in group) for group in groups + always]

    def active(self, step: int, count: int) -> tuple[int, ...]:
        groups = count - (self.ends == "always")
        drawn = (
            self._drawn(step // self.interval, groups)[: self.sample]
            if self.sample
            else super().active(step, groups)
        )
        return (*sorted(drawn), *range(groups, count))

    def sets(self, count: int) -> list[tuple[int, ...]]:
        groups, size = (
            count - (self.ends == "always"),
            self.sample or 1,
        )  # neighbours: any other groups are as large
        return [
            (*range(first, first + size), *range(groups, count))
            for first in range(groups - size + 1)
        ]

    def lr_step(self, step: int, count: int) -> int:
        return super().lr_step(step, count - (self.ends == "always"))


def _stem(units: list[list[str]]) -> str:
    """What names in the decoder begin with: of "model.layers.0.mlp.up_proj.weight", "model."."""
    return units[0][0].split("layers.")[0]


def _cuts(total: int, count: int) -> list[tuple[int, int]]:
    if not 1 <= count <= total:
        raise IllegalRegime(
            f"trains.blocks.count is {count}: there are {total} units, use 1 to {total} (or 0)"
        )
    edges = [total * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


@dataclass(frozen=True)
class Chunks(_Moving):
    """The network's bytes, in the order of its parameters, cut into `count` equal runs at row
    edges: a chunk is whole matrices and at most two cut ones. Embeddings and head included; each
    chunk has its own step count. ChunkFT (2026); there a Linear is cut along its input features,
    here along its rows, which are contiguous in memory.
    """

    interval: Count = 1
    state: Literal["reset", "host", "device"] = "host"
    count: Annotated[int, Range(1, 1_000_000)] = field(default=8, kw_only=True)
    """K of the paper; 1 is plain training."""

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
    """(chunk, start, stop) runs of a parameter whose first byte is number `before` of `total`; a
    row, or `grain` rows that must stay together, belongs to the chunk in which its middle byte
    lies."""
    rows, row_bytes = param.shape[0], param.nbytes // param.shape[0]
    first = np.arange(0, rows, grain, np.int64)
    middle = before + first * row_bytes + grain * row_bytes // 2
    chunk = np.minimum(middle * count // total, count - 1)
    starts = [0, *(1 + np.flatnonzero(np.diff(chunk))).tolist()]
    return [
        (int(chunk[at]), at * grain, min(end * grain, rows))
        for at, end in itertools.pairwise([*starts, len(first)])
    ]
