"""Forecasts held against this machine's GPU, in minutes: `make gpu-check`, or with any Python that
has torch and transformers:

    PYTHONPATH=lib python3 -m vramlab.gpu_check [--out DIR] [--minutes 9]

Every row that fits is measured at the 7B's shape with random weights, at 1,024 and 4,096 tokens,
each in a process of its own with a time limit; one runs out of memory on purpose; some also run
under the Trainer of transformers (`trainer_peers.ROWS`); then the small sweep. The deadline holds
for all of it, what comes first is worth most, and the same command goes on where it stopped. It
needs no network and leaves in DIR small files only, which hold nothing of the machine but card,
driver and versions. With `--device cpu` the tiny model takes the same way where there is no GPU.
Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from ..capture.oom import to_text
from ..files import ROOT, write_whole
from ..forecast.what_fits import limited
from . import plan as gpu_plan
from . import table as gpu_table
from .plan import Cell

TINY = ("zero_shot", "full", "mixed", "checkpoint", "offload", "lora", "lomo", "badam", "chunkft")
"""The rows of the small sweep on the card, those of params/quick.yml among them."""
FORECAST_SHARE, LEAST_S, MOST_S = 0.3, 20.0, 90.0
"""Forecasts get so much of the time; a cell is begun while so many seconds are left, and ended
after so many."""


@dataclass
class Worker:
    """A process that has imported everything and waits to be told what to do."""

    process: subprocess.Popen

    @classmethod
    def started(cls) -> Worker:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), *sys.path[1:]]),
        }
        # what it prints may name the machine: kept nowhere
        return cls(
            subprocess.Popen(
                [sys.executable, "-m", "vramlab.gpu_check.cell"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        )

    def does(self, asked: Mapping, limit_s: float) -> dict:
        """The result, however it ended; a process that outlives `limit_s` is ended."""
        file = Path(asked["folder"]) / "result.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        try:
            self.process.communicate(json.dumps(asked) + "\n", timeout=limit_s)
            reason = f"its process ended with code {self.process.returncode}"
        except subprocess.TimeoutExpired:
            self.stop()
            reason = f"not done in {limit_s:.0f} s"
        if not file.exists():
            write_whole(
                file, json.dumps({**_told(asked), "outcome": "failed", "reason": reason}, indent=1)
            )
        return json.loads(file.read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def _told(asked: Mapping) -> dict:
    return {name: value for name, value in asked.items() if name not in ("folder", "budget_s")}


class Check:
    """One run of the check. `minutes`: for all of it, from now on."""

    def __init__(
        self,
        out: Path,
        minutes: float,
        device: str,
        model: str,
        seq: tuple[int, ...],
        only: tuple[str, ...] = (),
        tiny: tuple[str, ...] = TINY,
        window_s: float = 2.2,
    ):
        self.out, self.device, self.model, self.seq, self.only = out, device, model, seq, only
        self.tiny, self.window_s, self.ends = tiny, window_s, time.monotonic() + 60 * minutes
        self._spare: Worker | None = None
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def run(self) -> int:
        """All of it. Returns 0 when every cell that was begun ended as it should, else 1."""
        machine = self._ask(Cell("describe", None), 120, keep=False)
        if machine["outcome"] != "ok":
            print(f"no answer from {self.device}: {machine['reason']}")
            return 1
        write_whole(self.out / "machine.json", json.dumps(machine, indent=1))
        card, asked = gpu_plan.card_of(machine), gpu_plan.questions(self.model, self.seq, self.only)
        known = gpu_plan.forecasts(
            asked, card, self.out / "forecasts.json", self.left_s * FORECAST_SHARE
        )
        cells = gpu_plan.plan(
            asked, known, machine, self.tiny if find_spec("sentencepiece") else ()
        )
        print(
            f"{machine['name']}: {len(asked)} steps asked for,"
            f" {sum(not told['reason'] for told in known.values())} forecast, {len(cells)} cells to"
            " measure",
            flush=True,
        )
        for name, told in known.items():
            if told["reason"]:
                print(f"{name}: no forecast, {told['reason'][:200]}")
        if self.tiny and not find_spec("sentencepiece"):
            print("the small sweep is left out: it needs sentencepiece, which is not here")
        pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=gpu_plan._blind
        )
        try:
            self._measure(cells, card, pool)
        finally:
            if self._spare:
                self._spare.stop()
            gpu_plan._close(pool)
        return self._say(cells, machine, card)

    def _measure(self, cells: list[Cell], card, pool: ProcessPoolExecutor) -> None:
        answers: list[tuple[Cell, Future]] = []
        for cell in cells:
            if self.left_s < LEAST_S:
                break
            found = self._ask(cell, min(MOST_S, self.left_s))
            print(gpu_table.line(cell, found), flush=True)
            if found["outcome"] == "oom" and "oom" in found and "would_fit" not in found["oom"]:
                held = limited(found["oom"]["capacity_bytes"] or card.capacity_bytes)
                answers.append(
                    (
                        cell,
                        pool.submit(
                            gpu_plan.fitted,
                            cell.question,
                            held if cell.limit_bytes else card or held,
                        ),
                    )
                )
        for cell, future in answers:
            self._answered(cell, future)

    def _answered(self, cell: Cell, future: Future) -> None:
        """What would have fitted, into the record of the cell that ran out, if it is known in
        time."""
        found = self._kept(cell)
        try:
            found["oom"]["would_fit"] = future.result(timeout=max(0.0, self.left_s))
        except Exception as error:
            found["oom"]["said"] += f" no answer what would have fitted ({type(error).__name__})"
        write_whole(self.out / cell.name / "result.json", json.dumps(found, indent=1))

    def _kept(self, cell: Cell) -> dict | None:
        path = self.out / cell.name / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _ask(self, cell: Cell, limit_s: float, keep: bool = True) -> dict:
        """The cell's result: kept from an earlier run, or made now, while the next process
        imports."""
        kept = self._kept(cell) if keep else None
        if kept and kept["outcome"] in ("ok", "oom") and kept.get("code") == gpu_plan.code():
            return kept
        worker, self._spare = self._spare or Worker.started(), Worker.started()
        return worker.does(
            {**self._asked(cell), "folder": str(self.out / cell.name), "budget_s": limit_s}, limit_s
        )

    def _asked(self, cell: Cell) -> dict:
        asked = {
            "does": cell.does,
            "device": self.device,
            "regime": cell.regime,
            "window_s": self.window_s,
            "code": gpu_plan.code(),
        }
        if cell.question is None:
            return asked
        told, twin = (
            cell.forecast or {},
            (self._kept(Cell("measure", cell.question)) if cell.does == "peer" else None),
        )
        return {
            **asked,
            "model": cell.question.model,
            "regime": cell.question.regime,
            "weights": cell.question.weights,
            "seq": cell.question.seq,
            "batch": cell.question.batch,
            "limit_bytes": cell.limit_bytes,
            "parts": told.get("parts"),
            "step": told.get("step"),
            "peer_step_s": (twin or {}).get("step_s_median"),
        }

    def _say(self, cells: list[Cell], machine: Mapping, card) -> int:
        found = [(cell, kept) for cell in cells if (kept := self._kept(cell))]
        table = gpu_table.table(found, card)
        summary = gpu_table.summary(table)
        table.to_parquet(self.out / "table.parquet")
        write_whole(self.out / "summary.json", json.dumps(summary, indent=1))
        for cell, kept in found:
            if "oom" in kept:
                print(f"\n{cell.name}: {to_text(kept['oom'])}")
        print(
            f"\n{len(cells) - len(found)} of {len(cells)} cells were not begun: the same command"
            " goes on from here\n"
            if len(found) < len(cells)
            else ""
        )
        print(gpu_table.text(table, summary, machine, card))
        return 0 if all(_as_it_should(cell, kept) for cell, kept in found) and found else 1


def _as_it_should(cell: Cell, kept: Mapping) -> bool:
    return kept["outcome"] == ("oom" if cell.on_purpose else "ok")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m vramlab.gpu_check", description=__doc__.split("\n")[0]
    )
    default = Path(os.environ.get("OUT") or "outputs") / "gpu-check"
    top.add_argument(
        "--out", type=Path, default=default, help="default: $OUT/gpu-check, or outputs/gpu-check"
    )
    top.add_argument("--minutes", type=float, default=8.7, help="for all of it (default: 8.7)")
    top.add_argument(
        "--device",
        default="cuda",
        help="default: cuda; cpu takes a micro model through the same code",
    )
    top.add_argument(
        "--model",
        help="a file of params/models, or the path of one (default: baichuan2-7b; tiny on a CPU)",
    )
    top.add_argument("--seq", type=int, nargs="+", help="default: 1024 4096; 32 64 on a CPU")
    top.add_argument(
        "--only", nargs="+", default=[], help="rows of params/regimes.yml (default: all)"
    )
    top.add_argument("--no-tiny", action="store_true", help="leave the small sweep out")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(argv)
    cpu = args.device == "cpu"
    seq = tuple(args.seq or ((32, 64) if cpu else (1024, 4096)))
    with pd.option_context("display.width", 200):
        return Check(
            args.out,
            args.minutes,
            args.device,
            args.model or ("tiny" if cpu else "baichuan2-7b"),
            seq,
            tuple(args.only),
            () if args.no_tiny else TINY,
            0.2 if cpu else 2.2,
        ).run()


if __name__ == "__main__":
    sys.exit(main())
