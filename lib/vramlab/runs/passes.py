"""The memory passes of a run: `meter` records every event, and `measured`, in a process of its own,
the peak that the operating system sees."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import torch

from .. import machine
from ..capture.cuda_recorder import Recorder, watching
from ..capture.memory_limit import Ceiling
from ..capture.nvml import find
from ..capture.nvml_sampler import Sampler
from ..capture.peak_rss import peak_window
from ..observer import Observer
from ..regimes.place.place import Fsdp, alone
from ..regimes.regime import Regime
from ..regimes.trains.adapters import link
from ..timeline import events as timeline
from ..timeline.byte_ledger import Ledger, ledger, sample_at
from ..timeline.sides import sides
from ..training.trainer import Batch, Trainer
from .parameters import resolve
from .preparation import Prepared, prepare


@dataclass(frozen=True)
class Metered:
    """What the metered pass recorded."""

    events: pd.DataFrame
    """One row for each allocation and release."""
    result: dict
    """The peak, its owners and the ledger."""


def limited(device: str, limit_bytes: int) -> Ceiling | None:
    """Give `device` so many bytes for its allocator; 0: all that there is. A GPU is limited for the
    whole process; on a CPU the meter that is returned stands for a device with an end."""
    if limit_bytes and device.startswith("cuda"):
        fraction = min(1.0, limit_bytes / torch.cuda.get_device_properties(device).total_memory)
        # torch refuses "cuda" here: it takes the number of a GPU, or None for the current one
        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device).index)
    return Ceiling(limit_bytes) if limit_bytes and device == "cpu" else None


def meter(prepared: Prepared) -> Metered:
    """The longest step of the first 50, twice for each part, again, on a fresh copy, under the
    event meter, or on CUDA with the allocator's history recorded. This is slower than training:
    only its bytes count. Raises: RanOut, where a run on a CPU exceeds its limit.
    """
    device, limit_bytes = prepared.params["device"], int(prepared.params["limit_mib"] * 2**20)
    watcher = limited(device, limit_bytes) or watching(device)
    sampler = Sampler(find(prepared.params["device"]))
    with ExitStack() as stack:
        stack.enter_context(sampler)
        if isinstance(watcher, Recorder):  # a history begins before the model exists
            stack.enter_context(watcher)
        model = copy.deepcopy(prepared.model)
        trainer = prepared.trainer(_watched(prepared.regime), model, watcher)
        batches = _longest(prepared)
        cut, crossed = link(trainer.model), {}
        if not isinstance(watcher, Recorder):  # a meter adopts the tensors that exist
            stack.enter_context(watcher)
        _few_steps(trainer, batches)
        if cut:
            cut.read()
            trainer.step(batches)
            crossed = cut.read()
    peak = watcher.peak()
    result = {
        "peak": peak,
        "memory_ledger": peak["categories"],
        "host_bytes": watcher.host_peak_bytes,
        "optimizer_state_bytes": trainer.optimizer_state_bytes(),
    }
    frame = watcher.frame()
    if isinstance(watcher, Recorder):
        result["recorder"] = {
            **watcher.result(),
            "steps": watcher.peaks,
            "said": [*watcher.notes, *sampler.notes],
        }
        before_bytes = watcher.recording.reserved_before_bytes
        result["ledger"] = device_ledger(frame, before_bytes, sampler.frame()).to_json()
    if crossed:
        result["sides"] = sides(frame, trainer.steps_done - 1, prepared.regime.trains.cut, crossed)
    return Metered(frame, result)


def device_ledger(frame: pd.DataFrame, reserved_before_bytes: int, samples: pd.DataFrame) -> Ledger:
    """The ledger at a recording's peak. Its context is the memory of the process beyond the
    allocator's segments at the first sample, which is taken before the recording's first tensor;
    None where the driver does not report the memory of a process.
    """
    first = samples["process_bytes"].iloc[0] if len(samples) else None
    context_bytes = None if first is None or pd.isna(first) else int(first) - reserved_before_bytes
    at = timeline.peak_event(frame)
    return ledger(
        frame,
        at,
        sample=sample_at(samples, frame["t_s"].iloc[at]),
        context_bytes=context_bytes,
        context_source="before the recording's first tensor",
    )


def measured(params: Mapping) -> dict:
    """The peak of the same steps as the operating system sees it. Called in a process of its own
    whose allocator returns freed memory at once.

    The window opens before the model exists, so that the peak includes the weights. A small model
    goes through the same regime first: thread pools, oneDNN's caches and late imports are not the
    regime's bytes.
    """
    prepared = prepare(resolve(params), progress=False)
    batches = _longest(prepared)
    with alone(prepared.regime.place):
        _warm_up(prepared, batches)
        with peak_window() as peak:
            trainer = prepared.trainer(
                _watched(prepared.regime), copy.deepcopy(prepared.model), Observer()
            )
            _few_steps(trainer, batches)
    return {
        "peak_bytes": peak.delta_bytes,
        "baseline_bytes": peak.baseline_bytes,
        "method": peak.method,
    }


def _longest(prepared: Prepared) -> list[Batch]:
    """The batches of the run's largest step among its first 50, which decides whether it fits."""
    first = itertools.islice(prepared.batches(), min(50, prepared.params["steps"]))
    return max(first, key=lambda batches: max(batch["input_ids"].numel() for batch in batches))


def _watched(regime: Regime) -> Regime:
    """The same regime with turns of two steps at most, and steps of every kind soon, so that every
    part and kind can be seen: its peak is the largest one's."""
    regime = dataclasses.replace(regime, grads=regime.grads.with_short_cycle())
    if not hasattr(regime.trains, "interval"):
        return regime
    return dataclasses.replace(
        regime, trains=dataclasses.replace(regime.trains, interval=min(2, regime.trains.interval))
    )


def _few_steps(trainer: Trainer, batches: list[Batch]) -> None:
    """Two steps for every part: the first creates its optimizer state, the second runs with it.
    Parts that change at every step have their second step in the next round."""
    for _ in range(2 * max(1, len(trainer.parts))):
        trainer.step(batches)


def _warm_up(prepared: Prepared, batches: list[Batch]) -> None:
    config = copy.deepcopy(prepared.model.config)
    config.num_hidden_layers = min(3, config.num_hidden_layers)  # two to draw from, or a cut
    small = type(prepared.model)(config)
    _few_steps(prepared.trainer(_watched(prepared.regime), small, Observer()), batches)


def notes(prepared: Prepared) -> list[str]:
    """Sentences that a reader of the run's figures has to know."""
    on_cpu, values = prepared.params["device"] == "cpu", prepared.regime.values
    driver = "" if on_cpu else ", the driver asked every 30 ms from beside"
    sentences = [
        f"speed: learning pass, nothing watching{driver}; events: separate metered pass of two"
        " steps of the longest batch (parts that take turns: two each); process peak: separate"
        " process, allocator returning memory to the OS"
    ]
    in_fp32, why = machine.needs_fp32_products()
    if on_cpu and values["weights"] != "fp32" and in_fp32:
        sentences.append(
            f"bf16 products formed in fp32 and rounded ({why}): same numerics, and its speed is not"
            " bf16's; the fp32 temporaries are in the process peak"
        )
    if isinstance(prepared.regime.place, Fsdp):
        sentences.append(
            f"sharded over {prepared.regime.place.ranks} rank(s): with one, nothing is cut; vramlab"
            " predict --world N says what each of N would hold"
        )
    if on_cpu and "offload" in values["acts"]:
        sentences.append(
            "on a CPU host memory is the same memory: the process peak holds the offloaded bytes,"
            " the meter counts them apart"
        )
    return sentences
