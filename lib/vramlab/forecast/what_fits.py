"""What would have fitted: a step that ran out of memory, forecast with one thing changed, and not
run again.

    what_fits(Question("baichuan2-7b", "full", 1024, 4, "bf16"), card("rtx4090"))

Each change is a forecast of its own, the real step on the virtual GPU through the simulated
allocator (`predict`): kind `predicted`, never measured. A change that the row excludes says so; one
that it has already is left out.
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
"""(row, storage type) from much memory to little: the next regime down is the first below one's own
that fits."""
WHAT_A_ROW_IS = ("weights", "trains", "grads", "until", "rule", "place")
"""Axes whose answers tell the rows of `LADDER` apart."""


def changes(question: Question, settings: Settings) -> Iterator[tuple[str, Question, Settings]]:
    """(what is changed, the question then, the allocator's settings then), one change at a time,
    and the first two together."""
    wanted = {"acts": "checkpoint", "head": "fused"}
    missing = {axis: value for axis, value in wanted.items() if question.row.values[axis] != value}
    names = {"acts": "activation checkpointing", "head": "a fused head"}
    for axis, value in missing.items():
        yield names[axis], _with(question, {axis: value}), settings
    if len(missing) > 1:
        yield " and ".join(names.values()), _with(question, missing), settings
    if question.batch > 1:
        yield (
            f"half the batch, {question.batch // 2}",
            dataclasses.replace(question, batch=question.batch // 2),
            settings,
        )
    elif question.seq > 1:
        yield (
            f"half the tokens, {question.seq // 2}",
            dataclasses.replace(question, seq=question.seq // 2),
            settings,
        )
    if not settings.expandable_segments:
        yield (
            "expandable segments",
            question,
            dataclasses.replace(settings, expandable_segments=True),
        )


def _with(question: Question, axes: Mapping[str, str]) -> Question:
    """The question with these answers in place of the row's."""
    return dataclasses.replace(
        question, axes=json.dumps({**json.loads(question.axes or "{}"), **axes}, sort_keys=True)
    )


def what_fits(
    question: Question,
    card: Card,
    settings: Settings = Settings(),  # noqa: B008, frozen
    cache_dir: Path | None = CACHE,
) -> list[dict]:
    """One row a change: change, regime, weights, seq, batch, allocator, peak_allocated_bytes,
    peak_reserved_bytes, fits, num_alloc_retries, kind, reason. The last is the next regime down
    that fits, if one does."""
    found = [_answer(*change, card, cache_dir) for change in changes(question, settings)]
    for down in ladder(question):
        last = _answer(f"the next regime down, {down.name}", down, settings, card, cache_dir)
        if last["fits"]:
            break
    else:
        return found
    return [*found, last]


def ladder(question: Question) -> list[Question]:
    """The rows below the question's own, in the order of `LADDER`; all of them where it is not in
    it. What the question asks for beside the answers that make a row what it is, such as its
    model's `config`, `acts` or `clip`, it asks of them too.
    """

    def does(question: Question) -> tuple[str, ...]:  # as full with bf16 is bf16
        return tuple(question.row.values[axis] for axis in WHAT_A_ROW_IS)

    kept = {
        axis: value
        for axis, value in json.loads(question.axes or "{}").items()
        if axis not in WHAT_A_ROW_IS
    }
    plain = [
        dataclasses.replace(question, axes="", regime=regime, weights=weights)
        for regime, weights in LADDER
    ]
    own = [at for at, rung in enumerate(plain) if does(rung) == does(question)]
    return [_with(rung, kept) if kept else rung for rung in plain[own[0] + 1 if own else 0 :]]


def _answer(
    change: str, question: Question, settings: Settings, card: Card, cache_dir: Path | None
) -> dict:
    asked = {
        "change": change,
        "regime": question.regime,
        "weights": question.weights,
        "seq": question.seq,
        "batch": question.batch,
        "kind": "predicted",
    }
    try:
        made = forecast(question, card, settings, cache_dir)
    except (
        ValueError,
        ImportError,
        ImpossibleHere,
    ) as error:  # the row excludes it, or this machine lacks a library
        return {**asked, "fits": None, "reason": " ".join(str(error).split())}
    return {
        **asked,
        "allocator": made.simulated.label,
        "peak_allocated_bytes": made.allocated_peak_bytes,
        "peak_reserved_bytes": made.reserved_peak_bytes,
        "fits": made.fits,
        "num_alloc_retries": made.retries,
        "reason": "",
    }


def limited(capacity_bytes: int, compute_capability: tuple[int, int] = AMPERE) -> Card:
    """A card of which nothing is known but its kind and the bytes it has for the allocator. Its
    rates are 1: no floor of seconds is meant by it."""
    return Card(
        "limit",
        "the memory limit",
        compute_capability,
        capacity_bytes / 2**30,
        0.0,
        1.0,
        1.0,
        1.0,
        1.0,
        {},
    )


def evidence(params: Mapping, record: Mapping) -> dict:
    """The record of a run that ran out, and what would have fitted: forecasts of full rows of the
    run's `max_length` tokens. A host that ran out has no capacity to hold them against."""
    if record["capacity_bytes"] is None:
        return {**record, "would_fit": []}
    return {**record, "would_fit": asked_apart(Question.of_run(params), record["capacity_bytes"])}


def asked_apart(
    question: Question, capacity_bytes: int, settings: str = "", timeout_s: float = 300.0
) -> list[dict]:
    """`what_fits` in a process of its own that sees no GPU, for one that has one: forecasts need
    the virtual device, of which torch has a real one's place only. What goes wrong there is a row
    with its reason."""
    payload = {
        **dataclasses.asdict(question),
        "capacity_bytes": capacity_bytes,
        "settings": settings,
    }
    answer = call_once(
        "vramlab.forecast.what_fits:_answered",
        payload,
        timeout_s,
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    return (answer.value or {}).get("fitted") or [
        {"change": "any change", "fits": None, "reason": f"no forecast: {answer.reason}"}
    ]


def _answered(payload: Mapping) -> dict:
    payload = dict(payload)
    capacity_bytes, settings = (
        payload.pop("capacity_bytes"),
        Settings.parse(payload.pop("settings")),
    )
    question = Question(**{**payload, "architecture": tuple(payload["architecture"])})
    return {"fitted": what_fits(question, limited(capacity_bytes, question.architecture), settings)}
