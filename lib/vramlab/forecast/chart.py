"""The atlas: every regime, model, length and batch against every card, with no GPU.

    content = chart(read_atlas("params/atlas.yml"))
    charted.table(content)  # one row a cell and card

Of each model and row two sizes or more are traced, for compute capability (8, 0), and the others
solved from them (`scaling`) where they follow, else traced as well. Rows are shared out to one
process a core. Every cell's summary against all cards is kept by content, so a second look
simulates nothing. An atlas that is stopped goes on from the cells it has. A cell that fails is a
row with its reason.

Cards of another capability get their own cuBLAS workspaces; their attention kernels are those of
(8, 0), which for half types may differ on Hopper: see `summary`. `vramlab predict --card` is exact
there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..allocator.settings import Settings
from ..cards import Card, read_cards
from ..files import recall, write_checked
from ..processes import side_by_side
from ..reading import read_yaml, typed
from ..regimes.head.head import Fused
from ..regimes.parameters import model_spec
from ..regimes.regime import IllegalRegime, read_regimes
from . import card_summary as summary
from .forecast import CACHE, Question, traced_step
from .solver import scaling
from .solver.scaling import ENOUGH, Sizes

SCHEMA = 1
WORTH = 8
"""So many cells are worth a process of their own, which takes some seconds to begin."""


@dataclass(frozen=True)
class Atlas:
    """What is asked. Every combination is a cell; `cards` and `allocators` are what each cell is
    held against."""

    name: str
    models: tuple[str, ...]
    seq: tuple[int, ...]
    batch: tuple[int, ...]
    weights: tuple[str, ...] = ("",)
    """Storage types that replace the row's own; "" keeps it."""
    as_written: tuple[str, ...] = ()
    """The only rows that keep their own storage type where `weights` has "". Empty: all."""
    regimes: tuple[str, ...] = ()
    """Empty: all."""
    cards: tuple[str, ...] = ()
    """Empty: all."""
    allocators: tuple[str, ...] = ()
    worlds: tuple[int, ...] = ()
    """Numbers of ranks that the sharded regime is also asked for, as written: see `worlds`."""
    world_seq: int = 1024
    """Tokens of the one row that each rank then takes."""

    def __post_init__(self):
        reasons = [
            f"no {name} given"
            for name in ("models", "seq", "batch", "weights")
            if not getattr(self, name)
        ]
        for name, known in (
            ("regimes", read_regimes()),
            ("as_written", read_regimes()),
            ("cards", read_cards()),
        ):
            wrong = [value for value in getattr(self, name) if value not in known]
            reasons += (
                [f"{name} has no {', '.join(wrong)}; there are {', '.join(known)}"] if wrong else []
            )
        wrong = [
            world
            for world in (*self.worlds, self.world_seq)
            if not isinstance(world, int) or world < 1
        ]
        reasons += (
            [
                f"worlds or world_seq has {', '.join(map(repr, wrong))}: they are whole numbers"
                " from 1 on"
            ]
            if wrong
            else []
        )
        if reasons:
            raise ValueError(f"atlas {self.name}: {'; '.join(reasons)}")
        for text in self.allocators:
            Settings.parse(text)
        for model in self.models:
            model_spec(model)

    def held_against(self) -> dict[str, Card]:
        return {
            key: card for key, card in read_cards().items() if not self.cards or key in self.cards
        }

    def questions(self) -> list[Question]:
        """The cells. A storage type that is illegal for a row, or makes a step that is already
        there, is left out."""
        rows, seen = [], set()
        for weights in self.weights:
            for regime in self.regimes or read_regimes():
                if not weights and self.as_written and regime not in self.as_written:
                    continue
                try:
                    row = Question(self.models[0], regime, 1, 1, weights).row
                except IllegalRegime:
                    continue
                same = json.dumps(
                    [row.axes(), row.accumulate, row.clip], sort_keys=True, default=str
                )
                rows += [] if same in seen else [(regime, weights)]
                seen.add(same)
        return [
            Question(model, regime, seq, batch, weights)
            for model in self.models
            for seq in self.seq
            for batch in self.batch
            for regime, weights in rows
        ]


