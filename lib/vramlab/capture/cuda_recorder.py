"""The recorder: on CUDA what the meter is on a CPU, but out of the way of the run: torch's own
allocator history does the work.

    with Recorder() as recorder:                     # before the model exists
        trainer = Trainer(model, regime, schedule, device="cuda", observer=recorder)
        trainer.step(batches)
    recorder.frame(), recorder.peak(), recorder.peaks, recorder.notes

No dispatch mode is entered, because a mode changes what autograd allocates; no stack is recorded,
and nothing synchronizes inside a step. The cost for a step is a short string that is set at each
phase edge, module edge and declaration. Source: torch/cuda/memory.py of torch 2.11 to 2.13
(`_record_memory_history`, `_set_memory_metadata`, `_snapshot`). Not yet run on a GPU: tested with a
history of the same format that our own simulator keeps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, UntypedStorage

from ..observer import GradientsToo, recomputing
from ..regimes.sharded import local
from ..timeline import events as timeline
from .dispatch import no_garbage_collection, resizes
from .kernels import matrix_workspace_bytes
from .meter import Meter
from .modules import Modules
from .recording import PREFIX, Recording

MAX_ENTRIES = 1_000_000
"""Of the history; without stacks an entry takes some 200 bytes of host memory. A step of a 7B has
about 30,000."""


class CudaHistory:
    """torch's allocator history. `device`: a CUDA device, by default the current one. Raises:
    ValueError, where torch sees no GPU."""

    device_type = "cuda"

    def __init__(self, device: str | torch.device = "cuda"):
        if not torch.cuda.is_available():
            raise ValueError(
                "the recorder needs CUDA, and torch sees none here (`vramlab doctor` says why): "
                "on a CPU use vramlab.capture.meter.Meter"
            )
        index = torch.device(device).index
        self.device = torch.cuda.current_device() if index is None else index
        self._set: Any = getattr(torch.cuda.memory, "_set_memory_metadata", None)
        self.keeps_metadata = self._set is not None and hasattr(torch._C, "_cuda_setMemoryMetadata")
        self.workspace_bytes = matrix_workspace_bytes(torch.cuda.get_device_capability(self.device))

    def start(self, max_entries: int) -> None:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(self.device)
        torch.cuda.memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=max_entries, clear_history=True
        )

    def mark(self, text: str) -> None:
        self._set(text)

    def address(self, storage: UntypedStorage) -> int:
        return storage.data_ptr()

    def peaks(self) -> dict[str, int]:
        """Peaks since the last call; counts since the process began. Does not synchronize."""
        stats = torch.cuda.memory_stats(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {
            "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
            "reserved_peak_bytes": stats["reserved_bytes.all.peak"],
            "num_alloc_retries": stats["num_alloc_retries"],
            "num_ooms": stats["num_ooms"],
        }

    def look(self) -> dict:
        return torch.cuda.memory._snapshot(self.device)

    def stop(self) -> dict:
        # the history of a device that is lost is the host's, and can still be read
        with suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
        raw = self.look()
        torch.cuda.memory._record_memory_history(None)
        if self.keeps_metadata:
            self._set("")
        return raw


class Recorder(GradientsToo):
    """Records while it is entered, once; enter it before the model is made. `max_entries` bounds
    the history: of a longer run its end is kept, and `notes` says so. Leaving by an error, out of
    memory included, keeps what was recorded. `history`: torch's by default."""

    def __init__(
        self,
        device: str | torch.device = "cuda",
        max_entries: int = MAX_ENTRIES,
        history: CudaHistory | None = None,
    ):
        super().__init__()
        self._history = history or CudaHistory(device)
        self._max_entries = max_entries
        self._marks: list[tuple[int, str, str, int, int]] = []
        self._declared: list[tuple[int, int, str, str]] = []
        self._clock: list[tuple[int, float]] = []
        self._step, self._phase, self._span = 0, "init", 0
        self._modules = Modules(self._mark)
        self._resizable: dict[int, tuple[str, str]] = {}
        self._entered = ExitStack()
        self.peaks: list[dict] = []
        """One dict for each step, torch's own figures: `step` (-1: before the first),
        `allocated_peak_bytes`, `reserved_peak_bytes` within it, and `num_alloc_retries`, `num_ooms`
        so far."""
        self.notes: list[str] = []
        """What a reader of the figures has to know, in sentences."""

    # what the trainer says ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        self._take_peaks(-1)
        self._step = step
        self._read_clocks()
        self._mark()

    def end_step(self) -> None:
        self._take_peaks(self._step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._phase
        self._edge(name)
        yield
        self._edge(before)

    def own(self, category: str, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        mark = len(self._marks) - 1
        for name, tensor in named_tensors:
            tensor = local(tensor)
            if tensor.device.type == self._history.device_type:
                self._declare(mark, tensor.untyped_storage(), category, name)
        self._mark()  # what is allocated from now on is something else, even at the same address

    def _declare(self, mark: int, storage: UntypedStorage, category: str, name: str) -> None:
        if address := self._history.address(storage):
            self._declared.append((mark, address, category, name))
        if category == "collectives":
            self._resizable[storage._cdata] = category, name

    def _resized(self, storage: UntypedStorage) -> None:
        """Gathered weights live in storages that are emptied and filled again, and then have
        another address."""
        if storage.nbytes() and storage._cdata in self._resizable:
            self._declare(len(self._marks) - 1, storage, *self._resizable[storage._cdata])
            self._mark()

    # marks ----------------------------------------------------------------------------------------

    def _edge(self, phase: str) -> None:
        self._phase, self._span = phase, self._span + 1
        self._modules.backward = phase == "backward"
        self._mark()

    def _mark(self) -> None:
        phase = "recompute" if recomputing and self._phase == "backward" else self._phase
        stack = self._modules._stack
        self._marks.append(
            (self._step, phase, stack[-1] if stack else "", self._span, time.time_ns() // 1000)
        )
        if self._history.keeps_metadata:
            self._history.mark(f"{PREFIX}{len(self._marks) - 1}")

    def _read_clocks(self) -> None:
        before, time_ns, after = time.perf_counter(), time.time_ns(), time.perf_counter()
        self._clock.append((time_ns // 1000, (before + after) / 2))

    def _take_peaks(self, step: int) -> None:
        if step >= 0 or not self.peaks:
            self.peaks.append({"step": step, **self._history.peaks()})

    # beginning and end ----------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._history.start(self._max_entries)
        self._read_clocks()
        self._mark()
        self._entered.enter_context(no_garbage_collection())
        self._entered.enter_context(self._modules)
        self._entered.enter_context(resizes(self._resized))
        recomputing.listeners.append(self._mark)
        self._entered.callback(recomputing.listeners.remove, self._mark)
        return self

    def __exit__(self, *error) -> None:
        self._entered.close()
        self.trains([])
        self._take_peaks(self._step if error[0] else -1)
        self._read_clocks()
        self._raw = self._history.stop()
        self.recording = self._read(self._raw)
        self._look_back()

    def _read(self, raw: dict) -> Recording:
        document = {
            "marks": self._marks,
            "declared": self._declared,
            "clock": self._clock,
            "workspace_bytes": self._history.workspace_bytes,
            "source": getattr(self._history, "source", "recorder"),
        }
        return Recording.of(raw, self._history.device, document)

    def so_far(self) -> pd.DataFrame:
        """The timeline up to now, while it is still recorded: for a step that ran out of memory and
        has not unwound yet."""
        self._read_clocks()
        return self._read(self._history.look()).frame()

    def _look_back(self) -> None:
        if len(self.recording.snapshot.events) >= self._max_entries or self.recording.before:
            self.notes.append(
                f"the history holds the last {self._max_entries:,} entries or began after the first"
                f" tensor: {self.recording.before} storages are older than it, so nothing is known"
                " of their allocation"
            )
        if not self._history.keeps_metadata:
            self.notes.append(
                "this torch keeps no metadata with allocations: phases are assigned by time, exact"
                " to microseconds"
            )

    # what came of it ------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """See `Recording.frame`."""
        return self.recording.frame()

    def peak(self, step: int | None = None) -> dict:
        """As `Meter.peak`, of requested bytes."""
        return timeline.peak_owners(self.frame(), step)

    def result(self) -> dict[str, int]:
        """torch's own figures of the whole recording: `allocated_peak_bytes`,
        `reserved_peak_bytes`, `num_alloc_retries`, `num_ooms`."""
        return {
            name: max(peak[name] for peak in self.peaks) for name in self.peaks[0] if name != "step"
        }

    host_peak_bytes = None
    """The device's history does not have the host's bytes."""

    def write(self, folder: Path) -> None:
        """Write the recording for `recording.read_recording`."""
        self.recording.write(folder, self._raw)


def watching(device: str) -> Recorder | Meter:
    """The observer that sees every storage of a run on `device`. Both kinds are entered around the
    run and have `frame`, `peak` and `host_peak_bytes`."""
    return Recorder(device) if device.startswith("cuda") else Meter()
