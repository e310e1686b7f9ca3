"""What `gpu_check` measures and in which order: forecasts first, of every row and length, in
processes that see no GPU.

A cell is measured if its forecast fits the card, with what a process holds besides, and host memory
holds what the row puts there; most informative first, so that a deadline cuts off the least. One
cell that does not fit is measured all the same, to run out of memory on purpose. A row that cannot
be forecast is measured after all those that can.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from ..allocator.simulate import simulate
from ..cards import Card, read_cards
from ..files import write_whole
from ..forecast.arithmetic import STORED, count_parameters
from ..forecast.chart import Atlas
from ..forecast.forecast import CACHE, Question, forecast
from ..forecast.question import traced_code_hash
from ..forecast.trace import trace
from ..forecast.what_fits import what_fits
from .trainer_peers import ROWS

FIRST = (
    "lora",
    "bf16",
    "lomo",
    "checkpoint",
    "adam8bit",
    "badam",
    "chunkft_128",
    "lora_checkpoint",
    "mezo",
    "mixed",
    "offload",
    "adalomo",
    "adafactor_backward",
    "qlora",
    "zero_shot",
    "approx_residual",
    "apollo",
    "host_state",
    "host_weights",
    "full",
)
"""Rows from most to least informative: each of these is another mechanism. The rest follow in the
order of regimes.yml."""
LAST = ("galore", "galore_layerwise")
"""They decompose every matrix at each recorded step, which takes minutes: after all else."""
AS_WRITTEN = ("mixed", "master", "qlora", "int8_lora", "bf16_sr")
"""Rows whose point is the type they are stored in."""
NOT_HERE = ("ImpossibleHere", "IllegalRegime", "ImportError", "ModuleNotFoundError")
"""Reasons that hold for the measurement too."""
HOST_SHARE = 0.7
"""Of host memory, for what a row puts there; the model is made there too."""


@dataclass(frozen=True)
class Cell:
    """One thing to do in a process of its own."""

    does: str
    question: Question | None
    forecast: Mapping | None = None
    regime: str = ""
    limit_bytes: int = 0
    """The end of the device, where the cell is to reach it on purpose."""

    @property
    def name(self) -> str:
        """Its folder."""
        if self.question is None:
            return "-".join(part for part in (self.does, self.regime) if part)
        asked = self.question
        weights = [asked.weights] if asked.weights not in ("", asked.regime) else []
        name = "-".join([asked.regime, *weights, f"{asked.batch}x{asked.seq}"])
        return {"measure": name, "peer": f"{name}-trainer"}[self.does] + (
            "-oom" if self.on_purpose else ""
        )

    @property
    def on_purpose(self) -> bool:
        """Whether it is to run out of memory."""
        return bool(self.limit_bytes) or (
            self.forecast is not None and self.forecast.get("fits") is False
        )


def questions(model: str, seq: tuple[int, ...], only: tuple[str, ...] = ()) -> list[Question]:
    """Every row in bf16 where it can be, at every length: rows in the order of `FIRST`, all rows of
    the first length first. Rows that shard want several cards and are left out."""
    asked = Atlas(
        "gpu-check", (model,), seq, (1,), ("bf16", ""), AS_WRITTEN, regimes=only
    ).questions()
    single = [
        question
        for question in asked
        if "fsdp" not in question.row.values["place"]
        and not (question.weights and question.regime in AS_WRITTEN)
    ]
    rank = {name: at for at, name in enumerate(FIRST)}
    return sorted(
        single, key=lambda question: (seq.index(question.seq), rank.get(_row(question), len(FIRST)))
    )


def _row(question: Question) -> str:
    """Its rank's name: full in bf16 is the row called bf16."""
    return "bf16" if (question.regime, question.weights) == ("full", "bf16") else question.regime


def card_of(machine: Mapping) -> Card | None:
    """The card that was found, with its own total and context; rates from params/cards.yml, of the
    card of the same capability whose memory is nearest. None without a GPU."""
    if machine["total_bytes"] is None:
        return None
    alike = [
        card
        for card in read_cards().values()
        if list(card.compute_capability) == machine["compute_capability"]
    ]
    near = min(
        alike or read_cards().values(),
        key=lambda card: abs(card.total_bytes - machine["total_bytes"]),
    )
    return dataclasses.replace(
        near,
        key="here",
        name=machine["name"],
        total_gib=machine["total_bytes"] / 2**30,
        compute_capability=tuple(machine["compute_capability"]),
        context_mib=machine["context_bytes"] / 2**20,
        source={"rates": f"of {near.name}"},
    )


def forecasts(
    asked: list[Question],
    card: Card | None,
    file: Path,
    budget_s: float,
    cache_dir: Path | None = CACHE,
    jobs: int | None = None,
) -> dict[str, dict]:
    """name -> what is predicted, for as many of `asked`, in their order, as `budget_s` is enough
    for; kept in `file` as long as the code that makes steps stays the same. A row that cannot be
    forecast has its reason."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept = kept["steps"] if kept.get("code") == code() else {}
    due = [question for question in asked if _name(question) not in kept]
    if due:
        pool = ProcessPoolExecutor(
            jobs or os.cpu_count() or 1, multiprocessing.get_context("spawn"), initializer=_blind
        )
        made = {pool.submit(predicted, question, card, cache_dir): question for question in due}
        wait(made, timeout=budget_s)
        for future, question in made.items():
            if future.done() and not future.cancelled():
                error = future.exception()
                kept[_name(question)] = (
                    {"reason": f"{type(error).__name__}: {error}"} if error else future.result()
                )
        _close(pool)
        write_whole(file, json.dumps({"code": code(), "steps": kept}, indent=1))
    return kept


def code() -> str:
    """Hash of the code and the torch that steps are made of: what was kept of another is forecast
    and measured again."""
    here = Path(__file__).parents[1]
    names = (
        "gpu_check/cell.py",
        "baichuan/random_weights.py",
        "gpu_check/trainer_peers.py",
        "gpu_check/plan.py",
    )
    parts = [traced_code_hash(), torch.__version__, *((here / name).read_text() for name in names)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _close(pool: ProcessPoolExecutor) -> None:
    """Now: what has not been answered in time is not wanted any more, and would disturb what is
    measured."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _name(question: Question) -> str:
    return Cell("measure", question).name


