"""What would have fitted: a step that ran out of memory, forecast again with one thing changed.

    what_fits(Question("baichuan2-7b", "full", 1024, 4, "bf16"), card("rtx4090"))

Each change is a forecast of its own, the real step on the virtual GPU through the simulated
allocator: kind `predicted`, never measured. A change that the row excludes is listed with the
reason; one that the row has already is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..allocator.settings import Settings
from ..cards import AMPERE, Card
from ..processes import call_once
from ..regimes.regime import ImpossibleHere
from .forecast import CACHE, Question, forecast

LADDER = (
    ("mixed", ""),
    ("full", ""),
    ("master", ""),
    ("bf16", ""),
    ("adam8bit", "bf16"),
    ("galore", "bf16"),
    ("badam", "bf16"),
    ("lomo", "bf16"),
    ("lora_checkpoint", "bf16"),
    ("qlora", ""),
)
"""(row, storage type) from much memory to little: the next regime down is the first below a
question's own that fits."""
RUNG_AXES = ("weights", "trains", "grads", "until", "rule", "place")
"""Axes whose values tell the rows of `LADDER` apart."""


def changes(question: Question, settings: Settings) -> Iterator[tuple[str, Question, Settings]]:
    """(what is changed, the question then, the allocator's settings then), one change at a time,
    and the first two together."""
    wanted = {"acts": "checkpoint", "head": "fused"}
    names = {"acts": "activation checkpointing", "head": "a fused head"}
    missing = {axis: value for axis, value in wanted.items() if question.row.values[axis] != value}
    for axis, value in missing.items():
        yield names[axis], _with_axes(question, {axis: value}), settings
    if len(missing) > 1:
        yield " and ".join(names.values()), _with_axes(question, missing), settings
    axis, noun = ("batch", "batch") if question.batch > 1 else ("seq", "tokens")
    if (half := getattr(question, axis) // 2) > 0:
        yield f"half the {noun}, {half}", dataclasses.replace(question, **{axis: half}), settings
    if not settings.expandable_segments:
        expandable = dataclasses.replace(settings, expandable_segments=True)
        yield "expandable segments", question, expandable


def _with_axes(question: Question, axes: Mapping[str, str]) -> Question:
    """The question with these axis values in place of the row's."""
    merged = {**json.loads(question.axes or "{}"), **axes}
    return dataclasses.replace(question, axes=json.dumps(merged, sort_keys=True))


def what_fits(
    question: Question,
    card: Card,
    settings: Settings = Settings(),  # noqa: B008, frozen
    cache_dir: Path | None = CACHE,
) -> list[dict]:
    """One row a change: change, regime, weights, seq, batch, allocator, peak_allocated_bytes,
    peak_reserved_bytes, fits, num_alloc_retries, kind, reason. The last is the next regime down
    that fits, if one does."""
    answers = [_answer(*change, card, cache_dir) for change in changes(question, settings)]
    for rung in ladder(question):
        name = f"the next regime down, {rung.name}"
        answer = _answer(name, rung, settings, card, cache_dir)
        if answer["fits"]:
            return [*answers, answer]
    return answers


def ladder(question: Question) -> list[Question]:
    """The rows below the question's own, in the order of `LADDER`; all of them where it is not in
    it. They keep the question's model `config`, and those of its `axes` that do not tell rows
    apart, such as `acts` or `clip`."""
    axes = json.loads(question.axes or "{}")
    kept = {axis: value for axis, value in axes.items() if axis not in RUNG_AXES}
    rungs = [
        dataclasses.replace(question, axes="", regime=regime, weights=weights)
        for regime, weights in LADDER
    ]

    def values(rung: Question) -> list[str]:  # full with weights bf16 is the row bf16
        return [rung.row.values[axis] for axis in RUNG_AXES]

    own = next((at for at, rung in enumerate(rungs) if values(rung) == values(question)), -1)
    return [_with_axes(rung, kept) if kept else rung for rung in rungs[own + 1 :]]


def _answer(
    change: str, question: Question, settings: Settings, card: Card, cache_dir: Path | None
) -> dict:
    answer = {
        "change": change,
        "regime": question.regime,
        "weights": question.weights,
        "seq": question.seq,
        "batch": question.batch,
        "kind": "predicted",
    }
    try:
        step = forecast(question, card, settings, cache_dir)
    # the row excludes the change, or this machine has not the library that it needs
    except (ValueError, ImportError, ImpossibleHere) as error:
        return {**answer, "fits": None, "reason": " ".join(str(error).split())}
    return {
        **answer,
        "allocator": step.simulated.label,
        "peak_allocated_bytes": step.allocated_peak_bytes,
        "peak_reserved_bytes": step.reserved_peak_bytes,
        "fits": step.fits,
        "num_alloc_retries": step.retries,
        "reason": "",
    }


def limited(capacity_bytes: int, compute_capability: tuple[int, int] = AMPERE) -> Card:
    """A card of which only the capability and the bytes for the allocator are known. Its rates are
    1: its floor of seconds means nothing."""
    return Card(
        key="limit",
        name="the memory limit",
        compute_capability=compute_capability,
        total_gib=capacity_bytes / 2**30,
        context_mib=0.0,
        bf16_tflops=1.0,
        fp32_tflops=1.0,
        gb_per_s=1.0,
        host_gb_per_s=1.0,
        source={},
    )


def evidence(params: Mapping, record: Mapping) -> dict:
    """The record of a run that ran out of memory, with what would have fitted: forecasts of full
    rows of the run's `max_length` tokens. Empty for a host that ran out: its capacity is not
    known."""
    capacity_bytes = record["capacity_bytes"]
    if capacity_bytes is None:
        return {**record, "would_fit": []}
    question = Question.of_run(params)
    return {**record, "would_fit": what_fits_without_gpu(question, capacity_bytes)}


def what_fits_without_gpu(
    question: Question, capacity_bytes: int, settings: str = "", timeout_s: float = 300.0
) -> list[dict]:
    """`what_fits` in a process that sees no GPU: torch takes one accelerator only, and forecasts
    need that to be the virtual device. A process that fails is a row with its reason."""
    payload = {
        "question": dataclasses.asdict(question),
        "capacity_bytes": capacity_bytes,
        "settings": settings,
    }
    answer = call_once(
        "vramlab.forecast.what_fits:_run",
        payload,
        timeout_s,
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    return (answer.value or {}).get("fitted") or [
        {"change": "any change", "fits": None, "reason": f"no forecast: {answer.reason}"}
    ]


def _run(payload: Mapping) -> dict:
    architecture = tuple(payload["question"]["architecture"])
    question = Question(**{**payload["question"], "architecture": architecture})
    card = limited(payload["capacity_bytes"], architecture)
    return {"fitted": what_fits(question, card, Settings.parse(payload["settings"]))}
