"""Axis `acts`: what the forward keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..baichuan.model import decoder
from ..observer import Observer, recomputing
from .fields import Count, CountOrNone
from .place.transfers import Bus

aten = torch.ops.aten


@dataclass(frozen=True)
class Keep:
    """Every tensor autograd asks for stays on the device."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        """Around the forward. `weights` holds the storage pointers that are parameters, not
        activations."""
        yield


@dataclass(frozen=True)
class Checkpoint(Keep):
    """Only the input of a block is kept; the rest is formed again in backward, at the price of one
    more forward. Chen 2016, arXiv:1604.06174. Exact: same operations on the same values."""

    every: Count = 1
    """Checkpoint one block in `every`: 1 is all of them, 2 every other one."""
    offload: bool = False
    """Whether blocks' inputs wait on the host, as `Offload` has it; what is kept outside of blocks
    stays."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return _checkpointed(model, _told, self.every, _offloaded if self.offload else checkpoint)

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        if not self.offload:
            yield
            return
        _moving.append(_Moved(observer, weights))
        try:
            yield
        finally:
            _moving.pop().end()


_moving: list[_Moved] = []
"""Innermost last: where a block that is checkpointed now puts its inputs."""


def _offloaded(block: Callable, *args, **kwargs):
    """`checkpoint`, whose saved inputs go to the host. What the block itself saves is
    checkpointing's own business."""
    with _moving[-1].hooks():
        return checkpoint(block, *args, **kwargs)


def _checkpointed(
    model: nn.Module, contexts: Callable, every: int = 1, run: Callable = checkpoint
) -> nn.Module:
    # not transformers' own switch: it makes the embeddings' output require grad, so that backward
    # always runs to the bottom, which takes from block-wise regimes the half of the backward they
    # can skip
    for index, layer in enumerate(decoder(model).layers):
        layer.gradient_checkpointing = index % every == 0
        layer._gradient_checkpointing_func = partial(run, use_reentrant=False, context_fn=contexts)
    return model


def _told() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a block's forward, and around forming it again: whoever watches is told which of the
    two it sees."""
    return nullcontext(), recomputing()


@dataclass(frozen=True)
class Selective(Keep):
    """Of every block its input, the results of matrix products and of attention are kept; what lies
    between (norms, SwiGLU, rotation, sums) is formed again, which costs little time. Korthikanti
    2022, arXiv:2205.05198, turned round: there attention is formed again. By torch's selective
    checkpointing. Exact. On a CPU whose bf16 products are formed in fp32 (`rounding`) what is kept
    is their fp32 form, twice the bytes of a GPU's."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return _checkpointed(model, _told_selectively)


KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Operations that do most of a block's work, and whose results are small beside it."""


def _told_selectively() -> tuple[AbstractContextManager, AbstractContextManager]:
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _both(recomputing(), again)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(*contexts: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@dataclass(frozen=True)
class Offload(Keep):
    """Saved tensors wait in host memory from forward to backward; the copy back is exact. Rhu 2016
    (vDNN), arXiv:1602.08124; the mechanism of `torch.autograd.graph.save_on_cpu`, without the
    parameters, each tensor once however often it is saved, and beside the computing on the way
    down. On the way up backward waits for it.
    """

    min_bytes: CountOrNone = 1024
    """Smaller tensors stay: moving them costs more than they hold."""

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        moved = _Moved(observer, weights, self.min_bytes)
        with moved.hooks():
            yield
        moved.end()


class _Moved:
    """What goes to the host in one forward, and the hooks that send it there."""

    def __init__(self, observer: Observer, weights: set[int], min_bytes: int = 1024):
        self._observer, self._weights, self._min_bytes, self._bus = (
            observer,
            weights,
            min_bytes,
            None,
        )
        self._waiting: dict[tuple, tuple[StorageWeakRef, _Waiting]] = {}

    def hooks(self) -> AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda packed: packed() if callable(packed) else packed
        )

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        storage = tensor.untyped_storage()
        if tensor.nbytes < self._min_bytes or storage._cdata in self._weights:
            return tensor
        self._bus = self._bus or Bus(tensor.device, self._observer)
        key = (
            storage._cdata,
            tensor._version,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        owner, waiting = self._waiting.get(key, (None, None))
        if owner is None or owner.expired():  # an address is unique among the living only
            waiting = _Waiting(self._bus, tensor.detach())
            self._waiting[key] = StorageWeakRef(storage), waiting
        return waiting

    def end(self) -> None:
        self._waiting.clear()
        if self._bus is not None:
            self._bus.release()


class _Waiting:
    """A tensor on the host. Called, it is on the device again."""

    def __init__(self, bus: Bus, tensor: Tensor):
        self._bus, (self._host, self._there) = bus, bus.down(tensor)

    def __call__(self) -> Tensor:
        return self._bus.fetch(self._host, after=self._there)
