"""Which module is running, forward and backward, without touching a gradient.

Forward: global module hooks keep a stack. Backward: autograd numbers its nodes in the order in
which forward made them, so the numbers between a module's entry and exit are that module's, and the
node that runs now belongs to the module of its number.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..observer import recomputing

_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


def common(name: str, other: str) -> str:
    """The name of a storage that holds two tensors: the innermost module that both are in."""
    if name == other:
        return name
    same = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False)
    )
    return ".".join(part for part, _ in same)


class Modules:
    """Entered around a run. `current()` names the innermost module; `""` is the model itself or no
    module. `on_edge` is called whenever a module's forward begins or ends."""

    def __init__(self, on_edge: Callable[[], object] = lambda: None):
        self._on_edge, self.backward = on_edge, False
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._edges: list[int] = []  # sequence number from which on ...
        self._owners: list[str] = []  # ... nodes belong to this module
        self._handles: list = []

    def __enter__(self) -> Modules:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            # always: early stop leaves a recomputed module by an exception
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def current(self) -> str:
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node() if self.backward else None
        if node is None:
            return ""
        at = bisect.bisect_right(self._edges, node._sequence_nr()) - 1
        owner = self._owners[at] if at >= 0 else ""
        # a recomputed block's own hooks do not run, and the node may be any of the block's
        block = _BLOCK.match(owner) if recomputing else None
        return block.group() if block else owner

    def _enter(self, module: nn.Module, args) -> None:
        # a root, or a module made since: names are relative to the outermost module
        if id(module) not in self._names:
            for name, child in module.named_modules():
                self._names.setdefault(id(child), name)
        self._stack.append(self._names[id(module)])
        self._edge()

    def _leave(self, module: nn.Module, args, output) -> None:
        self._stack.pop()
        self._edge()

    def _edge(self) -> None:
        self._edges.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._stack[-1] if self._stack else "")
        self._on_edge()
