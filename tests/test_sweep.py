"""A sweep survives what happens to sweeps: kill -9, Ctrl-C, cells that fail, kernels that die. The
cells here run a notebook that trains nothing, so that only the sweep is tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from vramlab.cli import main
from vramlab.files import ROOT
from vramlab.regimes.regime import read_regimes
from vramlab.runs.sweep import read_sweep

CELLS = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(out_dir)
(folder / "pid").write_text(str(os.getpid()))
time.sleep({"offload": 60, "lomo": 0}.get(regime, 0))
if regime == "lora":
    os.kill(os.getpid(), signal.SIGKILL)
if regime == "badam":
    raise RuntimeError("no such luck")
if regime == "chunkft":
    os._exit(3)
(folder / "result.json").write_text(json.dumps({"outcome": "ok", "reason": "", "regime": regime, "run_id": folder.name,
                                                "written_at": time.time()}))
"""


@pytest.fixture
def sweep_file(tmp_path):
    """Write a sweep over the given regimes and return its path; output goes to tmp_path / "out"."""
    parameters = nbformat.v4.new_code_cell(
        'regime = "full"\nrecipe = ""\nout_dir = ""', metadata={"tags": ["parameters"]}
    )
    cells = [
        parameters,
        nbformat.v4.new_code_cell(CELLS),
        nbformat.v4.new_code_cell("print('after')"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "cells.ipynb")

    def write(*regimes: str) -> Path:
        path = tmp_path / "some.yml"
        path.write_text(
            yaml.safe_dump(
                {
                    "name": "some",
                    "notebook": str(tmp_path / "cells.ipynb"),
                    "defaults": {"recipe": "smoke"},
                    "grid": {"regime": list(regimes)},
                }
            )
        )
        return path

    return write


def _sweep(path, *more):
    return main(["sweep", str(path), "--out", str(path.parent / "out"), "--no-report", *more])


def _results(path):
    return {
        file.parent.name.split("-")[0]: json.loads(file.read_text())
        for file in path.parent.glob("out/*/result.json")
    }


def _start(path):
    out = str(path.parent / "out")
    return subprocess.Popen(
        [sys.executable, "-m", "vramlab.cli", "sweep", str(path), "--out", out, "--no-report"],
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(what, timeout_s=60.0):
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def _pid_of_third(path):
    found = list(path.parent.glob("out/offload-*/pid"))
    return int(found[0].read_text() or 0) if found else 0


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_sweep_killed_in_its_third_cell_goes_on_without_repeating_the_first_two(
    sweep_file, tmp_path
):
    path = sweep_file("full", "lomo", "offload")
    process = _start(path)
    _wait_for(lambda: _pid_of_third(path) or process.poll() is not None)
    process.kill()
    process.communicate()
    before, orphan = _results(path), _pid_of_third(path)
    assert set(before) == {"full", "lomo"}
    _wait_for(
        lambda: not _alive(orphan), 20
    )  # no kernel is left to write into the next sweep's folders
    cells = tmp_path / "cells.ipynb"
    cells.write_text(cells.read_text().replace('\\"offload\\": 60', '\\"offload\\": 0'))
    assert _sweep(path) == 0
    after = _results(path)
    assert set(after) == {"full", "lomo", "offload"} and all(
        after[name] == before[name] for name in before
    )


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_leaves_the_rest_due(sweep_file, capsys):
    path = sweep_file("full", "offload", "lomo")
    process = _start(path)
    _wait_for(lambda: _pid_of_third(path))
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "1 of 3 cells are finished and kept" in said
    assert set(_results(path)) == {"full"}
    assert _sweep(path, "--dry-run", "--json") == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)["cells"]] == [
        "ok",
        "due",
        "due",
    ]


IN_TURN = """
import json, time
import pandas as pd
from pathlib import Path
from vramlab.processes import take_turn
said = [time.time()]
take_turn()
said.append(time.time())
folder = Path(out_dir)
pd.DataFrame({"step_s": [1.0]}).to_parquet(folder / "steps.parquet")  # nothing is timed any more
time.sleep(8)
said.append(time.time())
(folder / "result.json").write_text(json.dumps({"regime": regime, "outcome": "ok", "reason": "", "said": said}))
"""


@pytest.mark.slow
def test_a_cells_process_starts_when_nothing_is_timed_and_works_when_the_one_before_has_ended(
    sweep_file, tmp_path
):
    cells = tmp_path / "cells.ipynb"
    path = sweep_file("full", "lomo", "offload")
    notebook = nbformat.read(cells, 4)
    notebook.cells[1].source = IN_TURN
    nbformat.write(notebook, cells)
    (stale,) = (
        tmp_path / "out" / cell.run_id
        for cell in read_sweep(path, tmp_path / "out")[2]
        if cell.params["regime"] == "full"
    )
    stale.mkdir(parents=True)
    (stale / "steps.parquet").write_text("of a run that was killed")
    assert _sweep(path) == 0
    (_, _, ended), (loaded, began, done), (later, last, _) = (
        _results(path)[name]["said"] for name in ("full", "lomo", "offload")
    )
    assert loaded < ended <= began and later < done <= last
    assert loaded > ended - 8, "not while the first was timed"


