"""Autocast on the virtual device: the casts that CUDA's autocast makes, and the cache that keeps
copies of weights alive.

torch has these rules in C++ for the devices it knows; a device made in Python has to register its
own. The lists are those of `ATen/autocast_mode.h` for CUDA, restricted to operations that a
language model could call with floating operands: those for convolutions, recurrent cells and images
are left out. An operation on none of the lists runs as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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
"""Computed in the low type; weights among the operands are cast once, see `_cast`."""
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
"""Computed in fp32."""
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
"""Return an fp32 result, unless the caller passed a type."""
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
"""Computed in the widest type among the operands."""


_copies: dict[int, tuple[weakref.ref, Tensor]] = {}
"""id of a weight -> the weight and its copy in the low type."""
_library: list[torch.library.Library] = []
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_HALF = (torch.float16, torch.bfloat16)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the low type. An fp32 leaf that trains is copied once, and the copy is kept
    until the outermost autocast ends; anything else is cast each time. Source:
    ATen/autocast_mode.cpp, `cached_cast`: a leaf, fp32, requires grad, no view."""
    if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    trains = tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf
    if not trains or tensor._is_view() or not torch.is_autocast_cache_enabled():
        return tensor.to(dtype)
    owner, copy = _copies.get(id(tensor), (None, None))
    if owner is None or owner() is not tensor:
        copy = tensor.to(dtype)
        _copies[id(tensor)] = weakref.ref(tensor), copy
    return copy


def register(device_type: str) -> None:
    """Register the rules for the device called `device_type`, which is PrivateUse1; once a
    process."""
    if _library:
        return

    def lower(func, args, kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        return tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), (args, kwargs))

    fallthrough, rules = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallthrough.fallback(torch.library.fallthrough_kernel, KEY)
    for names, rule in (
        (LOWER, lower),
        (WIDE, _widen),
        (WIDE_RESULT, _request_fp32),
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


def _widen(func, args, kwargs):
    return tree_map_only(
        Tensor, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor, (args, kwargs)
    )


def _request_fp32(func, args, kwargs):
    names = [argument.name for argument in func._schema.arguments]
    has_dtype = kwargs.get("dtype") is not None or names.index("dtype") < len(args)
    if has_dtype or args[0].dtype not in _HALF:
        return args, kwargs
    return args, {**kwargs, "dtype": torch.float32}


def _promote(func, args, kwargs):
    wide = any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in args)
    return _widen(func, args, kwargs) if wide else (args, kwargs)


@contextmanager
def weight_copies() -> Iterator[None]:
    """Drops the copies where torch drops its own: when the outermost autocast of a thread ends.

    On a card backward runs in a thread of its own, in which a recomputed block's autocast is the
    outermost: leaving it drops all copies. The virtual device has one thread, so the nesting of
    autocast in backward is counted separately.
    """
    clear_native = torch.clear_autocast_cache
    enter_native = torch.autocast_increment_nesting
    leave_native = torch.autocast_decrement_nesting
    nesting = 0

    def in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def enter() -> int:
        nonlocal nesting
        nesting += in_backward()
        return nesting if in_backward() else enter_native()

    def leave() -> int:
        nonlocal nesting
        nesting -= in_backward()
        return nesting if in_backward() else leave_native()

    def clear() -> None:
        _copies.clear()
        clear_native()

    with (
        patch.object(torch, "clear_autocast_cache", clear),
        patch.object(torch, "autocast_increment_nesting", enter),
        patch.object(torch, "autocast_decrement_nesting", leave),
    ):
        try:
            yield
        finally:
            _copies.clear()
