"""What the meter looks through: a dispatch mode below autograd, and storages that change size.

A mode changes what autograd does: while one is active every tensor counts as a subclass, and the
engine then avoids writing in place. What it would have written in place is written in place here,
so that the bytes are those of the run nobody watches. The same holds on fake tensors, which are
subclasses by themselves.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
"""Backward formulas that fill a fresh tensor, in place unless a tensor is a subclass
(value-selecting reductions)."""


class Uncompiled(TorchDispatchMode):
    """A mode that torch does not wrap against its compiler, which is not used here, twice an
    operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Watch(Uncompiled):
    """Hands every operation's outputs to `saw(func, args, outputs)`, once each, when it has
    returned. It sees the operations the trainer asks for and not how a fake mode works them out."""

    def __init__(self, saw: Callable, in_backward: Callable[[], bool]):
        super().__init__()
        self._saw, self._in_backward = saw, in_backward
        _holders_of_one_held_once()  # now, not inside a backward

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.through(_plainly, func, types, args, kwargs or {}, sys._getframe(1))

    def through(self, run: Callable, func, types, args, kwargs, caller) -> object:
        """The operation by `run`; `caller` is the frame that a mode was called from."""
        if DTensor in types:  # it is none itself; what it does to this rank's piece comes here next
            return NotImplemented
        if func in _REWRITTEN and not kwargs and self._in_backward():
            func = _as_the_engine_does(func, args, caller)
        outputs = run(func, types, args, kwargs)
        if not _propagating and func not in _QUESTIONS:
            self._saw(func, args, outputs)
        return outputs


def _plainly(func, types, args, kwargs):
    return func(*args, **kwargs)


class Watchable:
    """A mode that is watched from inside, which spares every operation the way through a second
    mode."""

    watch: Watch | None = None


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Everything that is asked inside, on whatever tensors."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if not isinstance(mode, Watchable):
        with watch:
            yield
        return
    mode.watch = watch
    try:
        yield
    finally:
        mode.watch = None


_QUESTIONS = {torch.ops.prim.device.default, torch.ops.prim.layout.default}
_propagating: list[None] = []


@contextmanager
def propagation_unseen() -> Iterator[None]:
    """A sharded tensor's operation is also run on fakes of the whole shape, to learn the shape of
    what comes out. They are made under whatever mode is there, and are nobody's bytes."""
    native = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(*args):
        _propagating.append(None)
        try:
            return native(*args)
        finally:
            _propagating.pop()

    ShardingPropagator._propagate_tensor_meta_non_cached = propagate
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = native


_REWRITTEN = {aten.add.Tensor, *INTO_FIRST}


def _as_the_engine_does(func, args, frame):
    """The operation that would run if nobody watched. Source: torch/csrc/autograd/input_buffer.cpp,
    `accumulate`: two gradients of one tensor are added into the first when that is dense and the
    engine alone holds it, and its storage. Not exact: an addition that a backward formula asks for,
    never in place, is not told from the engine's own.
    """
    if torch.is_grad_enabled() or not _called_by_the_engine(frame):
        return func
    if func in INTO_FIRST:
        return INTO_FIRST[func] if _held_once(args[0]) else func
    into, other = args
    same = isinstance(other, Tensor) and into.shape == other.shape and into.dtype == other.dtype
    return aten.add_.Tensor if same and _held_once(into) and _dense(into) else func


def _called_by_the_engine(frame) -> bool:
    """No Python stands between autograd's engine and us: neither a custom Function nor a hook asked
    for this. What torch wraps around a mode does not count."""
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


_WRAPPERS = (
    os.path.join("torch", "_compile.py"),
    os.path.join("torch", "_dynamo", "eval_frame.py"),
)


def _held_once(tensor: Tensor) -> bool:
    # of the storage: the tensor itself and the Python storage made here to ask
    return (
        tensor._use_count() <= _holders_of_one_held_once()
        and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2
    )


@functools.cache
def _holders_of_one_held_once() -> int:
    """How many references a gradient has, seen from a mode, that the engine alone holds: what calls
    the mode holds some too. Asked of two gradients that nobody shares."""
    counts = []

    class Asks(Uncompiled):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.add.Tensor and not torch.is_grad_enabled():
                counts.append(args[0]._use_count())
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), Asks():
        leaf = torch.ones(2, requires_grad=True)
        middle = leaf * 2
        (middle.sin() * 3 + middle.cos() * 3).sum().backward()
    return counts[0]


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or is_non_overlapping_and_dense_or_false(tensor)


@contextmanager
def resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Storages that are resized directly, which no operation shows, are handed to `seen`."""
    inherited, before = torch.UntypedStorage.resize_, vars(torch.UntypedStorage).get("resize_")

    def resize_(storage, size):
        result = inherited(storage, size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        del torch.UntypedStorage.resize_
        if before is not None:  # somebody else is watching
            torch.UntypedStorage.resize_ = before


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collections inside a step would free cycles at moments that mean nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
