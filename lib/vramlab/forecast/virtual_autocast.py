"""Autocast on the virtual device: the casts CUDA's autocast makes, and the cache that keeps weight
copies alive.

torch has these rules in C++ for the devices it knows; a device made in Python has to bring its own.
The lists are those of `ATen/autocast_mode.h` for CUDA, as far as an operation has floating operands
that a language model could bring; what is on none of them falls through. Not included: operations
listed there for convolutions, recurrent cells and images.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

KEY = "AutocastPrivateUse1"
LOWER = (
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
)
"""Formed in the low type; weights among the operands are cast once, see `Casts`."""
WIDE = (
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "cosine_similarity",
    "nll_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "cdist",
    "renorm",
    "logsumexp",
)
"""Formed in fp32."""
WIDE_RESULT = (
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "sum",
    "sum.dim_IntList",
)
"""Asked for an fp32 result, unless the caller asked for a type."""
PROMOTED = (
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "index_put",
    "tensordot",
    "scatter_add",
)
"""Formed in the widest type among the operands."""


class Casts:
    """Copies in the low type of fp32 leaves that train. One a weight, kept until the outermost
    autocast ends. Source: ATen/autocast_mode.cpp, `cached_cast`: a leaf, fp32, requires grad, no
    view; anything else is cast each time.
    """

    def __init__(self):
        self._copies: dict[int, tuple[weakref.ref, Tensor]] = {}

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not _kept(tensor):
            return tensor.to(dtype)
        owner, copy = self._copies.get(id(tensor), (None, None))
        if owner is None or owner() is not tensor:
            copy = tensor.to(dtype)
            self._copies[id(tensor)] = weakref.ref(tensor), copy
        return copy

    def clear(self) -> None:
        self._copies.clear()


def _kept(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.requires_grad
        and tensor.is_leaf
        and not tensor._is_view()
        and torch.is_autocast_cache_enabled()
    )


_casts = Casts()
_library: list[torch.library.Library] = []
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_HALF = (torch.float16, torch.bfloat16)


def register(device_type: str) -> None:
    """Once a process: the rules for the device called `device_type`, which is PrivateUse1."""
    if _library:
        return

    def lower(func, args, kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        return _map_tensors(lambda tensor: _casts(tensor, dtype), args, kwargs)

    fallthrough, rules = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallthrough.fallback(torch.library.fallthrough_kernel, KEY)
    for names, rule in (
        (LOWER, lower),
        (WIDE, _widen),
        (WIDE_RESULT, _ask_for_fp32),
        (PROMOTED, _promote),
    ):
        for name in names:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            rules.impl(name, _kernel(func, rule), KEY)
    _library.extend((fallthrough, rules))


def _kernel(func, rule):
    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            args, kwargs = rule(func, args, kwargs)
            return func(*args, **kwargs)

    return kernel


def _map_tensors(change, args, kwargs):
    return tree_map(
        lambda value: change(value) if isinstance(value, Tensor) else value, (args, kwargs)
    )


def _widen(func, args, kwargs):
    return _map_tensors(
        lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor, args, kwargs
    )


def _ask_for_fp32(func, args, kwargs):
    names = [argument.name for argument in func._schema.arguments]
    asked = kwargs.get("dtype") is not None or names.index("dtype") < len(args)
    return args, (
        kwargs if asked or args[0].dtype not in _HALF else {**kwargs, "dtype": torch.float32}
    )


def _promote(func, args, kwargs):
    wide = any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in args)
    return _widen(func, args, kwargs) if wide else (args, kwargs)


@contextmanager
def weight_copies() -> Iterator[None]:
    """Copies are dropped where torch drops its own: when the outermost autocast of a thread ends.

    On a card backward runs in a thread of its own, in which a recomputed block's autocast is the
    outermost: leaving it drops all copies. Here there is one thread, so backward's nesting is
    counted apart.
    """
    before = (
        torch.clear_autocast_cache,
        torch.autocast_increment_nesting,
        torch.autocast_decrement_nesting,
    )
    nesting = [0]

    def in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def enter() -> int:
        nesting[0] += in_backward()
        return nesting[0] if in_backward() else before[1]()

    def leave() -> int:
        nesting[0] -= in_backward()
        return nesting[0] if in_backward() else before[2]()

    def clear() -> None:
        _casts.clear()
        before[0]()

    (
        torch.clear_autocast_cache,
        torch.autocast_increment_nesting,
        torch.autocast_decrement_nesting,
    ) = (clear, enter, leave)
    try:
        yield
    finally:
        _casts.clear()
        (
            torch.clear_autocast_cache,
            torch.autocast_increment_nesting,
            torch.autocast_decrement_nesting,
        ) = before
