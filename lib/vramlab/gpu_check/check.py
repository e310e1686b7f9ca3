"""The check on a GPU: its deadline, its processes and what it leaves; `__main__` is its command."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from types import ModuleType

from ..capture.oom import to_text
from ..cards import Card
from ..files import recall, write_whole
from ..forecast.what_fits import limited, what_fits
from ..processes import Child, call_once
from ..reading import read_json
from . import forecasts, plan, table
from .plan import Cell

SMALL_SWEEP = (
    "zero_shot",
    "full",
    "mixed",
    "checkpoint",
    "offload",
    "lora",
    "lomo",
    "badam",
    "chunkft",
)
"""The rows of the small sweep on the card, those of params/quick.yml among them."""
CELL, OFFLINE = "vramlab.gpu_check.cell:run_cell", {"HF_HUB_OFFLINE": "1"}
"""What a cell's process calls, and its environment."""
FORECAST_SHARE = 0.3
"""Of the time, for forecasts."""
LEAST_S, MOST_S, DESCRIBE_S = 20.0, 90.0, 120.0
"""A cell is begun while `LEAST_S` seconds are left, and ended after `MOST_S`; the process that
describes the machine, after `DESCRIBE_S`."""


class Check:
    """One run of the check. `minutes` is for all of it, from now on; `small`, the rows of the small
    sweep; `window_s`, the seconds that a row is timed; `peers`, a module with `ROWS`, the rows that
    it has another training loop for, and `measure`, which runs one."""

    def __init__(
        self,
        out: Path,
        minutes: float,
        device: str,
        model: str,
        seq: Sequence[int],
        only: Sequence[str] = (),
        small: Sequence[str] = SMALL_SWEEP,
        window_s: float = 2.2,
        peers: ModuleType | None = None,
    ):
        self.out, self.device, self.model, self.seq, self.only = out, device, model, seq, only
        self.small, self.window_s, self.peers = small, window_s, peers
        self.ends = time.monotonic() + 60 * minutes
        self.code = forecasts.code_hash(peers)
        self._children = ExitStack()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def run(self) -> int:
        """All of it. Returns 0 when every cell that was begun ended as expected, else 1."""
        with self._children:
            self._next_child = self._start_child(CELL, OFFLINE)
            device = {"device": self.device}
            machine, reason, _ = call_once("vramlab.machine:describe", device, DESCRIBE_S, OFFLINE)
            if reason:
                print(f"no answer from {self.device}: {reason}")
                return 1
            write_whole(self.out / "machine.json", json.dumps(machine, indent=1))
            card = plan.card_of(machine)
            cells = self.plan_cells(machine, card)
            self.measure(cells, card)
            return self.report(cells, machine, card)

    def plan_cells(self, machine: Mapping, card: Card | None) -> list[Cell]:
        """Forecast, and say what will be measured and what will not."""
        questions = plan.questions(self.model, self.seq, self.only)
        file, budget_s = self.out / "forecasts.json", self.left_s * FORECAST_SHARE
        steps = forecasts.forecast_all(questions, card, file, self.code, budget_s)
        small = self.small if importlib.util.find_spec("sentencepiece") else ()
        peers = self.peers.ROWS if self.peers else ()
        cells = plan.plan(questions, steps, machine, small, peers)
        missing = {name: step["reason"] for name, step in steps.items() if step["reason"]}
        print(
            f"{machine['name']}: {len(questions)} steps asked for, {len(steps) - len(missing)}"
            f" forecast, {len(cells)} cells to measure",
            flush=True,
        )
        for name, reason in missing.items():
            print(f"{name}: no forecast, {reason[:200]}")
        if len(small) < len(self.small):
            print("the small sweep is left out: it needs sentencepiece, which is not here")
        return cells

    def measure(self, cells: Sequence[Cell], card: Card | None) -> None:
        """Cells in their order, as long as there is time; beside them, what would have fitted in
        the place of those that run out of memory."""
        fitting = []
        for cell in cells:
            if self.left_s < LEAST_S:
                break
            result = self.run_cell(cell, min(MOST_S, self.left_s))
            print(table.to_line(cell, result), flush=True)
            evidence = result.get("oom", {})
            if evidence.get("capacity_bytes") and "would_fit" not in evidence:
                limit = limited(evidence["capacity_bytes"])
                device = card if card and not cell.limit_bytes else limit
                child = self._start_child("vramlab.processes:call_in_one_thread", forecasts.NO_GPU)
                child.send((partial(what_fits, card=device), cell.question), self.left_s)
                fitting.append((cell, result, child))
        for cell, result, child in fitting:
            self.add_what_fits(cell, result, child)

    def add_what_fits(self, cell: Cell, result: dict, child: Child) -> None:
        """The child's answer goes into the result of the cell that ran out of memory, if it comes
        in time."""
        answer = child.result()
        if answer.reason:
            result["oom"]["said"] += f" no answer what would have fitted: {answer.reason}"
        else:
            result["oom"]["would_fit"] = answer.value
        self.write_result(cell, result)

    def read_result(self, cell: Cell) -> dict | None:
        """What this code measured, in an earlier run too."""
        result = recall(self.out / cell.name / "result.json", read_json)
        return result if result and result.get("code") == self.code else None

    def write_result(self, cell: Cell, result: Mapping) -> None:
        write_whole(self.out / cell.name / "result.json", json.dumps(result, indent=1))

    def run_cell(self, cell: Cell, limit_s: float) -> dict:
        """The cell's result: that of an earlier run, unless it failed, or made now, while the
        process of the next cell loads."""
        kept = self.read_result(cell)
        if kept and kept["outcome"] in ("ok", "oom"):
            return kept
        folder = self.out / cell.name
        folder.mkdir(exist_ok=True)
        child, self._next_child = self._next_child, self._start_child(CELL, OFFLINE)
        request = self.request(cell)
        child.send({**request, "folder": str(folder), "budget_s": limit_s}, limit_s)
        answer = child.result()
        child.stop()  # its memory is the next cell's
        result = {**request, **(answer.value or {"outcome": "failed", "reason": answer.reason})}
        self.write_result(cell, result)
        return result

    def _start_child(self, function: str, environment: Mapping[str, str]) -> Child:
        # what it prints may name the machine
        return self._children.enter_context(Child(function, environment, DEVNULL))

    def request(self, cell: Cell) -> dict:
        """What the cell's process is to do, as its result repeats it. See `cell.measure`."""
        ours = self.read_result(Cell("measure", cell.question)) if cell.kind == "peer" else None
        return {
            "does": cell.kind,
            "device": self.device,
            "window_s": self.window_s,
            "code": self.code,
            "model": cell.question.model,
            "regime": cell.question.regime,
            "weights": cell.question.weights,
            "seq": cell.question.seq,
            "batch": cell.question.batch,
            "limit_bytes": cell.limit_bytes,
            "parts": cell.forecast.get("parts"),
            "step": cell.forecast.get("step"),
            "peers": self.peers and self.peers.__name__,
            "peer_step_s": (ours or {}).get("step_s_median"),
        }

    def report(self, cells: Sequence[Cell], machine: Mapping, card: Card | None) -> int:
        """Write and print the table of what there is, the evidence of what ran out before it."""
        results = [(cell, result) for cell in cells if (result := self.read_result(cell))]
        rows = table.build_table(results, card)
        summary = table.summarise(rows)
        rows.to_parquet(self.out / "table.parquet")
        write_whole(self.out / "summary.json", json.dumps(summary, indent=1))
        for cell, result in results:
            if "oom" in result:
                print(f"\n{cell.name}: {to_text(result['oom'])}")
        due = len(cells) - len(results)
        if due:
            print(
                f"\n{due} of {len(cells)} cells were not begun: the same command goes on from here"
            )
        print("\n" + table.to_text(rows, summary, machine, card))
        return 0 if results and all(ended_as_expected(*each) for each in results) else 1


def ended_as_expected(cell: Cell, result: Mapping) -> bool:
    return result["outcome"] == ("oom" if cell.meant_to_run_out else "ok")
