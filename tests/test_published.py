"""What is for the published 7B runs from end to end here, with tiny weights in the published
formats."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml

import micro
import released
from vramlab.cli import main
from vramlab.files import ROOT
from vramlab.regimes.regime import read_regimes
from vramlab.runs import preparation
from vramlab.runs.execute import execute
from vramlab.runs.folder import Run
from vramlab.runs.parameters import KNOWN_PARAMETERS, resolve
from vramlab.runs.sweep import read_sweep

FILE = ROOT / "params" / "baichuan2-7b-factcc.yml"
SENTENCES = [
    "The council met on Monday.",
    "It rained in Oslo for nine days.",
    "Anna Berg was not hired.",
    "He paid $40 for books.",
    "Mr. Holm said they will leave.",
    "Prices rose by two percent in May.",
    "A dog bit the mayor of Riga.",
]


def _data(tmp_path):
    """FactCC's release with eight documents of three sentences, the claims of each cut or kept, and
    the articles."""
    documents = {
        f"cnn/stories/{i}.story": [SENTENCES[(i + step) % 7] for step in (0, 2, 3)]
        for i in range(8)
    }
    rows = [
        {
            "id": str(i),
            "claim": (
                said[i % 3] if true else said[i % 3].replace("The", "No").replace(".", " again.")
            ),
            "label": "CORRECT" if true else "INCORRECT",
            "filepath": f"cnndm/{name}",
        }
        for i, (name, said) in enumerate(documents.items())
        for true in (True, False)
    ]
    released.factcc(
        tmp_path,
        {"train": rows[:10], "val": rows[10:12], "test": rows[12:]},
        {name: "\n\n".join(said) for name, said in documents.items()},
    )


def _given(tmp_path, monkeypatch, cell: dict) -> dict:
    """A cell's parameters with everything downloaded in `tmp_path`, and as few steps as show
    something."""
    monkeypatch.chdir(tmp_path)
    for split, file in released.FACTCC.items():
        assert (
            main(
                [
                    "items",
                    f"factcc/{file}",
                    "--stories",
                    "stories",
                    "--write",
                    f"items/data-{split}.jsonl",
                    "--json",
                ]
            )
            == 0
        )
    (tmp_path / "model.yml").write_text(
        yaml.safe_dump(
            {"name": "tiny-7b", "path": str(tmp_path / "weights"), "config": {"position": "rope"}}
        )
    )
    return {
        **cell,
        "model": str(tmp_path / "model.yml"),
        "items": "items",
        "checker": "checker",
        "device": "cpu",
        "steps": min(4, cell["steps"]),
        "measure": False,
        "max_length": 256,
    }


@pytest.fixture
def downloads(tmp_path):
    """Weights, data and checker."""
    (tmp_path / "items").mkdir()
    _data(tmp_path)
    released.checkpoint(
        tmp_path / "weights", micro.model(vocab_size=530, max_position_embeddings=4096), shards=2
    )
    released.tokenizer(tmp_path / "weights", [*SENTENCES, "yes", "no", "\nClaim:"] * 9, 530)
    words = sorted({word.lower() for text in SENTENCES for word in text[:-1].split()})
    released.checker(tmp_path / "checker", ["CORRECT", "INCORRECT"], [*words, "."])
    return tmp_path


def test_the_published_files_go_through_a_run_on_a_cpu(downloads, monkeypatch, capsys):
    cell = next(cell for cell in read_sweep(FILE)[2] if cell.params["regime"] == "badam")
    run = Run(execute(_given(downloads, monkeypatch, cell.full), downloads / "run", progress=False))
    assert (
        run.ok
        and run.result["base"] == {"path": "weights", "recipe": "published weights"}
        and run.result["problems"] == []
    )
    assert (
        run.params["weights"] == cell.params.get("weights", "bf16_sr")
        and run.result["truncated_share"] == 0
    )
    scores = run.scores
    assert list(scores["split"]) == ["val"] * 2 + ["test"] * 4 and scores["yesno"].notna().all()
    written, said = pd.read_parquet(run.folder / "generation.parquet"), run.result["generation"]
    assert said["documents"] == len(written) == 2 == written["group"].nunique()  # of four claims
    assert said["consistent_is"] == "CORRECT" and {row["judge"] for row in said["shares"]} == {
        "checker"
    }
    assert {row["call"]: row["count"] for row in said["shares"]} == {
        call: int((written["checker"] == call).sum())
        for call in ("consistent", "inconsistent", "unreadable")
    }
    described = json.loads(capsys.readouterr().out.split("\n}\n")[-2] + "}")
    assert (
        described["missing_articles"] == 0
        and "503 items, 441 consistent" in described["problems"][0]["message"]
    )


def test_every_row_of_the_file_is_one_that_can_be_run():
    notebook, _, cells = read_sweep(FILE)
    assert notebook.exists() and len({cell.run_id for cell in cells}) == len(cells)
    rows = read_regimes()
    for cell in cells:  # resolved when they were read
        assert (
            cell.full["device"] == "cuda"
            and cell.full["model"] == "baichuan2-7b"
            and cell.full["generate"]
        )
        # no row trains the 7B with the rate of the tiny model
        assert (
            cell.params["regime"] == "zero_shot"
            or 0 < cell.params["lr"] < rows[cell.params["regime"]].lr
        )


def test_a_published_shape_without_its_weights_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="baichuan2-7b has no weights.*path:"):
        preparation.base_of(
            {**KNOWN_PARAMETERS, "model": "baichuan2-7b", "recipe": "smoke"}, progress=False
        )


def test_a_checker_is_refused_before_training_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "prepare", lambda *_: pytest.fail("a model was prepared"))
    with pytest.raises(ValueError, match="no config.json"):
        execute({"generate": 1, "checker": str(tmp_path)}, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="set generate"):
        resolve({"checker": "somewhere"})


def test_a_grids_with_sets_several_parameters_at_once(tmp_path):
    file = tmp_path / "some.yml"
    grid = {"with": [{"regime": "lomo", "lr": 0.01}, {"regime": "lora"}], "seed": [0, 1]}
    file.write_text(yaml.safe_dump({"defaults": {"lr": 0.5}, "grid": grid}, sort_keys=False))
    assert [
        (cell.params["regime"], cell.params["lr"], cell.params["seed"])
        for cell in read_sweep(file)[2]
    ] == [("lomo", 0.01, 0), ("lomo", 0.01, 1), ("lora", 0.5, 0), ("lora", 0.5, 1)]
    file.write_text(yaml.safe_dump({"grid": {"with": ["lomo"]}}))
    with pytest.raises(ValueError, match="grid.with has 'lomo'"):
        read_sweep(file)
