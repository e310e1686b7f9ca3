"""How the meter sees operations: a dispatch mode below autograd, and storages that change size.

A mode changes what autograd does: while one is active every tensor counts as a subclass, and the
engine then avoids writing in place. What it would have written in place is written in place here,
so that the bytes are those of an unobserved run. The same holds on fake tensors, which are
subclasses by themselves.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
INTO_FIRST = {
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""Of backward formulas that fill a fresh tensor, in place unless a tensor is a subclass
(value-selecting reductions): the operation -> its form in place."""


class Uncompiled(TorchDispatchMode):
    """A mode that torch does not guard against its compiler, which is not used here and would cost
    two calls for each operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Watch(Uncompiled):
    """Calls `on_operation(func, args, outputs)` once for each operation, when it has returned. It
    sees the operations that the trainer runs, and not how a fake mode computes them."""

    def __init__(self, on_operation: Callable, in_backward: Callable[[], bool]):
        super().__init__()
        self._on_operation, self._in_backward = on_operation, in_backward
        _references_to_a_gradient()  # now, not inside a backward

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.through(_plainly, func, types, args, kwargs or {}, sys._getframe(1))

    def through(self, run: Callable, func, types, args, kwargs, caller) -> object:
        """Carry the operation out by `run`; `caller` is the frame from which a mode was called."""
        if DTensor in types:  # its operation on this rank's piece comes here next
            return NotImplemented
        if func in _REWRITTEN and not kwargs and self._in_backward():
            func = _as_unobserved(func, args, caller)
        outputs = run(func, types, args, kwargs)
        if not _propagating and func not in _QUESTIONS:
            self._on_operation(func, args, outputs)
        return outputs


def _plainly(func, types, args, kwargs):
    return func(*args, **kwargs)


class Watchable:
    """A mode that calls its `watch` itself, which spares every operation the way through a second
    mode."""

    watch: Watch | None = None


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Every operation inside goes through `watch`, on real tensors and on fake ones."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    with replaced(mode, "watch", watch) if isinstance(mode, Watchable) else watch:
        yield


_QUESTIONS = {torch.ops.prim.device.default, torch.ops.prim.layout.default}
_propagating: list[None] = []


@contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    """While open, `owner`'s attribute `name` is `value`. One that it inherits is inherited again
    afterwards."""
    inherited, before = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def propagation_unseen() -> AbstractContextManager:
    """An operation on a sharded tensor also runs on fakes of the whole shape, to find the shape of
    its result. They are made under the active mode, and must not be counted."""
    native = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(*args):
        _propagating.append(None)
        try:
            return native(*args)
        finally:
            _propagating.pop()

    return replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate)


_REWRITTEN = {aten.add.Tensor, *INTO_FIRST}


def _as_unobserved(func, args, frame):
    """The operation that would run without a mode. Source: torch/csrc/autograd/input_buffer.cpp,
    `accumulate`: two gradients of the same tensor are added into the first if that is dense, and
    only the engine refers to it and its storage. Not exact: the addition of a backward formula,
    which is never in place, cannot be distinguished from the engine's own."""
    if torch.is_grad_enabled() or not _called_by_the_engine(frame):
        return func
    if func in INTO_FIRST:
        return INTO_FIRST[func] if _only_the_engines(args[0]) else func
    into, other = args
    same = isinstance(other, Tensor) and into.shape == other.shape and into.dtype == other.dtype
    return aten.add_.Tensor if same and _only_the_engines(into) and _dense(into) else func


def _called_by_the_engine(frame) -> bool:
    """Whether the engine itself runs this, and neither a custom Function nor a hook does. Torch's
    wrappers around a mode do not count."""
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


_WRAPPERS = (
    os.path.join("torch", "_compile.py"),
    os.path.join("torch", "_dynamo", "eval_frame.py"),
)


def _only_the_engines(tensor: Tensor) -> bool:
    # the storage has two references: the tensor, and the Python storage that is made by this call
    return (
        tensor._use_count() <= _references_to_a_gradient()
        and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2
    )


@functools.cache
def _references_to_a_gradient() -> int:
    """How many references a gradient has inside a mode when only the engine refers to it: the
    callers of the mode hold some too. Counted on two gradients that nothing else refers to."""
    counts = []

    class CountReferences(Uncompiled):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.add.Tensor and not torch.is_grad_enabled():
                counts.append(args[0]._use_count())
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), CountReferences():
        leaf = torch.ones(2, requires_grad=True)
        middle = leaf * 2
        (middle.sin() * 3 + middle.cos() * 3).sum().backward()
    return counts[0]


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or is_non_overlapping_and_dense_or_false(tensor)


def resizes(on_resize: Callable[[torch.UntypedStorage], None]) -> AbstractContextManager:
    """Call `on_resize` for storages that are resized directly, which no operation shows."""
    native = torch.UntypedStorage.resize_

    def resize_(storage, size):
        result = native(storage, size)
        on_resize(storage)
        return result

    return replaced(torch.UntypedStorage, "resize_", resize_)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collections inside a step would free cycles at arbitrary moments."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
