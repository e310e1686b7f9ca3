"""A leaf is what autograd trains: a whole parameter, or some rows of one.

Rows `start:stop` of a weight become an ordinary `Parameter` that shares the weight's storage. The module's forward is
replaced, while the leaf is active, by one that computes the same output from the whole weight and gives a gradient to
the leaf only: the rest of the weight's gradient is never formed. So `.grad`, hooks, clipping, checkpointing and every
rule work on it as they do on any parameter.

Shapes: weight (O, I); leaf (stop - start, I); x (..., I); y (..., O); ids (...).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..baichuan.model import NormHead


@dataclass(frozen=True)
class Leaf:
    """Rows `start:stop` of the parameter `name`, which has `rows` of them."""

    name: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.rows


class SlicedLinear(torch.autograd.Function):
    """y = x W^T; backward: dx = dy W, and dleaf = dy[..., start:stop]^T x, the slice's exact gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, leaf: Tensor, start: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = slice(start, start + leaf.shape[0])
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dleaf = dy[..., ctx.rows].flatten(0, -2).mT @ x.flatten(0, -2)
        return dx, None, dleaf, None


class SlicedEmbedding(torch.autograd.Function):
    """y = W[ids]; backward: dleaf sums dy over the tokens whose id lies in the slice. The padding row gets none."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, leaf: Tensor, start: int, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.start, ctx.shape, ctx.padding_idx = start, leaf.shape, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (ids,) = ctx.saved_tensors
        local = ids - ctx.start
        inside = (local >= 0) & (local < ctx.shape[0])
        if ctx.padding_idx is not None:
            inside &= ids != ctx.padding_idx
        # tokens outside land in a spare row: no data-dependent shape, so fake tensors can follow
        dleaf = dy.new_zeros(ctx.shape[0] + 1, ctx.shape[1])
        dleaf.index_add_(0, local.where(inside, ctx.shape[0]).flatten(), dy.flatten(0, -2))
        return None, None, dleaf[:-1], None, None


def _autocast(*tensors: Tensor) -> Iterable[Tensor]:
    """What autocast does to the operands of F.linear: custom Functions have to do it themselves."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) for t in tensors]


def _sliced_forward(module: nn.Module, leaf: nn.Parameter, start: int):
    """The forward of `module` in which only `leaf` is trained."""
    if hasattr(module, "look_up"):  # a table on the host
        return lambda ids: module.look_up(ids, leaf, start)
    if isinstance(module, nn.Linear):
        return lambda x: SlicedLinear.apply(*_autocast(x, module.weight, leaf), start)
    if isinstance(module, nn.Embedding):
        return lambda ids: SlicedEmbedding.apply(ids, module.weight, leaf, start, module.padding_idx)
    if isinstance(module, NormHead):
        # rows are normalised one by one, so a slice of the normalised weight is the normalised slice
        return lambda x: SlicedLinear.apply(*_autocast(x, F.normalize(module.weight), F.normalize(leaf)), start)
    raise AssertionError(f"{type(module).__name__} has no sliced forward")


def divisible(model: nn.Module) -> set[str]:
    """Names of the parameters that can be cut between rows."""
    kinds = (nn.Linear, nn.Embedding, NormHead)
    return {f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, kinds) or hasattr(module, "look_up")}


class ActiveLeaves:
    """The parameters of one part, ready to be switched on and off. `named` maps names to what autograd trains."""

    def __init__(self, model: nn.Module, part: Iterable[Leaf]):
        self._slices: list[tuple[nn.Module, nn.Parameter, int]] = []
        self._whole: list[nn.Parameter] = []
        self.named: dict[str, nn.Parameter] = {}
        for leaf in part:
            self._add(model, leaf)

    def _add(self, model: nn.Module, leaf: Leaf) -> None:
        owner, _, attribute = leaf.name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, attribute)
        if leaf.whole:
            self._whole.append(weight)
            self.named[leaf.name] = weight
            return
        rows = nn.Parameter(weight.detach()[leaf.start : leaf.stop])
        self._slices.append((module, rows, leaf.start))
        self.named[f"{leaf.name}[{leaf.start}:{leaf.stop}]"] = rows

    def switch_on(self) -> None:
        for weight in self._whole:
            weight.requires_grad_(True)
        for module, rows, start in self._slices:
            module.forward = _sliced_forward(module, rows, start)

    def switch_off(self) -> None:
        for weight in self._whole:
            weight.requires_grad_(False)
        for module, rows, _ in self._slices:
            del module.forward
            rows.grad = None