def read_atlas(path: Path | str) -> Atlas:
    """An atlas file. Raises: FileNotFoundError; ValueError, for an unknown key, regime, card, model
    or setting."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no atlas {path}: params/ has atlas.yml and atlas-quick.yml")
    return typed(Atlas, {"name": path.stem, **read_yaml(path)}, str(path))


def chart(
    atlas: Atlas, cache_dir: Path | None = CACHE, progress: bool = True, jobs: int | None = None
) -> dict:
    """Every cell of the atlas, as the plain data that `forecast.json` holds. What is kept already
    is read; the rest is traced by `jobs` processes (one a core, where there is enough for each)."""
    questions, keep = atlas.questions(), Keep(atlas.held_against(), atlas.allocators, cache_dir)
    found = {question: cell for question in questions if (cell := keep.read(question)) is not None}
    rows: dict[tuple, list[Question]] = {}
    for question in questions:
        rows.setdefault(
            (question.model, question.regime, question.weights, question.world), []
        ).append(question)
    due = sorted((row for row in rows.values() if not found.keys() >= set(row)), key=_long)
    jobs = jobs or min(os.cpu_count() or 1, (len(questions) - len(found)) // WORTH)
    for cells in _all(partial(_row, keep=keep), due, len(found), len(questions), progress, jobs):
        found |= cells
    cards = {
        key: {
            "name": card.name,
            "capacity_bytes": card.capacity_bytes,
            "context_bytes": card.context_bytes,
            "compute_capability": list(card.compute_capability),
        }
        for key, card in atlas.held_against().items()
    }
    return {
        "schema": SCHEMA,
        "kind": "predicted",
        "atlas": atlas.name,
        "torch": torch.__version__,
        "cards": cards,
        "cells": [found[question] for question in questions],
    }


def _all(
    find, due: list[list[Question]], kept: int, total: int, progress: bool, jobs: int
) -> Iterator[dict]:
    from tqdm import tqdm

    with tqdm(
        total=total,
        initial=kept,
        unit="cell",
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not (progress and due),
    ) as shown:
        for row, cells in (
            _in_processes(find, due, jobs)
            if min(jobs, len(due)) > 1
            else ((row, find(row)) for row in due)
        ):
            shown.set_description(f"{row[0].model} {row[0].name}")
            shown.update(min(len(row), total - shown.n))
            yield cells


def _in_processes(
    find, due: list[list[Question]], jobs: int
) -> Iterator[tuple[list[Question], dict]]:
    for row, cells, error in side_by_side(
        find, due, jobs
    ):  # a process that died takes its row, never the atlas
        yield (
            row,
            ({question: _named(question, _reason(error)) for question in row} if error else cells),
        )


def _row(questions: list[Question], keep: Keep) -> dict[Question, dict]:
    """The cells of one model and row, which differ in length and batch only."""
    sizes, cells = Sizes(), {}
    for question in _spread(questions):
        cells[question] = keep.read(question)
        if cells[question] is None:
            cells[question] = _cell(question, sizes, keep)
        elif len(questions) > ENOUGH and not cells[question]["solved"]:
            sizes.add(traced_step(question, keep.cache_dir, counted=False))
    return cells


def _long(questions: list[Question]) -> tuple:
    """Rows that take long first, so that no process is left alone with one: those whose parts take
    turns, those with a fused head, the larger model."""
    row = questions[0].row
    return (
        not hasattr(row.trains, "interval"),
        not isinstance(row.head, Fused),
        -questions[0].spec.config.num_hidden_layers,
    )


def _spread(questions: list[Question]) -> list[Question]:
    """First sizes that the others can be solved from, two and one to spare, then what tells most
    where they cannot. Nothing is solved beyond them: smallest, largest and one between. Where only
    the loops of a fused head depend on the number of tokens, and it says how, the most, the longest
    and one between, with few tokens each."""
    seq, batch = (
        sorted({getattr(question, axis) for question in questions}) for axis in ("seq", "batch")
    )
    first = [(seq[0], batch[0]), (seq[-1], batch[-1]), (seq[len(seq) // 2], batch[len(batch) // 2])]
    if isinstance(questions[0].row.head, Fused):
        first = [(seq[0], batch[-1]), (seq[-1], batch[0]), (seq[(len(seq) - 1) // 2], batch[0])]
    ends, sizes = (
        ((seq[0], seq[-1]), (batch[0], batch[-1])),
        [(question.seq, question.batch) for question in questions],
    )
    first = [*dict.fromkeys(place for place in first if place in sizes)]
    return sorted(
        questions,
        key=lambda question: (
            (
                first.index((question.seq, question.batch))
                if (question.seq, question.batch) in first
                else len(first)
            ),
            question.seq in ends[0],
            question.batch not in ends[1],
            question.seq * question.batch,
        ),
    )


def _cell(question: Question, sizes: Sizes, keep: Keep) -> dict:
    """One cell, solved from the sizes that are there, else traced and then one of them."""
    try:
        step = sizes.at(question.seq, question.batch)
        solved = step is not None
        if not solved:
            step = traced_step(question, keep.cache_dir, counted=False)
            sizes.add(step)
        return keep.write(
            question, {**summary.summarize(step, keep.cards, keep.allocators), "solved": solved}
        )
    except Exception as error:  # whatever it is, the other cells go on and this one says why
        return _named(question, _reason(error))


@dataclass(frozen=True)
class Keep:
    """Summaries on disk, beside the traces they come from; without `cache_dir`, nowhere."""

    cards: dict[str, Card]
    allocators: tuple[str, ...]
    cache_dir: Path | None

    @cached_property
    def _against(self) -> str:
        """Hash of what a summary depends on besides its trace."""
        solver = sorted(Path(scaling.__file__).parent.glob("*.py"))
        code = [path.read_text() for path in (Path(summary.__file__), *solver)]
        content = [
            [dataclasses.asdict(card) for card in self.cards.values()],
            self.allocators,
            code,
        ]
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode()
        ).hexdigest()[:12]

    def _path(self, question: Question) -> Path:
        return self.cache_dir / question.key() / f"summary-{self._against}.json"

    def read(self, question: Question) -> dict | None:
        made = recall(self._path(question)) if self.cache_dir else None
        return made and {**_named(question), **made}

    def write(self, question: Question, made: dict) -> dict:
        if self.cache_dir is not None:
            path = self._path(question)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checked(path, made)
        return {**_named(question), **made}


def kept(atlas: Atlas, question: Question, cache_dir: Path = CACHE) -> bool:
    """Whether the cell needs no tracing any more."""
    return Keep(atlas.held_against(), atlas.allocators, cache_dir).read(question) is not None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _named(question: Question, reason: str = "") -> dict:
    return {
        "model": question.model,
        "regime": question.regime,
        "weights": question.row.values["weights"],
        "name": question.name,
        "seq": question.seq,
        "batch": question.batch,
        "reason": reason,
    }
