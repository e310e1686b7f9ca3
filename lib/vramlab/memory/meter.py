"""The event meter: every storage from birth to death, with who made it, when, and what it was for.

It watches from below autograd with a dispatch mode, so it sees every operation, recomputed and backward ones too. It is
slow, and a mode changes what autograd does in place (corrected here, see `_accumulate`): so it is for bytes only, in a
pass of its own. Bytes inside a kernel, which no operation returns, are not seen.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..observer import Observer
from .modules import Modules

COLUMNS = ("t_s", "step", "event", "storage", "bytes", "live_bytes", "category", "phase", "module", "op", "source")


@dataclass
class _Storage:
    """One storage's life. `span` counts stretches of one phase: born and freed in one is a temporary."""

    serial: int
    bytes: int
    category: str
    phase: str
    module: str
    op: str
    span: int
    host: bool
    survived: bool = False


class Meter(Observer):
    """Collects events while it is entered. Tensors declared before that (`own`) are adopted with phase `init`.

    `host_peak_bytes` is the peak of what was declared to live in host memory; those storages are not in `live_bytes`.
    """

    def __init__(self):
        self._events: list[tuple[float, int, str, _Storage, int, str]] = []
        self._alive: dict[int, _Storage] = {}
        self._phase, self._span, self._step, self._began = "init", 0, 0, time.perf_counter()
        self._place, self._op = "device", ""
        self._modules = Modules()
        self._hooks: list = []
        self._entered = ExitStack()

    # what the trainer says ------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        self._step = step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        self._span += 1
        self._modules.backward = name == "backward"
        yield
        self._phase, self._modules.backward = before, False
        self._span += 1

    @contextmanager
    def region(self, place: str) -> Iterator[None]:
        before, self._place = self._place, place
        yield
        self._place = before

    def own(self, category: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named_tensors:
            record = self._record(tensor, "declared")
            if record.category not in ("weights", "inputs"):
                record.category, record.module = category, name

    def trains(self, named_leaves: Iterable[tuple[str, Tensor]]) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for name, leaf in named_leaves:
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._whole_gradient(name)))

    def _whole_gradient(self, name: str):
        def hook(leaf: Tensor) -> None:
            self.own("gradients", [(name, leaf.grad)])

        return hook

    # what happens ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Meter:
        self._entered.enter_context(_no_garbage_collection())
        self._entered.enter_context(self._modules)
        self._entered.enter_context(_Watch(self))
        return self

    def __exit__(self, *error) -> None:
        self._entered.close()
        self.trains([])

    def _now_in(self) -> str:
        return "recompute" if self._phase == "backward" and self._modules.inside_forward else self._phase

    def saw(self, op: str, outputs) -> None:
        """An operation returned; whatever storage it made begins to live."""
        phase = self._now_in()
        if phase != self._op:  # recompute begins and ends inside backward
            self._op, self._span = phase, self._span + 1
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._record(tensor, op)

    def _record(self, tensor: Tensor, op: str) -> _Storage:
        storage = tensor.untyped_storage()
        record = self._alive.get(storage._cdata)
        if record is None:
            category = "activations" if self._phase == "forward" else "temporaries"
            record = _Storage(len(self._events), storage.nbytes(), category, self._now_in(), self._modules.current(), op,
                              self._span, self._place == "host")
            self._alive[storage._cdata] = record
            weakref.finalize(storage, self._died, storage._cdata)
            self._event("alloc", record, record.bytes)
        elif record.bytes != storage.nbytes():  # resized in place
            self._event("free", record, -record.bytes)
            record.bytes = storage.nbytes()
            self._event("alloc", record, record.bytes)
        return record

    def _died(self, key: int) -> None:
        record = self._alive.pop(key)
        record.survived = record.span != self._span
        self._event("free", record, -record.bytes)

    def _event(self, event: str, record: _Storage, change: int) -> None:
        self._events.append((time.perf_counter() - self._began, self._step, event, record, change, self._now_in()))

    # what came of it ------------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """The timeline: one row an event, in order. Columns: `COLUMNS`. Bytes are integers; `live_bytes` is what lives on
        the device after the event; host storages are rows with category `host` that do not count in it."""
        rows, live = [], 0
        for t_s, step, event, record, change, phase in self._events:
            live += 0 if record.host else change
            rows.append((t_s, step, event, record.serial, record.bytes if change >= 0 else -change, live,
                         self._category(record), phase, record.module, record.op, "meter"))
        return pd.DataFrame(rows, columns=COLUMNS)

    @staticmethod
    def _category(record: _Storage) -> str:
        """By lifetime, for storages nobody declared: made in forward (or recomputed) and kept beyond that stretch is an
        activation; all else is a temporary, gradients on their way to a leaf included."""
        if record.host:
            return "host"
        if record.category not in ("activations", "temporaries"):
            return record.category
        return "activations" if record.survived and record.phase in ("forward", "recompute") else "temporaries"

    def peak(self) -> dict:
        """{peak_bytes, phase, step, categories {category: bytes}, owners [{module, category, op, bytes}, at most 8]} at the
        event with most bytes alive on the device."""
        live = best = at = 0
        for index, (*_, record, change, _) in enumerate(self._events):
            live += 0 if record.host else change
            if live > best:
                best, at = live, index
        alive: Counter = Counter()
        for *_, record, change, _ in self._events[: at + 1]:
            if not record.host:
                alive[record.module, self._category(record), record.op] += change
        categories: Counter = Counter()
        for (_, category, _), size in alive.items():
            categories[category] += size
        owners = [{"module": module, "category": category, "op": op, "bytes": size}
                  for (module, category, op), size in alive.most_common(8) if size > 0]
        _, step, _, _, _, phase = self._events[at]
        return {"peak_bytes": best, "phase": phase, "step": step, "owners": owners,
                "categories": {category: size for category, size in categories.most_common() if size > 0}}

    @property
    def host_peak_bytes(self) -> int:
        live = best = 0
        for *_, record, change, _ in self._events:
            live += change if record.host else 0
            best = max(best, live)
        return best


class _Watch(TorchDispatchMode):
    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = _accumulate(func, args, kwargs or {}) if self._meter._phase == "backward" else None
        outputs = func(*args, **(kwargs or {})) if outputs is None else outputs
        self._meter.saw(str(func), outputs)
        return outputs


def _accumulate(func, args, kwargs) -> Tensor | None:
    """The engine adds two gradients of one tensor in place, when it owns the first; with a mode active it does not. So
    an addition that the engine itself asks for (no Python between it and us) is done in place here."""
    if func is not torch.ops.aten.add.Tensor or kwargs or torch.is_grad_enabled() or not isinstance(args[1], Tensor):
        return None
    if sys._getframe(2).f_code.co_name != "_engine_run_backward":
        return None
    for into, other in (args, args[::-1]):
        same = into.shape == other.shape and into.dtype == other.dtype
        if same and torch._C._storage_Use_Count(into.untyped_storage()._cdata) <= 2 and into.is_contiguous():
            return into.add_(other)
    return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collections inside a step would free cycles at moments that mean nothing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