def _blind() -> None:
    """Before anything asks for a GPU: forecasts take the place of one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(5)
    torch.set_num_threads(1)


def predicted(question: Question, card: Card | None, cache_dir: Path | None = CACHE) -> dict:
    """A forecast in plain numbers, with what a measurement needs to take the same step and to tell
    its MFU. Without a card it is of this CPU and its kernels: `allocated` is then requested bytes,
    which is what its meter sees.
    """
    began = time.perf_counter()
    try:
        made = forecast(question, card, cache_dir=cache_dir) if card else None
        step = (
            made.trace
            if made
            else trace(question.spec, question.row, question.seq, question.batch, mode="cpu")
        )
        reserved = made.reserved_peak_bytes if made else simulate(step.events).peak_reserved_bytes
    except Exception as error:  # whatever it is, the other rows go on and this one says why
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    flops = {phase: int(sum(work["flops"].values())) for phase, work in step.work.items()}
    return {
        "reason": "",
        "allocated_peak_bytes": made.allocated_peak_bytes if made else step.peak_bytes,
        "reserved_peak_bytes": reserved,
        "requested_peak_bytes": step.peak_bytes,
        "fits": made.fits if made else None,
        "num_alloc_retries": made.retries if made else 0,
        "host_bytes": step.host_bytes,
        "phase": step.phase,
        "ledger": dict(made.ledger if made else step.ledger),
        "step": step.step,
        "parts": list(step.parts),
        "flops": flops,
        "floor_s": made.floor.s if made else None,
        "device": step.device,
        "took_s": time.perf_counter() - began,
    }


def fitted(question: Question, card: Card, cache_dir: Path | None = CACHE) -> list[dict]:
    """What would have fitted in the place of `question`, for a process that sees no GPU."""
    return what_fits(question, card, cache_dir=cache_dir)


def plan(
    asked: list[Question], known: Mapping[str, Mapping], machine: Mapping, tiny: tuple[str, ...]
) -> list[Cell]:
    """Cells in the order in which they are worth measuring: by `asked`, the one that runs out
    fourth, then those at the last length that have a peer and their peers, the small sweep after
    the first length; then the rest."""
    cells, blind, host_bytes = [], [], machine["host_bytes"] * HOST_SHARE
    for question in asked:
        told = known.get(_name(question), {"reason": "no forecast in time"})
        if told["reason"].startswith(NOT_HERE):
            continue
        if told["reason"]:
            blind.append(Cell("measure", question, None))
        elif (
            told["fits"] is not False and told["host_bytes"] + _model_bytes(question) <= host_bytes
        ):
            cells.append(Cell("measure", question, told))
    peers = [
        Cell("peer", cell.question, cell.forecast)
        for cell in cells
        if cell.question and cell.question.seq == asked[-1].seq and _row(cell.question) in ROWS
    ]
    pairs = [
        each
        for peer in peers
        for each in (next(c for c in cells if c.question == peer.question), peer)
    ]
    short = running_out(asked, known, cells)
    head = list({cell.name: cell for cell in (*cells[:3], *short, *pairs)}.values())
    rest = [cell for cell in cells if cell not in head]
    late = [cell for cell in rest if cell.question and cell.question.regime in LAST]
    first = [
        cell
        for cell in rest
        if cell.question and cell.question.seq == asked[0].seq and cell not in late
    ]
    small = [Cell("tiny", None, regime=regime) for regime in tiny]
    return [
        *head,
        *first,
        *small,
        *[cell for cell in rest if cell not in first and cell not in late],
        *late,
        *blind,
    ]


def running_out(
    asked: list[Question], known: Mapping[str, Mapping], cells: list[Cell]
) -> list[Cell]:
    """The one cell that runs out: of those that do not fit the one that lacks least, so that it
    gets far; where all fit, the one with the highest peak on three quarters of what it takes."""
    lacking = [
        (known[_name(question)]["reserved_peak_bytes"], at, question)
        for at, question in enumerate(asked)
        if known.get(_name(question), {}).get("fits") is False
    ]
    if lacking:
        _, _, question = min(lacking)
        return [Cell("measure", question, known[_name(question)])]
    highest = max(
        cells, key=lambda cell: (cell.forecast or {}).get("requested_peak_bytes", 0), default=None
    )
    if highest is None or highest.forecast is None:
        return []
    return [
        dataclasses.replace(highest, limit_bytes=highest.forecast["reserved_peak_bytes"] * 3 // 4)
    ]


def _model_bytes(question: Question) -> int:
    """On the host while it is made: as published, and once more where it is stored in another
    type."""
    stored = STORED.get(question.row.values["weights"], 2)
    return round(count_parameters(question.spec) * (2 + (stored if stored != 2 else 0)))
