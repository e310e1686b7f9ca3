"""The passes of a run: learn (timed, nothing watching), meter (events), measured (the OS's peak,
its own process)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import machine
from ..baichuan import BaichuanTokenizer, load_model
from ..capture.cuda_recorder import Recorder, watching
from ..capture.memory_limit import Ceiling
from ..capture.nvml import find
from ..capture.nvml_sampler import Sampler
from ..capture.peak_rss import peak_window
from ..factcc.base.base_model import base_model, random_model
from ..factcc.base.recipe import Recipe
from ..factcc.dataset import Dataset, dataset
from ..factcc.prompt import HALF, check_items, check_room, sequences, training_batches
from ..files import CACHE
from ..observer import Observer
from ..progress import bar
from ..regimes.parameters import model_spec as model_spec
from ..regimes.parameters import run_row, run_spec
from ..regimes.place.place import Fsdp, alone
from ..regimes.regime import Regime
from ..regimes.trains.adapters import link
from ..timeline import events as timeline
from ..timeline.byte_ledger import Ledger, ledger, sample_at
from ..timeline.sides import sides
from ..training.clock import clock
from ..training.logit_watch import LogitWatch
from ..training.trainer import Batch, Schedule, Trainer

PUBLISHED_VOCABULARY = 125_696


@dataclass(frozen=True)
class Prepared:
    """Everything the passes share. `model` stays untouched: each pass trains a copy."""

    params: Mapping
    regime: Regime
    model: nn.Module
    tokenizer: BaichuanTokenizer
    base_record: dict
    data: Dataset

    def batches(self) -> Iterator[list[Batch]]:
        """Micro-batches of one step, for ever; the same sequence for every pass and every
        regime."""
        stream = training_batches(
            self.tokenizer,
            self.data.train,
            self.params["batch_size"],
            self.params["max_length"],
            self.params["seed"],
            self.params["objective"],
        )
        while True:
            yield list(itertools.islice(stream, self.regime.accumulate))

    def trainer(self, regime: Regime, model: nn.Module, observer: Observer) -> Trainer:
        schedule = Schedule(self.params["lr"], self.params["steps"])
        torch.manual_seed(self.params["seed"])
        return Trainer(
            model,
            regime,
            schedule,
            device=self.params["device"],
            seed=self.params["seed"],
            observer=observer,
        )


@dataclass(frozen=True)
class Learned:
    """`steps`: one row a step; `result`: speed, sizes and losses; `probes`: guessed gradients
    against true ones, see `regimes.grads.probes.Probes.rows`, empty where nothing was guessed or
    measured."""

    steps: pd.DataFrame
    result: dict
    probes: pd.DataFrame


@dataclass(frozen=True)
class Metered:
    """`events`: one row an allocation or release; `result`: the peak, its owners and the ledger."""

    events: pd.DataFrame
    result: dict


def prepare(params: Mapping, progress: bool) -> Prepared:
    """Make the data set, and load or pre-train the base. Raises: ValueError, for items that the run
    would fail on later."""
    data = dataset(
        params
    )  # first: a base may take minutes, and what is wrong with the data is known without
    check_items(data.train, params["batch_size"], HALF)
    base = base_of(params, progress)
    groups = [
        *sequences(data.train, random.Random(params["seed"])),
        *([item] for item in data.val + data.test),
    ]
    check_room(base[1], groups, params["max_length"])
    return Prepared(params, run_row(params), *base, data)


def base_of(params: Mapping, progress: bool) -> tuple[nn.Module, BaichuanTokenizer, dict]:
    """What the run starts from, and its record: published weights, the base of the recipe, made now
    unless it is in the cache, or with recipe `none` random weights drawn by the run's seed.

    Raises: ValueError, for a shape whose vocabulary only the published tokenizer has.
    """
    spec = run_spec(params)
    if spec.path:
        record = {"path": Path(spec.path).name, "recipe": "published weights"}
        return (
            load_model(spec.path, config=params["config"]),
            BaichuanTokenizer.from_pretrained(spec.path),
            record,
        )
    if spec.config.vocab_size == PUBLISHED_VOCABULARY:
        raise ValueError(
            f"model {spec.name} has no weights: give the folder of the downloaded checkpoint as"
            " `path:` in its file in params/models; a base that is made here has a vocabulary of"
            " its own"
        )
    if params["recipe"] == "none":
        return random_model(spec, CACHE, params["seed"])
    return base_model(spec, CACHE, recipe=Recipe.named(params["recipe"]), progress=progress)


def make_bases(runs: Iterable[Mapping], progress: bool) -> None:
    """Each base that `runs` (their parameters) start from, once and here, where progress shows, not
    inside the first that needs it. One that cannot be made is named on standard error: its own runs
    will fail of it, and others go on.
    """
    for params in {
        (params["model"], params["recipe"], str(params["config"])): params for params in runs
    }.values():
        try:
            if not run_spec(params).path:
                base_of(params, progress)
        except Exception as error:
            print(
                f"the base of {params['model']} could not be made: {type(error).__name__}: {error}",
                file=sys.stderr,
            )


def learn(prepared: Prepared, progress: bool) -> tuple[Learned, nn.Module]:
    """Train for `steps` steps with only a clock watching. Returns what was seen and the trained
    model. Raises: Diverged."""
    device = prepared.params["device"]
    watch = clock(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)
    trainer = prepared.trainer(prepared.regime, copy.deepcopy(prepared.model), watch)
    steps = prepared.params["steps"]
    logits, seen = (
        (
            LogitWatch(trainer.model, prepared.model.config.z_loss_weight)
            if prepared.params["watch_logits"]
            else None
        ),
        [],
    )
    with bar(f"train {prepared.regime.name}", steps, progress) as shown:
        for step, batches in enumerate(itertools.islice(prepared.batches(), steps)):
            loss = trainer.check(trainer.step(batches))
            tokens = sum(int(batch["attention_mask"].count_nonzero()) for batch in batches)
            seen.append(
                {
                    "loss": loss,
                    "tokens": tokens,
                    "lr": trainer.lr(step),
                    **(logits.take() if logits else {}),
                }
            )
            shown.update(1)
    if logits:
        logits.stop()
    frame = pd.DataFrame([{**timed, **row} for timed, row in zip(watch.rows, seen, strict=True)])
    result = {
        "speed": _speed(frame),
        "trainable_parameters": trainer.trainable_parameters(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loss_first": float(frame["loss"].iloc[0]),
        "loss_last": float(frame["loss"].tail(10).mean()),
        "train_s": float(frame["step_s"].sum()),
        "allocator": _allocator(device),
    }
    return Learned(frame, result, pd.DataFrame(trainer.probes())), trainer.finish()


def _allocator(device: str) -> dict | None:
    """Torch's own account of the pass on CUDA: peaks in bytes, and how often it had to flush its
    cache to go on, or gave up."""
    if not device.startswith("cuda"):
        return None
    stats = torch.cuda.memory_stats(device)
    return {
        "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
        "reserved_peak_bytes": stats["reserved_bytes.all.peak"],
        "retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }


def warm(frame: pd.DataFrame) -> pd.DataFrame:
    """The steps after the first tenth, which warm caches up and create optimizer state."""
    return frame.iloc[max(1, len(frame) // 10) :] if len(frame) > 1 else frame


def _speed(frame: pd.DataFrame) -> dict:
    """Medians over the warm steps."""
    timed = warm(frame)
    q25, q50, q75 = (float(timed["step_s"].quantile(q)) for q in (0.25, 0.5, 0.75))
    phases = {
        f"{name}_s": float(timed[f"{name}_s"].median())
        for name in ("forward", "backward", "update")
    }
    return {
        "tokens_per_s": float(timed["tokens"].sum() / timed["step_s"].sum()),
        "step_s_median": q50,
        "step_s_q25": q25,
        "step_s_q75": q75,
        **phases,
        "steps_timed": len(timed),
    }


def _limited(params: Mapping) -> Ceiling | None:
    """What stands for a device with an end on a CPU; a card is told its end itself, for the whole
    process."""
    limit = int(params["limit_mib"] * 2**20)
    if limit and params["device"].startswith("cuda"):
        whole = torch.cuda.get_device_properties(params["device"]).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), params["device"])
    return Ceiling(limit) if limit and params["device"] == "cpu" else None


def meter(prepared: Prepared) -> Metered:
    """The first steps again, on a fresh copy, under the event meter, or on CUDA with the
    allocator's history recorded. Slower than the real thing; bytes only. Raises: RanOut, where the
    run has a limit on a CPU and does not keep within it.
    """
    watcher = _limited(prepared.params) or watching(prepared.params["device"])
    sampler = Sampler(find(prepared.params["device"]))
    with ExitStack() as stack:
        stack.enter_context(sampler)
        if isinstance(
            watcher, Recorder
        ):  # a history begins before the model exists; a meter adopts what is there
            stack.enter_context(watcher)
        model = copy.deepcopy(prepared.model)
        trainer, batches = (
            prepared.trainer(_watched(prepared.regime), model, watcher),
            _longest(prepared),
        )
        cut, crossed = link(trainer.model), {}
        if not isinstance(watcher, Recorder):
            stack.enter_context(watcher)
        _few_steps(trainer, batches)
        if cut:
            cut.read()
            trainer.step(batches)
            crossed = cut.read()
    peak = watcher.peak()
    held = trainer.optimizer_state_bytes()
    result = {
        "peak": peak,
        "memory_ledger": peak["categories"],
        "host_bytes": watcher.host_peak_bytes,
        "optimizer_state_bytes": held,
    }
    frame = watcher.frame()
    if isinstance(watcher, Recorder):
        result["recorder"] = {
            **watcher.result(),
            "steps": watcher.peaks,
            "said": [*watcher.notes, *sampler.notes],
        }
        result["ledger"] = device_ledger(
            frame, watcher.recording.reserved_before_bytes, sampler.frame()
        ).to_json()
    if crossed:
        result["sides"] = sides(frame, trainer.steps_done - 1, prepared.regime.trains.cut, crossed)
    return Metered(frame, result)


def device_ledger(frame: pd.DataFrame, reserved_before_bytes: int, samples: pd.DataFrame) -> Ledger:
    """The ledger at a recording's peak. Its context is what the process held beyond the allocator's
    segments at the first sample, which is taken before the recording's first tensor; N/A where the
    driver does not say what a process holds.
    """
    held = samples["process_bytes"].iloc[0] if len(samples) else None
    context_bytes = None if held is None or pd.isna(held) else int(held) - reserved_before_bytes
    at = timeline.peak_event(frame)
    return ledger(
        frame,
        at,
        sample=sample_at(samples, frame["t_s"].iloc[at]),
        context_bytes=context_bytes,
        context_source="before the recording's first tensor",
    )


def measured(params: Mapping) -> dict:
    """The same steps with only the OS watching; called in a process of its own with the allocator
    set to return memory.

    The window opens before the model exists, so the peak holds weights and all. A small model goes
    through the same regime first: thread pools, oneDNN's caches and late imports are not the
    regime's bytes.
    """
    from .parameters import resolve

    params = resolve(params)
    prepared = prepare(params, progress=False)
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
    """Of the run's first 50 steps, the one with most tokens: the step that decides whether the run
    fits."""
    first = itertools.islice(prepared.batches(), min(50, prepared.params["steps"]))
    return max(first, key=lambda batches: max(batch["input_ids"].numel() for batch in batches))


def _watched(regime: Regime) -> Regime:
    """The same regime with turns of two steps at most, and steps of every kind soon, so that every
    part and kind can be seen: its peak is the largest one's."""
    regime = dataclasses.replace(regime, grads=regime.grads.hurried())
    if not hasattr(regime.trains, "interval"):
        return regime
    return dataclasses.replace(
        regime, trains=dataclasses.replace(regime.trains, interval=min(2, regime.trains.interval))
    )


