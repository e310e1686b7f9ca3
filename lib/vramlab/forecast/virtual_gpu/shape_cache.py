"""A cache of operations' outputs: every block of a model runs the same operations on the same
shapes.

torch's fake tensors find an operation's outputs by running it on `meta` tensors. They cache them
too, but a lookup there takes so long that most of a trace is spent in it. This cache holds only
operations whose outputs follow from their arguments without doubt: those that return new tensors
or views, and those that write into tensors whose shapes stay. Its key is everything that decides a
shape: sizes, strides, types and devices of the tensors, and all other arguments. A view is made
again on the storage of the tensor that is viewed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

Output = tuple[torch.Size, tuple[int, ...], int, torch.dtype, torch.device]
"""Shape, strides, storage offset (in a view from the viewed tensor's on), type and device."""
_UNPREDICTABLE = {
    torch.Tag.inplace_view,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
_OFFSET_DEPENDENT = ("resize", "as_strided")
"""In the names of operations whose outputs may depend on where in its storage a tensor begins."""
_VIEWS = ("view", "views")
_PLAIN = {
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
}
_MOST_CACHED = 1 << 16
_cached: dict[tuple, tuple[Output, ...] | None] = {}
"""Operation and arguments -> outputs, or None where they cannot be reused. For all modes: the next
forecast runs many of the same operations."""


class Shapes:
    """The outputs of the operations of a fake mode."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._kinds: dict[object, str] = {}
        self._attributes: dict[torch.device, dict] = {}

    def outputs(self, func, args, kwargs, work_out: Callable[[], object]) -> object:
        """The outputs of `func`, from the cache, else from `work_out()`."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        key = _key((func, args, kwargs)) if kind else None
        if key is None:
            return work_out()
        cached = _cached.get(key)
        if cached is not None:
            return self._again(kind, cached, args)
        outputs = work_out()
        if len(_cached) >= _MOST_CACHED:
            _cached.clear()
        _cached[key] = _describe(kind, outputs, (func, args, kwargs), key)
        return outputs

    def _again(self, kind: str, cached: tuple[Output, ...], args) -> object:
        if kind == "writes":
            return args[0]
        if kind == "writes, returns nothing":
            return None
        viewed = args[0] if kind in _VIEWS else None
        tensors = [self._tensor(viewed, *output) for output in cached]
        if kind == "new tensors":
            return tuple(tensors)
        return tensors if kind == "views" else tensors[0]

    def _tensor(
        self,
        viewed: Tensor | None,
        shape,
        stride,
        offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FakeTensor:
        meta = torch.empty_strided(
            shape if viewed is None else (0,) * len(shape), stride, dtype=dtype, device="meta"
        )
        if viewed is not None:
            meta.set_(viewed.untyped_storage(), viewed.storage_offset() + offset, shape, stride)
        return self._fake(meta, device)

    def alias(self, of: FakeTensor) -> FakeTensor:
        """Another tensor of the same storage, shape and strides."""
        return self._tensor(of, of.shape, of.stride(), 0, of.dtype, of.fake_device)

    def _fake(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """A fake tensor. torch sets a dozen attributes of each; those of the first tensor on a
        device are copied to the others, for which they are the same."""
        attributes = self._attributes.get(device)
        if attributes is None:
            fake = FakeTensor(self._mode, meta, device)
            self._attributes[device] = dict(vars(fake))
            return fake
        fake = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(attributes)
        return fake


def _kind(func) -> str:
    """What the operation does with storages; "" where its outputs may not be cached."""
    if (
        not isinstance(func, torch._ops.OpOverload)
        or _UNPREDICTABLE & set(func.tags)
        or any(word in func.name() for word in _OFFSET_DEPENDENT)
    ):
        return ""
    returns, arguments = func._schema.returns, func._schema.arguments
    types = [str(result.type) for result in returns]
    if func.is_view and types == ["List[Tensor]"]:
        return "views"
    if types != ["Tensor"] * len(types):
        return ""
    if func._schema.is_mutable:
        if not returns:
            return "writes, returns nothing"
        into_first = str(arguments[0].type) == "Tensor" and arguments[0].is_write
        return "writes" if len(returns) == 1 and into_first and "set_" not in func.name() else ""
    # _unsafe_view shares its operand's storage, which its schema denies
    if len(returns) == 1 and (func.is_view or func is torch.ops.aten._unsafe_view.default):
        return "view"
    if not returns or any(result.alias_info for result in returns):
        return ""
    return "new tensor" if len(returns) == 1 else "new tensors"


class _Unknown(Exception):
    """An argument that may decide a shape in more ways than the key has."""


def _key(call: tuple) -> tuple | None:
    """A call of an operation as a hashable key; None where more may decide a shape."""
    try:
        return _key_of(call)
    except _Unknown:
        return None


def _key_of(value):
    """Everything about an argument that decides the shape of an output, hashable. Where in its
    storage a tensor begins decides only where views of it begin, and those are cached relative to
    it. Raises: _Unknown."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided:
            raise _Unknown
        return value.shape, value.stride(), value.dtype, value._fake_device
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or isinstance(value, list | tuple):
        return tuple(map(_key_of, value))
    if kind is dict:
        return _key_of([*value.items()]) if value else None
    if kind is torch.Generator:
        return kind
    raise _Unknown


def _describe(kind: str, outputs, call: tuple, key: tuple) -> tuple[Output, ...] | None:
    """How to make `outputs` again; None where they are neither new memory nor views of the first
    argument, or where a tensor that was written has another shape now."""
    if kind.startswith("writes"):
        return () if _key(call) == key else None
    tensors: list[Any] = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if any(type(tensor) is not FakeTensor for tensor in tensors):
        return None
    viewed: Any = call[1][0] if kind in _VIEWS and call[1] else None
    if kind in _VIEWS:
        good = isinstance(viewed, FakeTensor) and all(_views(tensor, viewed) for tensor in tensors)
    else:
        operands = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        storages = [tensor.untyped_storage()._cdata for tensor in (*operands, *tensors)]
        fresh = len(set(storages)) == len(set(storages[: len(operands)])) + len(tensors)
        good = fresh and all(_fills_its_storage(tensor) for tensor in tensors)
    if not good:
        return None
    start = viewed.storage_offset() if kind in _VIEWS else 0
    return tuple(
        (
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset() - start,
            tensor.dtype,
            tensor.fake_device,
        )
        for tensor in tensors
    )


def _views(tensor: Tensor, viewed: FakeTensor) -> bool:
    """Whether `tensor` is a view of `viewed` with elements of the same size."""
    return (
        tensor.untyped_storage()._cdata == viewed.untyped_storage()._cdata
        and tensor.dtype.itemsize == viewed.dtype.itemsize
    )


def _fills_its_storage(tensor: FakeTensor) -> bool:
    """Whether the tensor's storage has as many bytes as its sizes and strides need."""
    if tensor.constant is not None or tensor.layout is not torch.strided or tensor.storage_offset():
        return False
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    needed = 1 + sum((size - 1) * stride for size, stride in extents) if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() == needed * tensor.dtype.itemsize
