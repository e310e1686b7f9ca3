"""Axis `place`, value host_weights: weights, gradients and optimizer state stay in host memory, and
the device gets them piece by piece.

    embedding   The rows of the tokens are looked up on the host (see `host.LookUp`).
    block       Its weights come up while the block before it runs (in forward the one above, in
                backward the one below), so those of two blocks exist at most. A weight is dropped
                when forward has used it. Backward recomputes the block, which brings its weights up
                again, so blocks must be checkpointed.
    head        `head_rows` rows of W at a time, forward and backward, since rows are normalised one
                by one.
    gradient    Goes down when it is formed; the rule runs on the host, see `HostUpdater`.

After ZeRO-Infinity, Rajbhandari 2021, arXiv:2104.07857, and L2L, Pudipeddi 2020, arXiv:2002.05645,
on one device. Exact, except for the order in which chunks of the head are summed into the gradient
of its input. A step moves 4 bytes up and 2 down for each bf16 weight. On a GPU these copies overlap
with computation; not run on one yet. Host bytes for a weight of `b` bytes: b + b (gradient; with
`until: backward` those of two tensors at a time) + the rule's state.

Shapes: t tokens (any leading dimensions), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...baichuan.head import NormHead
from ...baichuan.model import decoder
from ...observer import Observer, recomputing
from ..fields import Count
from ..head.head import FusedLoss
from ..until.row_protocol import Spans, spans
from ..until.until import Updater
from ..weights.types import Fp32
from .host import HostEmbedding, HostUpdater, move_all_but, own_on_host
from .place import Device
from .transfers import Bus


class Fetch(torch.autograd.Function):
    """A parameter on the host -> the same on the device. backward: sends its gradient to the host.
    Called right before the operation that uses it: so autograd runs this backward right after that
    operation's, and only one gradient exists.
    """

    @staticmethod
    def forward(
        ctx, parameter: nn.Parameter, take: Callable[[nn.Parameter], Tensor], bus: Bus
    ) -> Tensor:
        ctx.bus, ctx.parameter = bus, parameter
        return take(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor):
        host, arrived = ctx.bus.down(grad)
        if ctx.parameter.grad is not None:  # autograd is about to add to it, on the host
            arrived.synchronize()
        return host, None, None


class BlockStream:
    """Brings up the weights of the blocks in the order in which they run."""

    def __init__(self, model: nn.Module, stack: nn.Module, bus: Bus):
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._blocks, self._bus, self._table = list(stack.layers), bus, stack.embed_tokens
        # block -> id of a parameter -> its copy on the device, and the event of its arrival
        self._on_device: dict[int, dict[int, tuple[Tensor, Any]]] = {}
        self._running: tuple[int, bool] | None = None  # block, and whether it is recomputed
        for index, block in enumerate(self._blocks):
            for module in block.modules():
                self.bring_for(module, partial(self._take, index))
        self.bring_for(stack.norm, bus.fetch)

    def bring_for(self, module: nn.Module, take: Callable[[nn.Parameter], Tensor]) -> None:
        """Make `module` run with what `take` makes of its own parameters, on the device."""
        if not module._parameters:
            return
        native = module.forward

        def forward(*args, **kwargs):
            with _replaced(module, lambda parameter: Fetch.apply(parameter, take, self._bus)):
                return native(*args, **kwargs)

        module.forward = forward

    def _begin(self, index: int, recomputed: bool) -> None:
        self._running = index, recomputed
        following = index - 1 if recomputed else index + 1
        # a new forward keeps nothing: weights that backward brought up have been updated since
        kept = () if index == 0 and not recomputed else (index, following)
        for other in [other for other in self._on_device if other not in kept]:
            self._drop(other)
        self._bring(index)
        exists = 0 <= following < len(self._blocks)
        if exists and (not recomputed or self._backward_reaches(following)):
            self._bring(following)

    def _backward_reaches(self, index: int) -> bool:
        return any(
            parameter.requires_grad
            for module in (self._table, *self._blocks[: index + 1])
            for parameter in module.parameters()
        )

    def _bring(self, index: int) -> None:
        if not self._on_device.get(index):
            self._on_device[index] = copies = {
                id(p): self._bus.up(p.detach()) for p in self._blocks[index].parameters()
            }
            self._bus.observer.own(
                "weights", ((self._names[key], copy) for key, (copy, _) in copies.items())
            )

    def _drop(self, index: int) -> None:
        for _, event in self._on_device.pop(index, {}).values():
            self._bus.arrived(event)  # before the memory is used again

    def _take(self, index: int, parameter: nn.Parameter) -> Tensor:
        recomputed = bool(recomputing)
        # a block begins when its first weight is taken: hooks and wrappers of the block do not run
        # when it is recomputed
        if (index, recomputed) != self._running or id(parameter) not in self._on_device[index]:
            self._begin(index, recomputed)
        copy, event = self._on_device[index].pop(id(parameter))
        self._bus.arrived(event)
        return copy


@contextmanager
def _replaced(module: nn.Module, fetched: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Inside, the module's own parameters are replaced by what `fetched` returns for them."""
    own = dict(module._parameters)
    try:
        module._parameters.update(
            {name: fetched(parameter) for name, parameter in own.items() if parameter is not None}
        )
        yield
    finally:
        module._parameters.update(own)


