"""What comes out of an operation, remembered: a step asks the same of the same shapes in every
block.

torch's fake tensors work out an operation's output by running it on `meta` tensors, and keep the
answer too, but ask so much to find it again that most of a trace is spent there. Here only what
leaves no doubt is kept: an operation whose outputs are new tensors, or that writes into tensors
whose shapes stay, seen once with everything that decides a shape: sizes, strides, types and devices
of the tensors, and all else it was given. A view is made again on the storage it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

Made = tuple[torch.Size, tuple[int, ...], int, torch.dtype, torch.device]
_DOUBTFUL = {
    torch.Tag.inplace_view,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}


_KNOWN: dict[tuple, tuple[Made, ...] | None] = {}
"""What was asked -> what came of it, for all modes: the next forecast asks much of the same."""
_MOST_KNOWN = 1 << 16


class Shapes:
    """The outputs of one fake mode's operations by what they were asked; `hits` counts what was
    found again."""

    def __init__(self, mode: FakeTensorMode):
        self._mode, self.hits = mode, 0
        self._kinds: dict[object, str] = {}
        self._like: dict[torch.device, dict] = {}

    def outputs(self, func, args, kwargs, work_out: Callable[[], object]) -> object:
        """What `func` gives, by memory, else by `work_out()`."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        key = _key((func, args, kwargs)) if kind else None
        if key is None:
            return work_out()
        found = _KNOWN.get(key)
        if found is not None:
            self.hits += 1
            return self._again(kind, found, args)
        made = work_out()
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _description(kind, made, (func, args, kwargs), key)
        return made

    def _again(self, kind: str, found: tuple[Made, ...], args) -> object:
        if kind == "writes":
            return args[0]
        if kind == "writes, gives nothing":
            return None
        made = [self._tensor(args[0] if kind in _VIEWS else None, *one) for one in found]
        return tuple(made) if kind == "makes some" else made if kind == "views, some" else made[0]

    def _tensor(
        self,
        viewed: Tensor | None,
        shape,
        stride,
        offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FakeTensor:
        bare = torch.empty_strided(
            shape if viewed is None else (0,) * len(shape), stride, dtype=dtype, device="meta"
        )
        if viewed is not None:
            bare.set_(viewed.untyped_storage(), viewed.storage_offset() + offset, shape, stride)
        return self._fake(bare, device)

    def alias(self, of: FakeTensor) -> FakeTensor:
        """Another tensor of the same storage, shape and strides."""
        return self._tensor(of, of.shape, of.stride(), 0, of.dtype, of.fake_device)

    def _fake(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """As torch makes it, which asks and writes a dozen things that are the same for all; these
        are copied from its first."""
        like = self._like.get(device)
        if like is None:
            made = FakeTensor(self._mode, bare, device)
            self._like[device] = dict(vars(made))
            return made
        made = Tensor._make_subclass(
            FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(like)
        return made


def _kind(func) -> str:
    """What remembering has to do; "" where nothing may be remembered."""
    if (
        not isinstance(func, torch._ops.OpOverload)
        or _DOUBTFUL & set(func.tags)
        or any(x in func.name() for x in _BY_PLACE)
    ):
        return ""
    returns, arguments = func._schema.returns, func._schema.arguments
    if func.is_view and [str(given.type) for given in returns] == ["List[Tensor]"]:
        return "views, some"
    if any(str(given.type) != "Tensor" for given in returns):
        return ""
    if not func._schema.is_mutable:
        plain = {0: "", 1: "makes one"}.get(len(returns), "makes some")
        viewing = (
            func.is_view or func is torch.ops.aten._unsafe_view.default
        )  # which shares its operand's storage and denies it
        return (
            "views"
            if viewing and len(returns) == 1
            else ""
            if any(given.alias_info for given in returns)
            else plain
        )
    if not returns:
        return "writes, gives nothing"
    written = len(returns) == 1 and str(arguments[0].type) == "Tensor" and arguments[0].is_write
    return "writes" if written and "set_" not in func.name() else ""


_VIEWS = ("views", "views, some")
_BY_PLACE = ("resize", "as_strided")
"""Names of operations that may ask where in its storage a tensor begins."""


class _Unknown(Exception):
    pass


def _key(given: tuple) -> tuple | None:
    """What was given, as something that can be looked up; None where more may decide a shape."""
    try:
        return _asked(given)
    except _Unknown:
        return None


def _asked(value):
    """What decides the shape of what comes out, as something that can be looked up. Where in its
    storage a tensor begins decides only where views of it begin, which are remembered from there
    on. Raises: _Unknown."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided:
            raise _Unknown
        return value.shape, value.stride(), value.dtype, value._fake_device
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or isinstance(value, list | tuple):
        return tuple(map(_asked, value))
    if kind is dict:
        return _asked([*value.items()]) if value else None
    if kind is torch.Generator:
        return kind
    raise _Unknown


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


def _description(kind: str, made, given: tuple, key: tuple) -> tuple[Made, ...] | None:
    """How to make the like of `made` again; None where it is not plain new memory or a plain view,
    or where what was written has another shape now."""
    if kind.startswith("writes"):
        return () if _key(given) == key else None
    tensors = [made] if isinstance(made, Tensor) else list(made)
    before = {
        tensor.untyped_storage()._cdata
        for tensor in tree_leaves(given)
        if isinstance(tensor, Tensor)
    }
    start = 0
    if kind in _VIEWS:
        first = given[1][0] if given[1] else None
        good = isinstance(first, FakeTensor) and all(_part(tensor, first) for tensor in tensors)
        start = first.storage_offset() if good else 0
    else:
        good = all([_plain(tensor, before) for tensor in tensors])
    if not good or any(type(tensor) is not FakeTensor for tensor in tensors):
        return None
    return tuple(
        (one.shape, one.stride(), one.storage_offset() - start, one.dtype, one.fake_device)
        for one in tensors
    )


def _part(tensor: Tensor, of: FakeTensor) -> bool:
    """Whether it is a view that counts bytes as `of` does."""
    return (
        tensor.untyped_storage()._cdata == of.untyped_storage()._cdata
        and tensor.dtype.itemsize == of.dtype.itemsize
    )


def _plain(tensor, before: set[int]) -> bool:
    """Whether it has memory of its own, no more than its sizes and strides need."""
    if (
        type(tensor) is not FakeTensor
        or tensor.constant is not None
        or tensor.layout is not torch.strided
    ):
        return False
    storage = tensor.untyped_storage()
    needed = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    new = storage._cdata not in before and tensor.storage_offset() == 0
    before.add(storage._cdata)
    return new and storage.nbytes() == (needed if tensor.numel() else 0) * tensor.dtype.itemsize
