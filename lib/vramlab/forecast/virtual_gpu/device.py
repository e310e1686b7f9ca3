"""A virtual GPU: the trainer runs on it unchanged, and not a byte of any tensor exists.

Tensors are torch's fake tensors: shape, type, strides and a storage that knows its size. Their
device is `vgpu`, made in Python through the backend that torch keeps for outsiders (PrivateUse1).
It is not the CPU, so tensors that move to the host can be told from those that stay. That is an
experimental interface of torch. `mode="cpu"` needs none of it: there every tensor, offloaded ones
too, lies on a fake CPU and runs the kernels that the CPU chooses.

Ranks of a process group are simulated too, see `ranks`.

Not exact, on `vgpu`: attention and workspaces, see `capture.kernels`, and autocast, see `autocast`.
The rest follows from autograd and the operations' own shapes. The allocator's rounding is not
applied here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

from ...capture.dispatch import Uncompiled, Watchable
from ...capture.kernels import Attention, Workspaces
from ...capture.meter import Meter
from ...capture.work import Work
from ...cards import AMPERE, Architecture
from . import autocast
from .ranks import Event, Stream, on_stream, virtual_ranks
from .shape_cache import Shapes

NAME = "vgpu"
LABELS = {
    "vgpu": "virtual GPU (fake tensors on a Python device)",
    "cuda": "fake tensors on cuda",
    "cpu": "fake tensors on the CPU: the CPU's kernels, host and device not told apart",
}


@dataclass(frozen=True)
class VirtualGpu:
    """The device that tensors are made on, and how it is simulated."""

    device: str
    label: str
    architecture: Architecture

    def meter(self, counted: bool = True) -> Meter:
        """An event meter that tells this device from the host, and knows its kernels' workspaces.
        With `counted`, it counts what operations compute and move."""
        work = Work() if counted else None
        if self.device == "cpu":
            return Meter(work=work)
        stream = (
            _backend.stream_number
            if self.device == NAME
            else lambda: torch.cuda.current_stream().stream_id
        )
        return Meter(self.device, Workspaces(self.architecture), work, stream)


@contextmanager
def virtual_gpu(
    mode: str = "auto", architecture: Architecture = AMPERE, world: int = 0
) -> Iterator[VirtualGpu]:
    """Inside, tensors are fake, and `torch.device(gpu.device)` is a virtual GPU of `architecture`;
    with `world`, it is the first of that many, each a rank of a process group.

    `auto` is `vgpu`, or `cuda` where torch sees a GPU, since torch takes one accelerator only
    (written for that case, and not run there yet). What is patched is put back at the end; the
    device's name stays registered, and says that it is not available. Raises: ValueError, for a
    mode that is neither `auto` nor one of `LABELS`.
    """
    if mode not in ("auto", *LABELS):
        raise ValueError(f"mode is {mode!r}: use one of {', '.join(('auto', *LABELS))}")
    if mode == "auto":
        mode = "cuda" if torch.cuda.is_available() else "vgpu"
    _register_shapes_of_fused_sgd()
    with ExitStack() as stack:
        if mode == "vgpu":
            stack.enter_context(_present())
            stack.enter_context(autocast.weight_copies())
        if mode != "cpu":
            attention = Attention(architecture)
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        # one thread: autograd counts its devices at the first backward of a process, and this
        # device may be registered later
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        # streams are numbered alike in every forecast
        stack.enter_context(patch.object(Stream, "count", 1))
        if world:
            stack.enter_context(virtual_ranks(world))
        stack.enter_context(_Fake(allow_non_fake_inputs=True))
        yield VirtualGpu(mode, LABELS[mode], architecture)


_DEVICE, _DETACH = torch.ops.prim.device.default, torch.ops.aten.detach.default


class _Fake(FakeTensorMode, Watchable):
    _should_skip_dynamo = Uncompiled._should_skip_dynamo

    def __init__(self, **options):
        super().__init__(**options)
        self._shapes = Shapes(self)

    @property
    def avoid_device_init(self) -> bool:
        """Always: there is no device to initialise. Else a literal made on it would reach a real
        kernel."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # the two most frequent operations; neither makes or frees a storage
        if func is _DEVICE:
            return args[0].fake_device
        if func is _DETACH and type(args[0]) is FakeTensor:
            return self._shapes.alias(args[0])
        watch, self.watch = self.watch, None  # what torch does to find the shapes is not watched
        if watch is None:
            return self.dispatch(func, types, args, kwargs or {})
        try:
            return watch.through(self.dispatch, func, types, args, kwargs or {}, sys._getframe(1))
        finally:
            self.watch = watch

    def dispatch(self, func, types, args=(), kwargs=None):
        if func.namespace == "profiler":  # marks a region and has no tensor
            return func(*args, **(kwargs or {}))
        # waiting returns the tensor itself, of which fake tensors would make another
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        return self._shapes.outputs(
            func,
            args,
            kwargs or {},
            lambda: FakeTensorMode.dispatch(self, func, types, args, kwargs),
        )


class _Backend:
    """`torch.vgpu`: what torch calls on a device's module. Available only inside `virtual_gpu`."""

    # where it is False, checkpointing keeps no random state of the device: those are host bytes
    _initialized = False
    available = False
    Stream, Event, stream = Stream, Event, staticmethod(on_stream)

    def is_available(self) -> bool:
        return self.available

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(self.available)

    def current_device(self) -> int:
        return 0

    def _no_random_state(self, *args, **kwargs) -> None:
        """The device has no random numbers, and so no state of them."""

    manual_seed_all = get_rng_state = set_rng_state = _no_random_state

    def current_stream(self, device=None) -> object:
        return Stream.current

    def stream_number(self) -> int:
        return Stream.current.number

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _backend.available


_backend = _Backend()


@contextmanager
def _present() -> Iterator[None]:
    """Registers the device at the first use, and makes it available until the end."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, _backend, hook=_Hook())
        autocast.register(NAME)
        _register_whole_operations()
    with patch.object(_backend, "available", True):
        yield


_library: list[torch.library.Library] = []


def _register_whole_operations() -> None:
    """Operations for which torch has kernels on every real device, and a recipe of smaller
    operations for all others. The virtual device counts among the others until it has a kernel,
    which is never run: fake tensors need its shapes only. These are the operations for which the
    dispatcher has a CPU kernel and a recipe; one with only a CUDA kernel cannot be detected here.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in ("silu_backward", "mish_backward", "native_channel_shuffle"):
        library.impl(name, _never, "PrivateUse1")
    _library.append(library)


def _never(*args, **kwargs):
    raise AssertionError("a real kernel was called on the virtual device")


def _register_shapes_of_fused_sgd() -> None:
    """torch has no shapes for fused SGD, which writes in place and returns nothing. Registered once
    a process, if torch still has none; it concerns meta tensors only, so it stays."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_", "Meta"):
        library = torch.library.Library("aten", "IMPL")
        library.impl("_fused_sgd_", lambda *args, **kwargs: None, "Meta")
        _library.append(library)


_native_apply = nn.Module._apply


def _apply(module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """`Module._apply` for fake parameters, which torch would swap in place and cannot: a parameter
    that changes is replaced, one that does not is left alone. A parameter that two modules share
    would become two."""
    own = [*module._parameters.values(), *module._buffers.values()]
    if not all(tensor is None or isinstance(tensor, FakeTensor) for tensor in own):
        return _native_apply(module, fn, recurse)
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = fn(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
