"""Axis `acts`: what the forward keeps for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..observer import Observer, recomputing


@dataclass(frozen=True)
class Keep:
    """Every tensor autograd asks for stays on the device."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        """Around the forward. `weights` holds the storage pointers that are parameters, not activations."""
        yield


@dataclass(frozen=True)
class Checkpoint(Keep):
    """Only the input of every `every`-th group of blocks is kept; the rest is formed again in backward, at the price
    of one more forward. Chen 2016, arXiv:1604.06174. Exact: same operations on the same values."""

    every: int = 1
    """Checkpoint one block in `every`: 1 is all of them, 2 every other one."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"checkpoint.every is {self.every}: it counts blocks, use 1 or more")

    def prepare(self, model: nn.Module) -> nn.Module:
        # not transformers' own switch: it makes the embeddings' output require grad, so that backward always runs to
        # the bottom, which takes from block-wise regimes the half of the backward they can skip
        for index, layer in enumerate(decoder(model).layers):
            layer.gradient_checkpointing = index % self.every == 0
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=_told)
        return model


def _told() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a block's forward, and around forming it again: whoever watches is told which of the two it sees."""
    return nullcontext(), recomputing()


@dataclass(frozen=True)
class Offload(Keep):
    """Saved tensors wait in host memory from forward to backward; the copy back is exact.
    Rhu 2016 (vDNN), arXiv:1602.08124; the mechanism of `torch.autograd.graph.save_on_cpu`, without the parameters."""

    min_bytes: int = 1024
    """Smaller tensors stay: moving them costs more than they hold."""

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        def pack(tensor: Tensor):
            if tensor.nbytes < self.min_bytes or tensor.untyped_storage()._cdata in weights:
                return tensor
            with observer.region("host"):
                # like: the same strides, so that backward runs the same kernels on the same layout
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                host.copy_(tensor, non_blocking=tensor.is_cuda)
            return tensor.device, host

        def unpack(packed) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            # a fresh device tensor on every device, so that a CPU run has the same lifetimes as a GPU run
            return torch.empty_like(host, device=device).copy_(host, non_blocking=host.is_pinned())

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks inside a (possibly peft-wrapped) Baichuan-2: the module that owns `layers`."""
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no `layers`: it is not a decoder the axes know how to rewrite")
