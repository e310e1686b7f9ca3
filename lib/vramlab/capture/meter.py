"""The event meter: every storage from its allocation to its release, with the operation and module
that made it, the phase, and its category.

It watches from below autograd with a dispatch mode (`dispatch`), so it sees every operation,
recomputed and backward ones too, on real tensors and on fake ones. It is slow: use it for bytes
only, in a pass of its own. Not seen: bytes inside a kernel, which no operation returns;
`Workspaces` adds what is known of them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..observer import GradientsToo, recomputing
from ..regimes.sharded import local
from ..timeline import events as timeline
from .dispatch import Watch, no_garbage_collection, propagation_unseen, resizes, watching
from .kernels import Workspaces
from .modules import Modules, common
from .work import Work

COLUMNS = (
    "t_s",
    "step",
    "event",
    "storage",
    "stream",
    "bytes",
    "live_bytes",
    "category",
    "phase",
    "module",
    "op",
    "source",
)
TEXT = ("event", "category", "phase", "module", "op", "source")
"""The columns of text. They are kept as Python strings, because their readers go row by row."""


@dataclass
class _Storage:
    """The life of a storage. `span` counts stretches of the same phase: a storage that is made and
    freed in the same stretch is a temporary."""

    serial: int
    bytes: int
    category: str
    phase: str
    module: str
    op: str
    span: int
    host: bool
    stream: int
    survived: bool = False


class _Death(weakref.ref):
    """Called when a storage dies; `key` is its address, which is unique among living storages only
    and is dropped then."""

    __slots__ = ("key",)
    key: int


class Meter(GradientsToo):
    """Collects events while it is entered, once. Tensors that are declared before (`own`) are
    adopted with phase `init`.

    `device_type` names a device other than the CPU: storages elsewhere are then host memory, as
    are those declared so. `host_peak_bytes` is their peak; they are not in `live_bytes`.
    `workspaces` adds what kernels take, `work` counts what operations compute and move. `stream`
    returns the stream on which storages are made now, each with its own pool in the allocator; 0 is
    the default stream.
    """

    def __init__(
        self,
        device_type: str | None = None,
        workspaces: Workspaces | None = None,
        work: Work | None = None,
        stream: Callable[[], int] = lambda: 0,
    ):
        super().__init__()
        self._events: list[tuple[float, int, str, int, int, str, int]] = []
        self._storages: list[_Storage] = []
        self._alive: dict[int, _Storage] = {}
        self._deaths: dict[int, _Death] = {}
        self._names: dict = {}
        self._phase, self._span, self._step, self._began = "init", 0, 0, time.perf_counter()
        self._place, self._last_phase = "device", ""
        self._device_type, self._stream = device_type, stream
        self._workspaces, self._work = workspaces, work
        self._modules = Modules()
        self._entered = ExitStack()
        self.chunk_turns: list[tuple[int, Any, int, int]] = []
        """(number of events before it, cut, tokens, turn) of each call of `begin_chunk`."""

    # what the trainer says ------------------------------------------------------------------------

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
            record = self._record(local(tensor), "declared")
            if record.category not in ("weights", "inputs"):
                record.module = common(record.module, name) if record.category == category else name
                record.category = category

    def begin_chunk(self, cut: Any, tokens: int, turn: int) -> None:
        self.chunk_turns.append((len(self._events), cut, tokens, turn))

    # what happens ---------------------------------------------------------------------------------

    def __enter__(self) -> Meter:
        self._entered.enter_context(no_garbage_collection())
        self._entered.enter_context(self._modules)
        self._entered.enter_context(resizes(self._resized))
        self._entered.enter_context(propagation_unseen())
        self._entered.enter_context(watching(Watch(self.saw, lambda: self._phase == "backward")))
        return self

    def __exit__(self, *error) -> None:
        self._entered.close()
        self.trains([])
        # what dies later dies with the program's variables, not by the regime
        self._deaths.clear()
        self._alive.clear()

    def _now_in(self) -> str:
        return "recompute" if recomputing and self._phase == "backward" else self._phase

    def saw(self, func, args, outputs) -> None:
        """Called when an operation has returned: every new storage among its outputs begins to
        live."""
        phase = self._now_in()
        if phase != self._last_phase:  # recompute begins and ends inside backward
            self._last_phase, self._span = phase, self._span + 1
        op = self._names.get(func) or self._names.setdefault(func, str(func))
        for tensor in (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs):
            # a wrapper has no bytes of its own
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._record(tensor, op)
        if self._workspaces is not None:
            self._take_workspace(self._workspaces, func, args, op)
        if self._work is not None:
            self._work.count(self._step, phase, func, args, outputs, self._known)

    def _known(self, tensor: Tensor) -> _Storage:
        return self._record(tensor, "found")

    def _take_workspace(self, workspaces: Workspaces, func, args, op: str) -> None:
        """Record what the kernel that has just run took: for good, or while it ran."""
        kept_bytes, scratch_bytes = workspaces.taken(func, args, self._phase == "backward")
        if kept_bytes:
            self._born(kept_bytes, "workspace", op, host=False)
        if scratch_bytes:
            scratch = self._born(scratch_bytes, "workspace", op, host=False)
            self._event("free", scratch, -scratch_bytes)

    def _record(self, tensor: Tensor, op: str) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        record = self._alive.get(key)
        if record is None:
            elsewhere = self._device_type is not None and tensor.device.type != self._device_type
            category = "activations" if self._phase == "forward" else "temporaries"
            record = self._alive[key] = self._born(
                storage.nbytes(), category, op, elsewhere or self._place == "host"
            )
            death = self._deaths[key] = _Death(storage, self._died)
            death.key = key
        elif record.bytes != storage.nbytes():
            self._resized(storage)
        return record

    def _born(self, size: int, category: str, op: str, host: bool) -> _Storage:
        record = _Storage(
            len(self._events),
            size,
            category,
            self._now_in(),
            self._modules.current(),
            op,
            self._span,
            host,
            self._stream(),
        )
        self._storages.append(record)
        self._event("alloc", record, size)
        return record

    def _resized(self, storage: UntypedStorage) -> None:
        record = self._alive.get(storage._cdata)
        if record is not None and record.bytes != storage.nbytes():
            self._event("free", record, -record.bytes)
            record.bytes, record.stream = storage.nbytes(), self._stream()
            self._event("alloc", record, record.bytes)

    def _died(self, death: _Death) -> None:
        del self._deaths[death.key]
        record = self._alive.pop(death.key)
        record.survived = record.span != self._span
        self._event("free", record, -record.bytes)

    def _event(self, event: str, record: _Storage, change: int) -> None:
        self._events.append(
            (
                time.perf_counter() - self._began,
                self._step,
                event,
                record.serial,
                change,
                self._now_in(),
                record.stream,
            )
        )

    # what came of it ------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """The timeline: one row for each event, in order. Columns: `COLUMNS`. Bytes are integers;
        `live_bytes` is what lives on the device after the event; host storages are rows with
        category `host` that do not count in it."""
        t_s, step, event, serial, change, phase, stream = (
            zip(*self._events, strict=True) if self._events else [()] * 7
        )
        change = np.array(change, np.int64)
        storage = np.searchsorted([record.serial for record in self._storages], serial)

        def of_storage(values: Iterable, dtype: type = object) -> np.ndarray:
            return np.array(list(values), dtype)[storage]

        host = of_storage((record.host for record in self._storages), bool)
        columns = {
            "t_s": t_s,
            "step": step,
            "event": event,
            "storage": serial,
            "stream": stream,
            "bytes": abs(change),
            "live_bytes": np.where(host, 0, change).cumsum(),
            "category": of_storage(map(self._category, self._storages)),
            "phase": phase,
            "module": of_storage(record.module for record in self._storages),
            "op": of_storage(record.op for record in self._storages),
            "source": ["meter"] * len(storage),
        }
        kinds = {"t_s": float, **dict.fromkeys(TEXT, object)}
        return pd.DataFrame(
            {name: pd.Series(columns[name], dtype=kinds.get(name, np.int64)) for name in COLUMNS}
        )

    @staticmethod
    def _category(record: _Storage) -> str:
        if record.host:
            return "host"
        declared = record.category not in ("activations", "temporaries")
        return record.category if declared else timeline.by_lifetime(record.phase, record.survived)

    def peak(self, step: int | None = None) -> dict:
        """{peak_bytes, phase, step, categories {category: bytes}, owners [{module, category, op,
        bytes}, at most 8]} at the event with most bytes alive on the device, of a step or of
        all."""
        return timeline.peak_owners(self.frame(), step)

    def work(self, step: int) -> dict[str, dict]:
        """phase -> what a step computed and moved, see `Work.of_step`; nothing without `work`."""
        if self._work is None:
            return {}
        kept = {
            record.serial
            for record in self._storages
            if record.survived
            or self._category(record) not in ("activations", "temporaries", "workspace")
        }
        return self._work.of_step(step, kept.__contains__)

    @property
    def host_peak_bytes(self) -> int:
        return timeline.host_peak_bytes(self.frame())
