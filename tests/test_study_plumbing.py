"""From a study's file to its cells, its folders and the gallery, with everything that takes time
replaced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

import readme_pictures as pictures
from vramlab.processes import CallResult
from vramlab.runs.parameters import SCHEMA
from vramlab.studies import gallery, plan, runner
from vramlab.studies import run_all as batch
from vramlab.studies import study as lab
from vramlab.studies.claims import REPRODUCED, UNTESTED, Claim
from vramlab.studies.estimates import Figure
from vramlab.studies.plan import PARAMS, Plan, StudyCell, read_plan
from vramlab.studies.study import Lab
from vramlab.training.trainer import Diverged


def written(folder: Path, name: str = "small", **changes) -> Path:
    said = {
        "name": "lomo",
        "says": "s",
        "module": "notebooks/studies/lomo.py",
        "defaults": {"steps": 7, "seed": 1},
        "runs": {
            "bytes": {"call": "m:f", "alone": True, "defaults": {"seq": 64}},
            "quality": {"defaults": {"seed": 2, "lr": 0.5}},
        },
        **changes,
    }
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def ended(folder: Path, cell: StudyCell, outcome: str) -> None:
    (folder / cell.name).mkdir(parents=True)
    (folder / cell.name / "result.json").write_text(
        json.dumps({"schema": SCHEMA, "outcome": outcome, "reason": "r"})
    )


def measuring(*names: str, **more) -> list[StudyCell]:
    return [StudyCell("bytes", {"at": name}, "m:f", **more) for name in names]


# plans --------------------------------------------------------------------------------------------


def test_defaults_are_a_runs_and_an_arms_own_come_last(tmp_path):
    found = read_plan(written(tmp_path))
    assert list(found.arms) == ["bytes", "quality", "proof"] and (
        found.name,
        found.says,
        found.settings,
    ) == ("lomo", "s", {})
    (measured,), (run,) = found.arms["bytes"], found.arms["quality"]
    assert (measured.params, measured.call, measured.alone) == ({"seq": 64}, "m:f", True)
    assert (run.params, run.call, run.alone) == ({"steps": 7, "seed": 2, "lr": 0.5}, "", False)
    assert (
        measured.name.startswith("bytes-")
        and len(measured.name) == len("bytes-") + 10
        and run.name.startswith("full-")
    )
    assert (
        measured.name
        != StudyCell("bytes", {"seq": 65}, "m:f").name
        != StudyCell("bytes", {"seq": 65}, "m:g").name
    )


@pytest.mark.parametrize(
    ("first", "items", "recipe"),
    [
        ({}, 40, "smoke"),
        ({"recipe": "reading", "batch_size": 20}, 40, "smoke"),
        ({"recipe": "standard", "batch_size": 21}, 42, "smoke"),
        ({"recipe": "head"}, 40, "head"),
    ],
)
def test_the_proof_is_the_first_run_made_short(first, items, recipe):
    arms = {
        "a": measuring("x"),
        "b": [StudyCell("b", {"seed": 3, "steps": 90, **first}), StudyCell("b", {"seed": 4})],
    }
    ((proof,),) = plan._proof(arms).values()
    assert proof.params == {
        **first,
        "seed": 3,
        "steps": 2,
        "train_items": items,
        "val_items": 20,
        "test_items": 20,
        "measure": False,
        "recipe": recipe,
    }
    assert proof.arm == "proof" and plan._proof({"a": arms["a"]}) == {}


def test_a_study_is_found_by_name_and_a_missing_one_is_said():
    assert read_plan("lomo").path == PARAMS / "lomo.yml"
    with pytest.raises(FileNotFoundError, match=r"no study lom.*lomo.*there are baichuan2, "):
        read_plan("lom")


def test_a_files_hash_is_of_its_content(tmp_path):
    one = read_plan(written(tmp_path))
    before = one.content_hash()
    one.path.write_text("# more\n" + one.path.read_text())
    assert len(before) == 16 and one.content_hash() == before
    assert read_plan(written(tmp_path, says="t")).content_hash() != before


# cells --------------------------------------------------------------------------------------------


def test_due_is_what_has_not_ended_or_failed(tmp_path):
    cells = measuring("new", "failed", "ok", "diverged", "oom")
    for cell, outcome in zip(cells[1:], ("failed", "ok", "diverged", "oom"), strict=True):
        ended(tmp_path, cell, outcome)
    assert runner.due([(tmp_path, cell) for cell in [*cells, *cells]]) == [
        (tmp_path, cell) for cell in cells[:2]
    ]


def test_what_is_timed_goes_alone_and_a_failure_is_a_line(tmp_path, monkeypatch, capsys):
    together, alone, run = (
        measuring("a", "b"),
        measuring("c", alone=True),
        [StudyCell("quality", {"seed": 9})],
    )
    reading = [StudyCell("bytes", {"recipe": "smoke"}, "m:f")]
    asked, bases = [], []

    def side_by_side(does, items, jobs):
        asked.append((does, [cell for _, cell in items], jobs))
        for at, item in enumerate(items):
            yield item, "no" if at == 1 else "", "ValueError: dead" if item[1] in alone else ""

    monkeypatch.setattr(runner, "side_by_side", side_by_side)
    monkeypatch.setattr(runner, "make_bases", lambda found, progress: bases.extend(found))
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    cells = [(tmp_path, cell) for cell in [*alone, *together, *run, *reading]]
    failed = runner.make(cells, progress=False)
    assert asked == [(runner.run_cell, [*together, *run, *reading], 6), (runner.run_cell, alone, 1)]
    place = tmp_path.name
    assert failed == [
        f"{place}, bytes, {together[1].name}: no",
        f"{place}, bytes, {alone[0].name}: ValueError: dead",
    ]
    assert capsys.readouterr().err.splitlines() == failed
    assert [(base.get("seed"), base["recipe"]) for base in bases] == [
        (9, runner.KNOWN_PARAMETERS["recipe"]),
        (runner.KNOWN_PARAMETERS["seed"], "smoke"),
    ]
    runner.make(cells, jobs=2, progress=False)
    assert [jobs for _, _, jobs in asked[2:]] == [2, 1]


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("x"), "failed"), (Diverged(0, "loss", "x"), "diverged")]
)
def test_a_cell_records_how_it_ended_unless_it_has(tmp_path, monkeypatch, error, outcome):
    def execute(params, target, progress):
        raise error

    monkeypatch.setattr(runner, "execute", execute)
    cell, reason = StudyCell("quality", {"seed": 9}), f"{type(error).__name__}: {error}"
    assert runner.run_cell((tmp_path, cell)) == reason
    said = {"schema": SCHEMA, "outcome": outcome, "reason": reason}
    assert json.loads((tmp_path / cell.name / "result.json").read_text()) == said
    ended(tmp_path / "again", cell, "oom")
    assert runner.run_cell((tmp_path / "again", cell)) == reason
    assert (
        json.loads((tmp_path / "again" / cell.name / "result.json").read_text())["outcome"] == "oom"
    )
    monkeypatch.setattr(runner, "execute", lambda params, target, progress: None)
    assert runner.run_cell((tmp_path / "fine", cell)) == "" and not (tmp_path / "fine").exists()


def test_a_measurement_is_its_table_and_then_its_result(tmp_path):
    cell = StudyCell("bytes", {"data": {"x": [1, 2]}}, "pandas:DataFrame")
    assert runner.run_cell((tmp_path, cell)) == ""
    assert pd.read_parquet(tmp_path / cell.name / "table.parquet")["x"].tolist() == [1, 2]
    assert json.loads((tmp_path / cell.name / "result.json").read_text()) == {
        "schema": SCHEMA,
        "outcome": "ok",
        "reason": "",
        "call": "pandas:DataFrame",
        "params": {"data": {"x": [1, 2]}},
    }


@pytest.mark.slow
def test_a_worker_loads_a_studys_module_by_its_path_which_is_in_no_hash(tmp_path):
    code = "import pandas as pd\ndef f(seq): return pd.DataFrame({'x': [seq]})\n"
    (tmp_path / "beside_a_notebook.py").write_text(code)
    plain = read_plan(written(tmp_path))
    named = read_plan(
        written(tmp_path, "named", calls={"m": str(tmp_path / "beside_a_notebook.py")})
    )
    (cell,) = named.arms["bytes"]
    assert named.content_hash() == plain.content_hash()
    assert cell.name == plain.arms["bytes"][0].name
    assert runner.make([(tmp_path / "runs", cell)], progress=False) == []
    table = pd.read_parquet(tmp_path / "runs" / cell.name / "table.parquet")
    assert table["x"].tolist() == [64]


# all studies --------------------------------------------------------------------------------------


def test_a_study_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    paths, asked = [written(tmp_path, "one"), written(tmp_path, "one-more")], []
    lines = ["one, bytes, x: no", "one-more, bytes, y: no"]
    monkeypatch.setattr(
        batch.runner,
        "make",
        lambda cells, jobs, progress: asked.append((len(cells), jobs, progress)) or lines,
    )
    dry = batch.run(paths, tmp_path / "out", dry_run=True)
    assert (
        dry == [{"study": name, "cells": 3, "due": 3} for name in ("one", "one-more")] and not asked
    )
    (cell,) = read_plan(paths[0]).arms["bytes"]
    ended(tmp_path / "out" / "one", cell, "oom")

    def study(its: Plan, folder: Path, shown) -> dict:
        if its.path.stem == "one":
            raise RuntimeError("broken")
        return {"notebook": str(folder), "verdicts": [], "reason": "", "shown": shown}

    monkeypatch.setattr(batch, "_study", study)
    assert batch.run(paths, tmp_path / "out", tmp_path, 3, quiet=True) == [
        {
            "study": "one",
            "cells": 3,
            "due": 2,
            "failed": lines[:1],
            "reason": "RuntimeError: broken",
        },
        {
            "study": "one-more",
            "cells": 3,
            "due": 3,
            "failed": lines[1:],
            "notebook": str(tmp_path / "out" / "one-more"),
            "verdicts": [],
            "reason": "",
            "shown": tmp_path,
        },
    ]
    assert asked == [(6, 3, False)] and capsys.readouterr().err.startswith("all studies: ")


def test_what_became_of_the_studies_in_words():
    found = [
        {"study": "a", "cells": 3, "due": 2},
        {
            "study": "b",
            "cells": 4,
            "due": 1,
            "failed": ["x"],
            "reason": "E: no",
            "verdicts": [{"verdict": "reproduced", "claim": "c", "why": "w"}],
        },
        {"study": "c", "cells": 5, "due": 5, "failed": [], "reason": ""},
    ]
    assert (
        batch.to_text(found)
        == "a: 3 cells, 2 due\nb: 4 cells, 1 failed; E: no\n  reproduced             c\n"
        "                         w\nc: 5 cells, 0 failed"
    )


def test_a_notebook_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch):
    plan = SimpleNamespace(path=batch.ROOT / "params" / "x.yml", module="notebooks/studies/lomo.py")
    kept = {"log": "", "reason": ""}

    def call_once(target, call, output):
        parameters = {"params_file": "params/x.yml", "out_dir": str(tmp_path)}
        assert call["parameters"] == parameters
        assert call["notebook"].endswith("studies/lomo.ipynb")
        output.write(kept["log"])
        return CallResult(None, kept["reason"])

    monkeypatch.setattr(batch, "call_once", call_once)
    assert batch._notebook(plan, tmp_path) == tmp_path / "study.ipynb"
    for log, reason, words in (
        ("first\nlast\n", "ValueError: x", "lomo.ipynb: last"),
        ("", "its process ended with code 7", "lomo.ipynb: its process ended with code 7"),
    ):
        kept |= {"log": log, "reason": reason}
        with pytest.raises(RuntimeError, match=f"^{words}$"):
            batch._notebook(plan, tmp_path)


# the gallery --------------------------------------------------------------------------------------


def test_what_is_not_in_the_gallery_is_empty_and_decides_nothing(tmp_path, monkeypatch):
    assert gallery.read_figures(tmp_path) == {} == gallery.read_made(tmp_path)
    claims = [
        Claim(name, study, "s", "w", "m", [{"at_most": {"figure": "x", "bound": 1}}])
        for name, study in (("a", "lomo"), ("b", "chunkft"))
    ]
    monkeypatch.setattr(gallery, "read_claims", lambda: claims)
    (tmp_path / "lomo").mkdir()
    (tmp_path / "lomo" / "figures.json").write_text(
        json.dumps({"x": Figure(0.5, "predicted").to_json()})
    )
    (tmp_path / "lomo" / "made.json").write_text('{"cells": 3}')
    assert gallery.read_figures(tmp_path / "lomo")["x"].value == 0.5 and gallery.read_made(
        tmp_path / "lomo"
    ) == {"cells": 3}
    assert [(one.claim.id, one.word) for one in gallery.verdicts(tmp_path)] == [
        ("a", REPRODUCED),
        ("b", UNTESTED),
    ]


def test_a_lab_is_written_without_the_machines_paths(tmp_path, monkeypatch):
    its, kept = read_plan(written(tmp_path)), []
    one = Lab(
        its,
        tmp_path,
        SimpleNamespace(write=lambda folder: (folder.mkdir(parents=True), kept.append(folder))),
    )
    one.__dict__["figures"] = {"x": Figure(0.5, "predicted")}
    notebook = tmp_path / "done.ipynb"
    notebook.write_text(
        json.dumps(
            {
                "metadata": {"papermill": {"input_path": "a", "output_path": "b", "duration": 1}},
                "cells": [f"{lab.ROOT}/lib/x"],
            }
        )
    )
    folder = one.write(notebook, tmp_path / "gallery")
    assert folder == tmp_path / "gallery" / "small" and kept == [folder / "records"]
    assert gallery.read_figures(folder)["x"].value == 0.5
    made = gallery.read_made(folder)
    assert {name: made[name] for name in ("study", "file", "cells", "params_hash")} == {
        "study": "lomo",
        "file": "small.yml",
        "cells": 3,
        "params_hash": its.content_hash(),
    }
    assert json.loads((folder / "study.ipynb").read_text()) == {
        "metadata": {"papermill": {"duration": 1}},
        "cells": ["lib/x"],
    }
    claims = [
        Claim(study, study, "s", "w", "m", [{"at_most": {"figure": "x", "bound": 1}}])
        for study in ("lomo", "chunkft")
    ]
    monkeypatch.setattr(lab.claims, "read_claims", lambda: claims)
    assert [verdict.claim.id for verdict in one.verdicts()] == ["lomo"]


def test_a_lab_runs_what_is_due_where_it_was_asked(tmp_path, monkeypatch):
    path, asked = written(tmp_path), []
    monkeypatch.setattr(
        lab.runner, "make", lambda cells, jobs, progress: asked.append((cells, jobs, progress))
    )
    monkeypatch.setattr(lab, "OUTPUTS", tmp_path / "outputs")
    assert Lab.of(path, tmp_path / "here", 3, False).folder == tmp_path / "here"
    assert Lab.of(path).folder == tmp_path / "outputs" / "small"
    (cells, *how), (others, *rest) = asked
    assert (
        how == [3, False]
        and rest == [0, True]
        and [folder for folder, _ in cells] == [tmp_path / "here"] * 3
    )
    assert [cell.name for _, cell in others] == [cell.name for cell in read_plan(path).every_cell()]


def test_pictures_need_a_browser(tmp_path, monkeypatch):
    pytest.importorskip("playwright.sync_api")
    monkeypatch.setattr(pictures, "browser", lambda: None)
    with pytest.raises(RuntimeError, match="no Chromium is here"):
        pictures.take(tmp_path)
    assert not (tmp_path / "pictures").exists()
