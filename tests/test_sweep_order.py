"""A sweep's order: each cell in its own process, the next one's started ahead of it, and what is
finished counted."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import closing
from pathlib import Path

import pytest

from vramlab.processes import CallResult, run_cells
from vramlab.runs import sweep
from vramlab.runs.folder import KILLED
from vramlab.runs.sweep_file import Cell, combinations


def cells(folder: Path, *outcomes: str | None) -> list[Cell]:
    """Cells a, b, c ... that have ended so; None: not yet."""
    made = [Cell(name, {"regime": "full"}, folder / name) for name in "abcdef"[: len(outcomes)]]
    for cell, outcome in zip(made, outcomes, strict=True):
        cell.folder.mkdir()
        if outcome:
            (cell.folder / "result.json").write_text(
                json.dumps({"regime": "full", "outcome": outcome, "reason": ""})
            )
    return made


class Process:
    """Stands for the process of a cell that has ended."""

    def __init__(self, name):
        self.name, self.stopped = name, False
        self.connection, self._far_end = multiprocessing.Pipe()
        self._far_end.close()

    def ended(self):
        return True

    def result(self):
        return CallResult(None, "")

    def stop(self):
        self.stopped = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_cell_runs_in_the_process_that_was_started_for_it(monkeypatch, tmp_path, count):
    processes, due = {}, cells(tmp_path, *["ok"] * count)

    def start(notebook, cell):
        assert all(process.stopped for process in processes.values())
        return processes.setdefault(cell.run_id, Process(cell.run_id))

    monkeypatch.setattr(sweep, "make_bases", lambda *_: None)
    monkeypatch.setattr(sweep, "_start", start)
    sweep._run_all(tmp_path / "cells.ipynb", due, 0, quiet=True)
    assert [*processes] == [cell.run_id for cell in due]
    assert all(process.stopped for process in processes.values())


@pytest.mark.parametrize("early", [True, False])
def test_the_next_cell_starts_beside_one_that_allows_it(early):
    started, running = [], []

    class Working(Process):
        def ended(self):  # when it has been looked at twice
            self.looks = getattr(self, "looks", 0) + 1
            return self.looks > 1

    def start(name):
        running.append(name)
        started.append([*running])
        return Working(name)

    for name, process in run_cells("abc", start, may_start_next=lambda _: early):
        assert process.name == name
        running.remove(name)
    assert max(map(len, started)) == 1 + early and running == []


def test_processes_end_when_the_loop_is_left():
    processes = {}

    class Endless(Process):
        def ended(self):
            return self.name == "a"

    def start(name):
        return processes.setdefault(name, Endless(name))

    with closing(run_cells("abcd", start, jobs=3)) as ended:
        assert next(ended)[0] == "a"
    assert [process.stopped for process in processes.values()] == [False, True, True]
    assert [*run_cells("b", start, budget_s=0.1)] == [] and len(processes) == 3


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        ({}, "bd"),
        ({"retry": "failed"}, "abd"),
        ({"retry": "oom"}, "bcd"),
        ({"retry": "all"}, "abcd"),
        ({"force": True}, "abcde"),
    ],
)
def test_what_is_due_is_what_has_not_ended_or_is_to_be_tried_again(
    monkeypatch, tmp_path, arguments, due
):
    made, ran = cells(tmp_path, "failed", None, "oom", None, "ok"), []

    def run_all(notebook, due, finished, quiet):
        ran.append(("".join(cell.run_id for cell in due), finished))
        for cell in due:
            (cell.folder / "result.json").write_text(
                json.dumps({"regime": "full", "outcome": "ok", "reason": ""})
            )

    monkeypatch.setattr(
        sweep, "read_sweep", lambda path, out: (tmp_path / "cells.ipynb", tmp_path, made)
    )
    monkeypatch.setattr(sweep, "_run_all", run_all)
    left = {"failed", "oom"} - {"failed" if "a" in due else "", "oom" if "c" in due else ""}
    assert sweep.sweep("any.yml", quiet=True, **arguments).code == (1 if left else 0)
    assert ran == [(due, 5 - len(due))]


def test_an_interrupted_sweep_says_how_many_are_finished(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    made = cells(tmp_path, "ok", None, "oom")
    monkeypatch.setattr(
        sweep, "read_sweep", lambda path, out: (tmp_path / "cells.ipynb", tmp_path, made)
    )
    monkeypatch.setattr(sweep, "_run_all", interrupted)
    assert (
        sweep.sweep("any.yml", quiet=True).code == 130
        and "2 of 3 cells are finished" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("log", "outcome", "reason"),
    [
        ("", "failed", "its process ended with code 3"),
        ("one\nlast words", "failed", "last words"),
        (f"ValueError: first\nKernelDied: {KILLED}\nafter", "oom", f"KernelDied: {KILLED}"),
        ("x\nCellTimeout: 60 s\nmore", "failed", "CellTimeout: 60 s"),
        ("ValueError: a\nKeyError: b\n  at the end", "failed", "KeyError: b"),
    ],
)
def test_a_cell_that_wrote_no_result_gets_one_from_its_log(tmp_path, log, outcome, reason):
    (cell,) = cells(tmp_path, None)
    (cell.folder / "notebook.log").write_text(log)
    sweep._record_end(cell, "its process ended with code 3")
    found = json.loads((cell.folder / "result.json").read_text())
    assert (found["outcome"], found["reason"], found["run_id"], found["regime"]) == (
        outcome,
        reason,
        "a",
        "full",
    )


def test_a_grid_is_every_combination_in_its_own_order_and_with_sets_several():
    grid = {"regime": ["full", "lomo"], "with": [{"lr": 1, "clip": 2}, {"lr": 3}], "seed": [0]}
    assert combinations("x", grid) == [
        {"lr": 1, "clip": 2, "regime": "full", "seed": 0},
        {"lr": 3, "regime": "full", "seed": 0},
        {"lr": 1, "clip": 2, "regime": "lomo", "seed": 0},
        {"lr": 3, "regime": "lomo", "seed": 0},
    ]
    for wrong in ({"seed": 1}, {"seed": []}, {"with": [1]}):
        with pytest.raises(ValueError, match=f"x: grid.{next(iter(wrong))}"):
            combinations("x", wrong)
