"""The atlas: every regime, model and size against every card, with no GPU.

    content = chart(read_atlas("params/atlas.yml"))
    chart_table.table(content)  # one row for each cell and card

Of each model and row two sizes or more are traced, for compute capability (8, 0). The others are
solved from them (`solver.scaling`) where they follow exactly, else traced as well. Rows are shared
out to one process for each core. Every cell's summary against all cards is kept on disk, so a
repeated chart simulates nothing, and one that was stopped continues with the cells that are
missing. A cell that fails is a row with its reason.

Cards of another capability get their own cuBLAS workspaces; their attention kernels are those of
(8, 0), which may differ on Hopper for half types: see `card_summary`. `vramlab predict --card` is
exact there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..allocator.settings import Settings
from ..cards import Card, read_cards
from ..files import recall, write_checked
from ..processes import side_by_side
from ..reading import nearest, read_yaml, typed
from ..regimes.head.head import Fused
from ..regimes.parameters import model_spec
from ..regimes.regime import IllegalRegime, read_regimes
from . import card_summary
from .question import CACHE, Question, traced_step
from .solver import scaling
from .solver.scaling import ENOUGH, Sizes

SCHEMA = 1
CELLS_PER_PROCESS = 8
"""A process of its own, which takes some seconds to begin, is started for each so many cells."""


@dataclass(frozen=True)
class Atlas:
    """A table of questions. Every combination of model, size and row is a cell; each cell is
    compared with all `cards`, under each of `allocators`."""

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
    """Numbers of ranks for the cells of the sharded regime, see `chart_worlds`."""
    world_seq: int = 1024
    """Tokens of the one row that each of these ranks takes."""
    sizes: tuple[Sequence[int], ...] = ()
    """Further sizes, each [seq, batch], beside every combination of `seq` and `batch`."""

    def __post_init__(self):
        rows = read_regimes()
        known = {"regimes": rows, "as_written": rows, "cards": read_cards()}
        numbers = {
            "worlds or world_seq": (*self.worlds, self.world_seq),
            "sizes": itertools.chain(*self.sizes),
        }
        required = ("models", "seq", "batch", "weights")
        reasons = [f"no {name} given" for name in required if not getattr(self, name)]
        reasons += [
            f"{name} has no {value}{nearest(value, names)}; there are {', '.join(names)}"
            for name, names in known.items()
            for value in getattr(self, name)
            if value not in names
        ]
        reasons += [
            f"{name} has {number!r}: they are whole numbers from 1 on"
            for name, values in numbers.items()
            for number in values
            if not isinstance(number, int) or number < 1
        ]
        reasons += [
            f"sizes has {size}: each is [seq, batch]" for size in self.sizes if len(size) != 2
        ]
        if reasons:
            raise ValueError(f"atlas {self.name}: {'; '.join(reasons)}")
        for text in self.allocators:
            Settings.parse(text)
        for model in self.models:
            model_spec(model)

    def cards_by_key(self) -> dict[str, Card]:
        return {
            key: card for key, card in read_cards().items() if not self.cards or key in self.cards
        }

    def questions(self) -> list[Question]:
        """The cells. A storage type is left out where it is illegal for a row, or makes the step of
        an earlier row."""
        rows: dict[str, tuple[str, str]] = {}
        for weights, regime in itertools.product(self.weights, self.regimes or read_regimes()):
            if not weights and self.as_written and regime not in self.as_written:
                continue
            try:
                row = Question(self.models[0], regime, 1, 1, weights).row
            except IllegalRegime:
                continue
            step = [row.axes(), row.accumulate, row.clip]
            rows.setdefault(json.dumps(step, sort_keys=True, default=str), (regime, weights))
        sizes = dict.fromkeys([*itertools.product(self.seq, self.batch), *map(tuple, self.sizes)])
        return [
            Question(model, regime, seq, batch, weights)
            for model in self.models
            for seq, batch in sizes
            for regime, weights in rows.values()
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
    """Every cell of the atlas, as the plain data of `forecast.json`. Cells that are not kept in
    `cache_dir` are computed by `jobs` processes (one for each core, where each has enough to
    do)."""
    cards = atlas.cards_by_key()
    kept = SummaryCache(cards, atlas.allocators, cache_dir)
    return {
        "schema": SCHEMA,
        "kind": "predicted",
        "atlas": atlas.name,
        "torch": torch.__version__,
        "cards": {
            key: {
                "name": card.name,
                "capacity_bytes": card.capacity_bytes,
                "context_bytes": card.context_bytes,
                "compute_capability": list(card.compute_capability),
            }
            for key, card in cards.items()
        },
        "cells": chart_cells(atlas.questions(), kept, progress, jobs),
    }


def chart_cells(
    questions: list[Question], kept: SummaryCache, progress: bool, jobs: int | None
) -> list[dict]:
    """The cell of each question."""
    cells = {question: cell for question in questions if (cell := kept.read(question)) is not None}
    rows: dict[tuple, list[Question]] = {}
    for q in questions:
        rows.setdefault((q.model, q.regime, q.weights, q.world), []).append(q)
    due = sorted((row for row in rows.values() if not cells.keys() >= set(row)), key=_slow_first)
    done, total = len(cells), len(questions)
    jobs = jobs or min(os.cpu_count() or 1, (total - done) // CELLS_PER_PROCESS)
    summarize = partial(_summarize_row, kept=kept)
    for computed in _summarize_rows(summarize, due, done, total, progress, jobs):
        cells |= computed
    return [cells[question] for question in questions]


def _summarize_rows(
    summarize: Callable, due: list[list[Question]], done: int, total: int, progress: bool, jobs: int
) -> Iterator[dict[Question, dict]]:
    """The cells of each row that is due, as rows end."""
    from tqdm import tqdm

    one_by_one = ((row, summarize(row), "") for row in due)
    rows = side_by_side(summarize, due, jobs) if min(jobs, len(due)) > 1 else one_by_one
    with tqdm(
        total=total,
        initial=done,
        unit="cell",
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not (progress and due),
    ) as bar:
        for row, cells, reason in rows:
            bar.set_description(f"{row[0].model} {row[0].name}")
            bar.update(min(len(row), total - bar.n))
            # a process that died fails the cells of its row, and no others
            yield {question: _cell(question, reason) for question in row} if reason else cells


def _summarize_row(questions: list[Question], kept: SummaryCache) -> dict[Question, dict]:
    """The cells of a model and row, which differ in size only."""
    sizes, cells = Sizes(), {}
    for question in _solvable_order(questions):
        if (cell := kept.read(question)) is None:
            cell = _summarize(question, sizes, kept)
        elif len(questions) > ENOUGH and not cell["solved"]:
            sizes.add(traced_step(question, kept.cache_dir, counted=False))
        cells[question] = cell
    return cells


def _slow_first(questions: list[Question]) -> tuple:
    """A sort key: rows that take long come first, so that no process works on one alone at the end.
    These are rows whose parts take turns, then those with a fused head, then the larger model."""
    row = questions[0].row
    return (
        not hasattr(row.trains, "interval"),
        not isinstance(row.head, Fused),
        -questions[0].spec.config.num_hidden_layers,
    )


def _solvable_order(questions: list[Question]) -> list[Question]:
    """The sizes that most others can be solved from come first: smallest, largest and one between,
    since nothing is solved beyond the traced sizes. Where only the loops of a fused head depend on
    the number of tokens, the most rows, the longest row and one between, with few tokens each. Then
    those that say most about the sizes that could not be solved."""
    sizes = sorted((question.seq, question.batch) for question in questions)
    lengths, batches = (sorted(set(values)) for values in zip(*sizes, strict=True))
    if isinstance(questions[0].row.head, Fused):
        first = [
            min(size for size in sizes if size[1] == batches[-1]),
            min(size for size in sizes if size[0] == lengths[-1]),
            (lengths[(len(lengths) - 1) // 2], batches[0]),
        ]
    else:
        most_rows = max(size for size in sizes if size[1] == batches[-1])
        middle = lengths[len(lengths) // 2], batches[len(batches) // 2]
        first = [sizes[0], sizes[-1], most_rows, middle]

    def rank(question: Question) -> tuple:
        seq, batch = question.seq, question.batch
        return (
            first.index((seq, batch)) if (seq, batch) in first else len(first),
            seq in (lengths[0], lengths[-1]),
            batch not in (batches[0], batches[-1]),
            seq * batch,
        )

    return sorted(questions, key=rank)


def _summarize(question: Question, sizes: Sizes, kept: SummaryCache) -> dict:
    """One cell, solved from the traced `sizes`; else traced, and added to them."""
    try:
        step = sizes.at(question.seq, question.batch)
        solved = step is not None
        if step is None:
            step = traced_step(question, kept.cache_dir, counted=False)
            sizes.add(step)
        summary = card_summary.summarize(step, kept.cards, kept.allocators)
        return kept.write(question, {**summary, "solved": solved})
    except Exception as error:
        # whatever it is, the other cells are computed, and this one says why
        return _cell(question, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class SummaryCache:
    """Summaries on disk, beside the traces that they come from; without `cache_dir`, nowhere."""

    cards: dict[str, Card]
    allocators: tuple[str, ...]
    cache_dir: Path | None

    @cached_property
    def _hash(self) -> str:
        """Hash of everything that a summary depends on besides its trace."""
        solver = sorted(Path(scaling.__file__).parent.glob("*.py"))
        content = [
            [dataclasses.asdict(card) for card in self.cards.values()],
            self.allocators,
            [path.read_text() for path in (Path(card_summary.__file__), *solver)],
        ]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _path(self, cache_dir: Path, question: Question) -> Path:
        return cache_dir / question.key() / f"summary-{self._hash}.json"

    def read(self, question: Question) -> dict | None:
        summary = recall(self._path(self.cache_dir, question)) if self.cache_dir else None
        return summary and {**_cell(question), **summary}

    def write(self, question: Question, summary: dict) -> dict:
        if self.cache_dir is not None:
            path = self._path(self.cache_dir, question)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checked(path, summary)
        return {**_cell(question), **summary}


def kept(atlas: Atlas, question: Question, cache_dir: Path = CACHE) -> bool:
    """Whether the cell's summary is on disk."""
    cache = SummaryCache(atlas.cards_by_key(), atlas.allocators, cache_dir)
    return cache.read(question) is not None


def _cell(question: Question, reason: str = "") -> dict:
    """The identity of a cell; a cell that failed has nothing else but its reason."""
    return {
        "model": question.model,
        "regime": question.regime,
        "weights": question.row.values["weights"],
        "name": question.name,
        "seq": question.seq,
        "batch": question.batch,
        "reason": reason,
    }