def _few_steps(trainer: Trainer, batches: list[Batch]) -> None:
    """Two steps for every part: the first creates its optimizer state, the second runs with it.
    Parts that change at every step get their second one in the next round."""
    for _ in range(2 * max(1, len(trainer.parts))):
        trainer.step(batches)


def _warm_up(prepared: Prepared, batches: list[list[Batch]]) -> None:
    config = copy.deepcopy(prepared.model.config)
    config.num_hidden_layers = min(
        3, config.num_hidden_layers
    )  # enough for every row: two to draw, or a cut
    _few_steps(
        prepared.trainer(_watched(prepared.regime), type(prepared.model)(config), Observer()),
        batches,
    )


def notes(prepared: Prepared) -> list[str]:
    """What a reader of the figures has to know."""
    beside = (
        ", the driver asked every 30 ms from beside"
        if prepared.params["device"].startswith("cuda")
        else ""
    )
    said = [
        f"speed: learning pass, nothing watching{beside}; events: separate metered pass of two"
        " steps of the longest batch (parts that take turns: two each); process peak: separate"
        " process, allocator returning memory to the OS"
    ]
    if prepared.regime.values["weights"] != "fp32" and prepared.params["device"] == "cpu":
        needed, why = machine.needed()
        if needed:
            said.append(
                f"bf16 products formed in fp32 and rounded ({why}): same numerics, and its speed is"
                " not bf16's; the fp32 temporaries are in the process peak"
            )
    if isinstance(prepared.regime.place, Fsdp):
        said.append(
            f"sharded over {prepared.regime.place.ranks} rank(s): with one, nothing is cut; vramlab"
            " predict --world N says what each of N would hold"
        )
    if prepared.params["device"] == "cpu" and "offload" in prepared.regime.values["acts"]:
        said.append(
            "on a CPU host memory is the same memory: the process peak holds the offloaded bytes,"
            " the meter counts them apart"
        )
    return said