@pytest.mark.slow
def test_cells_that_fail_are_rows_with_their_reason_and_the_sweep_goes_on(sweep_file, capsys):
    path = sweep_file("badam", "lora", "chunkft", "full")
    assert _sweep(path, "--json") == 1
    rows = {row["regime"]: row for row in json.loads(capsys.readouterr().out)["cells"]}
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"badam": "failed", "lora": "oom", "chunkft": "failed", "full": "ok"}
    assert "RuntimeError: no such luck" in rows["badam"]["reason"]
    assert "killed by signal 9" in rows["lora"]["reason"] and "code 3" in rows["chunkft"]["reason"]
    assert _sweep(path, "--retry", "oom", "--dry-run", "--json") == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)["cells"]] == [
        "failed",
        "due",
        "failed",
        "ok",
    ]


def test_the_saved_notebook_of_a_dead_kernel_says_so_and_runs_nothing_after_it(sweep_file):
    path = sweep_file("lora")
    _sweep(path)
    saved = nbformat.read(next(path.parent.glob("out/lora-*/run.ipynb")), 4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    said = [
        output.ename for cell in code for output in cell.outputs if output.output_type == "error"
    ]
    assert said == ["KernelDied"] and not code[-1].outputs
    assert any("papermill-error-cell-tag" in cell.metadata.get("tags", []) for cell in saved.cells)


def test_a_cell_that_runs_too_long_is_an_error_of_the_notebook(sweep_file, tmp_path):
    sweep_file("full")
    with pytest.raises(Exception, match="(?s)CellTimeout"):
        papermill.execute_notebook(
            str(tmp_path / "cells.ipynb"),
            str(tmp_path / "out.ipynb"),
            engine_name="vramlab",
            parameters={"regime": "offload", "out_dir": str(tmp_path)},
            execution_timeout=2,
            progress_bar=False,
        )
    saved = nbformat.read(tmp_path / "out.ipynb", 4)
    assert "CellTimeout" in [
        output.get("ename") for cell in saved.cells for output in cell.get("outputs", [])
    ]


def test_changed_parameters_are_another_run_and_force_runs_all_again(sweep_file, capsys):
    path = sweep_file("full")
    _sweep(path)
    first = _results(path)["full"]
    _sweep(path)
    assert _results(path)["full"] == first
    _sweep(path, "--force")
    assert _results(path)["full"]["written_at"] > first["written_at"]
    path.write_text(
        yaml.safe_dump(
            {**yaml.safe_load(path.read_text()), "defaults": {"recipe": "smoke", "seed": 3}}
        )
    )
    capsys.readouterr()
    assert _sweep(path, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["state"] == "due"


def test_a_dry_run_names_data_that_is_not_there(sweep_file, capsys):
    path = sweep_file("full")
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text()), "defaults": {"items": "no/items"}})
    )
    assert _sweep(path, "--dry-run", "--json") == 0
    assert "items no/items does not exist here" in capsys.readouterr().err


@pytest.mark.slow
def test_two_sweeps_in_one_folder_are_refused(sweep_file):
    path = sweep_file("offload")
    process = _start(path)
    try:
        _wait_for(lambda: _pid_of_third(path))
        assert _sweep(path) == 2
    finally:
        process.terminate()
        os.kill(_pid_of_third(path), signal.SIGKILL)
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"grid": {"regime": []}}, "give a list of values"),
        ({"gird": {"regime": ["full"]}}, "gird"),
        ({"name": "x"}, "no grid"),
        ({"grid": {"regime": ["lomoo"]}}, "lomoo"),
        ({"grid": {"regime": ["full"], "step": [1]}}, "unknown parameter 'step'"),
        ({"grid": {"steps": ["many"]}}, "it takes int"),
        ([1], "its whole content"),
    ],
)
def test_a_wrong_sweep_file_is_refused_before_anything_runs(tmp_path, content, words, capsys):
    path = tmp_path / "wrong.yml"
    path.write_text(yaml.safe_dump(content))
    assert _sweep(path) == 2 and words in capsys.readouterr().err


def test_a_file_that_is_not_yaml_is_refused_with_its_line(tmp_path, capsys):
    (tmp_path / "wrong.yml").write_text("grid:\n  regime: full, seed: 3\n")
    assert _sweep(tmp_path / "wrong.yml") == 2 and "line 2" in capsys.readouterr().err


def test_a_missing_sweep_names_the_ones_there_are(capsys):
    assert main(["sweep", "params/nope.yml"]) == 2 and "quick.yml" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("quick", 7), ("summedits", 9)])
def test_shipped_sweeps_have_as_many_cells_as_regimes(name, count, tmp_path):
    root = Path(__file__).parents[1]
    _, _, cells = read_sweep(root / "params" / f"{name}.yml", tmp_path)
    assert len(cells) == len({cell.run_id for cell in cells}) == count


def test_the_sweep_over_every_row_has_every_row():
    _, _, cells = read_sweep(ROOT / "params" / "every_row.yml")
    assert {cell.params["regime"] for cell in cells} == set(read_regimes()) and len(cells) == len(
        read_regimes()
    )


def test_a_child_ends_with_its_parent(tmp_path):
    script = tmp_path / "asks.py"
    script.write_text(
        "import time\nfrom vramlab.processes import Child\nchild = Child('time:sleep')\n"
        "child.wait_until_loaded()\nchild.send(60)\nprint(child._process.pid, flush=True)\n"
        "child.result()\n"
    )
    asks = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    child = int(asks.stdout.readline())
    asks.kill()
    asks.wait()
    asks.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """A zombie that nobody has asked for yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