class StreamedLogits(torch.autograd.Function):
    """logits = h normalize(W)^T, or h W^T without `norm`, with W (V, H) on the host and `step` of
    its rows on the device at a time; h (..., H) -> (..., V). backward: dh is summed over the chunks
    in h's type, and dW is sent to the host chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: nn.Parameter, step: int, bus: Bus, norm: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.step, ctx.bus, ctx.norm = weight, step, bus, norm
        ctx.low = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else None
        )
        logits = hidden.new_empty(*hidden.shape[:-1], weight.shape[0], dtype=ctx.low)
        pieces = spans(weight.shape[0], step)
        for (a, b), rows in zip(pieces, rows_up(weight.detach(), pieces, bus), strict=True):
            logits[..., a:b] = F.linear(hidden, F.normalize(rows) if norm else rows)
        return logits

    @staticmethod
    def backward(ctx, dlogits: Tensor):
        (hidden,) = ctx.saved_tensors
        low = ctx.low or hidden.dtype
        flat, dflat = hidden.flatten(0, -2).to(low), dlogits.flatten(0, -2)
        dhidden = None
        dweight = ctx.bus.host_like(ctx.weight.detach()) if ctx.needs_input_grad[1] else None
        pieces = spans(ctx.weight.shape[0], ctx.step)
        for (a, b), rows in zip(pieces, rows_up(ctx.weight.detach(), pieces, ctx.bus), strict=True):
            dpart = dflat[:, a:b]
            with torch.enable_grad():
                rows.requires_grad_(dweight is not None)
                unit = F.normalize(rows) if ctx.norm else rows
            if ctx.needs_input_grad[0]:
                part = F.linear(dpart, unit.detach().to(low).mT)
                dhidden = part if dhidden is None else dhidden.add_(part)
            if dweight is not None:
                dunit = F.linear(dpart.mT, flat.mT).to(rows.dtype)
                ctx.bus.down(torch.autograd.grad(unit, rows, dunit)[0], into=dweight[a:b])
        if dweight is not None and ctx.weight.grad is not None:
            ctx.bus.last_down().synchronize()
        return (
            dhidden if dhidden is None else dhidden.to(hidden.dtype).view_as(hidden),
            dweight,
            None,
            None,
            None,
        )


def rows_up(weight: Tensor, pieces: Spans, bus: Bus) -> Iterator[Tensor]:
    """The rows of a weight that is on the host, piece by piece on the device. The next piece is
    copied meanwhile."""
    coming = None
    for at, (a, b) in enumerate(pieces):
        rows, event = coming or bus.up(weight[a:b])
        following = pieces[at + 1 : at + 2]
        coming = bus.up(weight[slice(*following[0])]) if following else None
        bus.arrived(event)
        bus.observer.own("weights", [("lm_head.weight", rows)])
        yield rows


class StreamedHead(NormHead):
    """Replaces a `NormHead`, with the same parameter, on the host."""

    def __init__(self, head: NormHead, step: int, bus: Bus):
        nn.Module.__init__(self)
        self.weight, self.norm, self.step, self.bus = head.weight, head.norm, step, bus
        if head.fused is not None:
            self.fused = FusedLoss(partial(rows_up, bus=bus), bus.observer)

    def logits(self, hidden: Tensor) -> Tensor:
        return StreamedLogits.apply(hidden, self.weight, self.step, self.bus, self.norm)


@dataclass(frozen=True)
class HostWeights(Device):
    """Everything that outlives a step is in host memory."""

    head_rows: Count = 8192
    """Rows in a piece of a plain head, of which two are on the device at one time. A fused head has
    its own sizes."""

    def on_host(self, name: str) -> bool:
        return True

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        bus, stack = Bus(device, observer), decoder(model)
        own_on_host(model, bus)
        move_all_but(model, device, {module for module in model.modules() if module._parameters})
        stack.embed_tokens = HostEmbedding(stack.embed_tokens, bus)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, NormHead):
                    setattr(parent, name, StreamedHead(child, self.head_rows, bus))
        BlockStream(model, stack, bus)
        return super().shard(model, device, weights, observer)

    def updater(
        self,
        until: Any,
        rule: Any,
        leaves: Mapping[str, nn.Parameter],
        lr: float,
        model: nn.Module,
        observer: Observer,
    ) -> Updater:
        return HostUpdater(
            until, rule, list(leaves.values()), lr, decoder(model).embed_tokens.bus, copies=False
        )
