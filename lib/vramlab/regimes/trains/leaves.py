"""Leaves: what autograd trains, whole parameters or some rows of one.

Rows `start:stop` of a weight become an ordinary `Parameter` that shares the weight's storage. While
the leaf is active, the module's forward is replaced by one that computes the same output from the
whole weight and gives a gradient to the leaf only, so the rest of the weight's gradient is never
formed. `.grad`, hooks, clipping, checkpointing and every rule work on a leaf as on any parameter.

Shapes: weight (O, I); leaf (stop - start, I); x (..., I); y (..., O); ids (...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...baichuan.head import NormHead
from ..until.row_protocol import TakesRows, feed, spans

TAKEN_BYTES = 32 << 20
"""Most bytes of an embedding's gradient at one time, if it is formed in rows."""


@dataclass(frozen=True)
class Leaf:
    """Rows `start:stop` of the parameter `name`, which has `rows` rows."""

    name: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.rows

    def numel(self, parameter: Tensor) -> int:
        """How many numbers of its parameter the leaf has."""
        return parameter.numel() // self.rows * (self.stop - self.start)


class SlicedLinear(torch.autograd.Function):
    """y = x W^T; backward: dx = dy W, and dleaf = dy[..., start:stop]^T x, the slice's exact
    gradient."""

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
    """y = W[ids]; backward: dleaf sums dy over the tokens whose id lies in the slice. The padding
    row gets none. A `receiver` gets dleaf some rows at a time, and autograd then gets nothing."""

    @staticmethod
    def forward(
        ctx,
        ids: Tensor,
        weight: Tensor,
        leaf: Tensor,
        start: int,
        padding_idx: int | None,
        receiver: TakesRows | None = None,
    ) -> Tensor:
        # rows are handed over together with the leaf; nothing needs the weight's values
        ctx.save_for_backward(ids, leaf if receiver is not None else None)
        ctx.start, ctx.rows, ctx.padding_idx, ctx.receiver = start, len(leaf), padding_idx, receiver
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ids, leaf = ctx.saved_tensors

        def gradient(a: int, b: int) -> Tensor:
            local = ids - (ctx.start + a)
            inside = (local >= 0) & (local < b - a)
            if ctx.padding_idx is not None:
                inside &= ids != ctx.padding_idx
            # tokens outside go to a spare row, which torch leaves out as padding: so no shape
            # depends on the data
            return torch.ops.aten.embedding_dense_backward(
                dy, local.where(inside, b - a), b - a + 1, b - a, False
            )[:-1]

        if ctx.receiver is None:
            return None, None, gradient(0, ctx.rows), None, None, None
        most_rows = max(64, TAKEN_BYTES // (leaf.nbytes // ctx.rows))
        feed(ctx.receiver, leaf, spans(ctx.rows, most_rows), gradient)
        return None, None, None, None, None, None


def _autocast(*tensors: Tensor) -> Iterable[Tensor]:
    """The operands of F.linear as autocast would cast them: custom Functions have to do it
    themselves."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) for t in tensors]


def _leaf_forward(
    module: nn.Module, leaf: nn.Parameter, start: int, receiver: TakesRows | None
) -> Callable:
    """Replaces the module's method while only `leaf` is trained in it."""
    if hasattr(module, "look_up"):  # a table on the host
        return lambda ids: module.look_up(ids, leaf, start)
    if isinstance(module, nn.Linear):
        return lambda x: SlicedLinear.apply(*_autocast(x, module.weight, leaf), start)
    if isinstance(module, nn.Embedding):
        # detached: the same storage, but autograd sees only the leaf
        return lambda ids: SlicedEmbedding.apply(
            ids, module.weight.detach(), leaf, start, module.padding_idx, receiver
        )
    if isinstance(module, NormHead):
        # rows are normalised one by one, so a slice of the normalised weight is the normalised
        # slice
        return lambda x: SlicedLinear.apply(
            *_autocast(x, module.rows(module.weight), module.rows(leaf)), start
        )
    raise AssertionError(f"{type(module).__name__} has no sliced forward")


def divisible(model: nn.Module) -> set[str]:
    """The names of the parameters that can be cut between rows."""
    kinds = (nn.Linear, nn.Embedding, NormHead)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds) or hasattr(module, "look_up")
    }


class ActiveLeaves:
    """The leaves of one part, to be switched on and off. `named` maps their names to the parameters
    that autograd trains."""

    def __init__(self, model: nn.Module, part: Iterable[Leaf]):
        self._leaves: list[tuple[nn.Module, nn.Parameter, Leaf]] = []
        self.named: dict[str, nn.Parameter] = {}
        for leaf in part:
            self._add(model, leaf)

    def _add(self, model: nn.Module, leaf: Leaf) -> None:
        owner, _, attribute = leaf.name.rpartition(".")
        module = model.get_submodule(owner)
        rows, name = getattr(module, attribute), leaf.name
        if not leaf.whole:
            rows, name = (
                nn.Parameter(rows.detach()[leaf.start : leaf.stop]),
                f"{leaf.name}[{leaf.start}:{leaf.stop}]",
            )
        self._leaves.append((module, rows, leaf))
        self.named[name] = rows

    def switch_on(
        self, row_receiver: Callable[[nn.Parameter], TakesRows | None] = lambda leaf: None
    ) -> None:
        """Start training. `row_receiver` returns the receiver of a leaf's gradient in rows, or None
        if the gradient has to be whole."""
        for module, rows, leaf in self._leaves:
            rows.requires_grad_(True)
            receiver = row_receiver(rows)
            if _fused(module):
                # of a whole leaf the head uses its own weight, gathered where it is sharded
                module.fused.trains(None if leaf.whole else rows, leaf.start, receiver)
            if not leaf.whole or (isinstance(module, nn.Embedding) and receiver is not None):
                forward = _leaf_forward(module, rows, leaf.start, receiver)
                setattr(module, _method(module), forward)

    def switch_off(self) -> None:
        for module, rows, leaf in self._leaves:
            vars(module).pop(_method(module), None)
            if _fused(module):
                module.fused.trains(None)
            if leaf.whole:
                rows.requires_grad_(False)
            else:
                rows.grad = None


def _method(module: nn.Module) -> str:
    """The name of the method that `_leaf_forward` replaces."""
    return "logits" if isinstance(module, NormHead) else "forward"


def _fused(module: nn.Module) -> bool:
    return isinstance(module, NormHead) and module.fused is not None
