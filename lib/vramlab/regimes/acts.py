"""Axis `acts`: which activations forward keeps for backward, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """Every tensor that autograd saves stays on the device."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        """Around the forward. `weights` are the storages (`_cdata`) of parameters, which are no
        activations."""
        yield


@dataclass(frozen=True)
class Checkpoint(Keep):
    """Only the input of a block is kept; the rest is recomputed in backward, which costs one more
    forward. Chen 2016, arXiv:1604.06174. Exact: the same operations on the same values."""

    every: Count = 1
    """Checkpoint one block in `every`: 1 is every block, 2 every other one."""
    offload: bool = False
    """Whether the inputs of blocks wait on the host, as in `Offload`; tensors saved outside of
    blocks stay on the device."""

    def prepare(self, model: nn.Module) -> nn.Module:
        run = _offloaded if self.offload else checkpoint
        return _checkpointed(model, _contexts, self.every, run)

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
"""Innermost last: takes the inputs of the block that is being checkpointed."""


def _offloaded(block: Callable, *args, **kwargs):
    """`checkpoint`, with the saved inputs sent to the host."""
    with _moving[-1].hooks():
        return checkpoint(block, *args, **kwargs)


def _checkpointed(
    model: nn.Module, contexts: Callable, every: int = 1, run: Callable = checkpoint
) -> nn.Module:
    # not by transformers' own switch: it makes the embeddings' output require grad, so backward
    # would always run to the bottom, and block-wise regimes skip half of that
    for index, layer in enumerate(decoder(model).layers):
        layer.gradient_checkpointing = index % every == 0
        layer._gradient_checkpointing_func = partial(run, use_reentrant=False, context_fn=contexts)
    return model


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a block's forward, and around its recomputation."""
    return nullcontext(), recomputing()


@dataclass(frozen=True)
class Selective(Keep):
    """The input of a block and the results of matrix products and of attention are kept. Everything
    between them (norms, SwiGLU, rotation, sums) is recomputed, which costs little time. The reverse
    of Korthikanti 2022, arXiv:2205.05198, where attention is recomputed. Uses torch's selective
    checkpointing. Exact. On a CPU that forms bf16 products in fp32 (`bf16_on_cpu`), the kept
    results are fp32, twice the bytes of a GPU's."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return _checkpointed(model, _selective_contexts)


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
"""The operations that do most of a block's work; their results are small in comparison."""


def _selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    forward, recomputation = create_selective_checkpoint_contexts(_policy)
    return forward, _recomputing_with(recomputation)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _recomputing_with(context: AbstractContextManager) -> Iterator[None]:
    with recomputing(), context:
        yield


@dataclass(frozen=True)
class Offload(Keep):
    """Saved tensors wait in host memory from forward to backward. Exact. Rhu 2016 (vDNN),
    arXiv:1602.08124. The mechanism of `torch.autograd.graph.save_on_cpu`, but without the
    parameters, and each tensor moves once however often it is saved. Copies down overlap with
    computation; backward waits for copies up.
    """

    min_bytes: CountOrNone = 1024
    """Smaller tensors stay on the device, because moving them costs more than they hold."""

    @contextmanager
    def saving(self, observer: Observer, weights: set[int]) -> Iterator[None]:
        moved = _Moved(observer, weights, self.min_bytes)
        with moved.hooks():
            yield
        moved.end()


class _Moved:
    """The tensors that one forward sends to the host, and the hooks that send them."""

    def __init__(self, observer: Observer, weights: set[int], min_bytes: int = 1024):
        self._observer, self._weights, self._min_bytes = observer, weights, min_bytes
        self._bus: Bus | None = None
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
        # an address is unique only among living storages
        if key not in self._waiting or self._waiting[key][0].expired():
            self._waiting[key] = StorageWeakRef(storage), _Waiting(self._bus, tensor.detach())
        return self._waiting[key][1]

    def end(self) -> None:
        self._waiting.clear()
        if self._bus is not None:
            self._bus.release()


class _Waiting:
    """A tensor on the host; calling it returns a copy on the device."""

    def __init__(self, bus: Bus, tensor: Tensor):
        self._bus, (self._host, self._arrived) = bus, bus.down(tensor)

    def __call__(self) -> Tensor:
        return self._bus.fetch(self._host, after=self._arrived)
