"""The study of ChunkFT: distances between trainings, exact slices, costs of cycles, and figures
from runs of a few steps."""

import math

import pytest
import torch
import yaml

import chunkft
from chunkft_trajectories import apart, gaps, layer_of, sliced
from vramlab.studies import runner
from vramlab.studies.measurements import cost
from vramlab.studies.plan import read_plan
from vramlab.studies.records import Records
from vramlab.studies.study import Lab

SMOKE = {
    "recipe": "smoke",
    "steps": 3,
    "train_items": 40,
    "val_items": 20,
    "test_items": 20,
    "test_domains": "news",
    "lr": 2.5e-3,
    "test_shifts": "none",
    "measure": False,
    "batch_size": 2,
    "max_length": 128,
    "threads": 1,
}


def chunks(count, state="host"):
    return {"trains": {"chunks": {"count": count, "interval": 1, "state": state}}}


def test_gaps_by_hand():
    name = "model.layers.1.mlp.weight"
    base, one, other = (
        {name: torch.tensor(a), "lm_head.weight": torch.tensor(b)}
        for a, b in (([1.0, 1.0], [0.0]), ([1.0, 4.0], [0.0]), ([5.0, 1.0], [0.0]))
    )
    block, head, every = gaps(base, one, other)
    assert (
        block["layer"],
        block["distance"],
        block["travelled"],
        block["relative"],
        block["cosine"],
    ) == ("block 1", 5, 4, 1.25, 0)
    assert (
        head["layer"] == "head" and math.isnan(head["relative"]) and math.isnan(head["cosine"])
    )  # neither has gone anywhere
    assert every["layer"] == "all" and every["relative"] == 1.25
    assert [layer_of(name) for name in ("model.embed_tokens.weight", "model.norm.weight")] == [
        "embeddings",
        "head",
    ]


def test_one_chunk_goes_where_dense_goes_and_eight_do_not():
    rows = {
        "dense": {"regime": "full"},
        "one": {"regime": "chunkft", "axes": chunks(1)},
        "eight": {"regime": "chunkft"},
        "other data": {"regime": "full", "seed": 1000},
    }
    table = apart(
        0, SMOKE, rows, [["one", "dense"], ["eight", "dense"], ["other data", "dense"]], [0.3, 1.0]
    )
    total = table[table["layer"] == "all"].set_index(["row", "progress"])["distance"]
    assert (
        (total["one"] == 0).all() and (total["eight"] > 0).all() and (total["other data"] > 0).all()
    )
    ends = table[(table["row"] == "eight") & (table["progress"] == 1.0)].set_index("layer")
    squares = ends["distance"] ** 2
    assert (
        squares.drop("all").sum() == pytest.approx(squares["all"]) and len(ends) == 8
    )  # five blocks, both ends, all
    # after three steps of eight chunks the last chunks have had no turn: their distance is all of
    # dense training's way
    assert ends.at["block 4", "relative"] == 1.0 and ends.at["embeddings", "relative"] < 1.0


def test_slices_are_exact_and_as_small_as_they_should_be():
    found = sliced(7).iloc[0]
    assert found["error"] < 1e-12
    assert found["dense_bytes"] / 7 == pytest.approx(found["chunk_bytes"], rel=0.02)


def test_cost_counts_whole_cycles_and_updates():
    table = cost(
        "tiny", {"full": {"regime": "full"}, "hift": {"regime": "hift"}}, seq=16, rounds=2
    ).set_index("row")
    assert set(table.loc["hift", "steps"]) == {14} and set(table.loc["full", "steps"]) == {
        8
    }  # seven units have two turns each
    assert set(table.loc["full", "updates"]) == {1000} and set(table.loc["hift", "least"]) == {142}
    assert (table["step_s"] > 0).all() and set(table["round"]) == {0, 1}


def test_figures_from_runs(tmp_path):
    said = {
        "name": "chunkft",
        "says": "a test",
        "module": "notebooks/studies/chunkft.py",
        "defaults": {**SMOKE, "regime": "chunkft"},
        "settings": {"published_gib": 13.72},
        "pairs": {
            "AdamW, equal tokens": {
                "arm": "budgets",
                "one": {"regime": "chunkft"},
                "other": {"regime": "full"},
                "equal": "tokens",
            },
            "law": {
                "arm": "budgets",
                "one": {"regime": "lomo"},
                "other": {"regime": "full"},
                "equal": "tokens",
            },
        },
        "runs": {
            "budgets": {"grid": {"with": [{"axes": chunks(8)}, {"regime": "full"}], "seed": [1]}},
            "count": {"grid": {"with": [{"regime": "full"}, {"axes": chunks(8)}], "seed": [1]}},
            "identity": {"grid": {"with": [{"axes": chunks(1)}, {"regime": "full"}], "seed": [1]}},
        },
    }
    path = tmp_path / "small.yml"
    path.write_text(yaml.safe_dump(said))
    plan = read_plan(path)
    assert [
        runner.run_cell((tmp_path / "runs", cell))
        for cell in plan.every_cell()
        if cell.arm != "proof"
    ] == [""] * 3
    found = chunkft.figures(Lab(plan, tmp_path, Records.of(plan, tmp_path / "runs")))
    assert found["seeds_that_differ.K=1"].value == 0 and found["seeds_that_differ.K=1"].seeds == 1
    assert (
        found["accuracy.AdamW, equal tokens"].equal == "tokens"
        and found["loss.AdamW, equal tokens"].value > 0
    )
    assert {"balanced.K=1", "final_loss.K=8"} <= set(found)
    assert not [
        name
        for name in found
        if name.startswith(("accuracy.law", "seeds_that_differ.device", "peak.", "distance."))
    ]
