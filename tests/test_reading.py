"""Every reader of YAML ends in a result or in one error that names the file, whatever the file
holds and whatever it is."""

from __future__ import annotations

import os
import random

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regimes
from hostile import SCALARS, YAML, changed, ends, no_files, refused
from vramlab import cards
from vramlab.baichuan import read_model_file
from vramlab.files import ROOT, write_table
from vramlab.forecast.chart import read_atlas
from vramlab.reading import BadFile, nearest, read_json, read_table, read_yaml
from vramlab.regimes import regime
from vramlab.runs.folder import Run
from vramlab.runs.sweep import read_sweep
from vramlab.studies.claims import read_claims
from vramlab.studies.plan import read_plan

PARAMS = ROOT / "params"
READERS = {
    "sweep": lambda path: read_sweep(path, path.parent),
    "study": read_plan,
    "claims": read_claims,
    "atlas": read_atlas,
    "cards": cards.read_cards,
    "published": regimes.read_study,
    "run": lambda path: Run(path.parent).params,
    "regimes": regime.read_regimes,
    "model": read_model_file,
}
SMALL = {
    "sweep": {
        "name": "mine",
        "notebook": "notebooks/finetune.ipynb",
        "defaults": {"steps": 3, "recipe": "smoke"},
        "grid": {"regime": ["full", "lomo"], "with": [{"seed": 1}]},
    },
    "study": {
        "name": "lomo",
        "says": "x",
        "module": "x.py",
        "defaults": {"steps": 3},
        "settings": {"a": 1},
        "pairs": {
            "p": {
                "arm": "a",
                "one": {"regime": "lomo"},
                "other": {"regime": "full"},
                "equal": "tokens",
            }
        },
        "runs": {
            "a": {"says": "y", "grid": {"regime": ["full", "lomo"]}, "defaults": {"seed": 2}},
            "b": {
                "call": "vramlab.studies.measurements:predicted",
                "alone": True,
                "grid": {"seq": [1, 2]},
            },
        },
    },
    "claims": {
        "c": {
            "study": "lomo",
            "source": "s",
            "words": "w",
            "statement": "t",
            "runs": ["a"],
            "quoted": {"figure": "1", "of": "x", "how": "paper"},
            "rule": [
                {"at_most": {"figure": "f", "bound": 3}},
                {"within": {"figure": "g", "low": 0, "high": 0.5}},
            ],
        }
    },
    "atlas": {
        "name": "a",
        "models": ["tiny"],
        "seq": [8, 16],
        "batch": [1],
        "regimes": ["full"],
        "weights": ["", "bf16"],
        "cards": ["rtx4090"],
        "allocators": ["expandable_segments:True"],
        "worlds": [1, 8],
        "world_seq": 16,
    },
    "cards": {"mine": yaml.safe_load((PARAMS / "cards.yml").read_text())["rtx4090"]},
    "published": {
        "families": {"f": {"title": "t", "shown": ["full"], "rest": []}},
        "quotes": {"full": {"figure": "1", "of": "x", "by": "authors", "source": "s"}},
    },
    "run": {"regime": "full", "model": "tiny", "seed": 0, "train_domain": "news", "batch_size": 4},
}


def _path(folder, name):
    return folder / ("params.yml" if name == "run" else f"{name}.yml")


@pytest.mark.parametrize("name", READERS)
def test_yaml_that_is_nothing_a_reader_takes_is_refused_by_name(name, tmp_path):
    path = _path(tmp_path, name)
    for content in YAML:
        path.write_bytes(content)
        assert refused(ends(lambda: READERS[name](path)), path), content[:60]


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_and_nothing_hangs(name, tmp_path):
    for number, path in enumerate(no_files(tmp_path / "no files", ".yml")):
        if name == "run":
            (tmp_path / str(number)).mkdir()
            target = tmp_path / str(number) / "params.yml"
            path = path.rename(target) if os.path.lexists(path) else target
        assert isinstance(ends(lambda: READERS[name](path)), OSError | BadFile), path  # noqa: B023, it has ended


@pytest.mark.parametrize("name", SMALL)
def test_one_value_of_another_type_ends_in_a_result_or_in_an_error_that_names_the_file(
    name, tmp_path
):
    path, tried = _path(tmp_path, name), []

    @settings(
        max_examples=80,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(changed(SMALL[name], keep=("axes", "config")))
    def one(content):
        path.write_text(yaml.safe_dump(content))
        tried.append(refused(ends(lambda: READERS[name](path)), path))

    path.write_text(yaml.safe_dump(SMALL[name]))
    READERS[name](path)
    one()
    assert len(tried) >= 40 and any(tried)


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "twice.yml"
    path.write_text("grid:\n  regime: [full]\n  seed: [0]\n  regime: [lomo]\n")
    with pytest.raises(BadFile, match="twice.yml, line 4.*'regime' stands twice"):
        read_yaml(path)
    path.write_text("base: &base {a: 1, b: 2}\nmine: {<<: *base, a: 3}\n")
    assert read_yaml(path)["mine"] == {
        "a": 3,
        "b": 2,
    }, "a merge may be overridden, that is what it is for"


@pytest.mark.parametrize("text", ["1e-3", "2E1", "+.5e-2", "5.e1", "1.0e+1"])
def test_a_number_with_an_exponent_is_a_number_in_every_file(text, tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(f"grid: {{regime: [full], lr: [{text}]}}\n")
    assert read_sweep(path, tmp_path)[2][0].params["lr"] == float(text)
    path.write_text(
        (PARAMS / "models" / "tiny.yml").read_text().replace("range: 0.07", f"range: {text}")
    )
    assert read_model_file(path).config.initializer_range == float(text)
    path.write_text(f"a: [{text}, '{text}', e1, 1e, e-3x, 0x1e3]")
    assert read_yaml(path)["a"] == [float(text), text, "e1", "1e", "e-3x", 0x1E3]


def test_shipped_files_read_as_yaml_reads_them():
    for path in PARAMS.rglob("*.yml"):
        assert read_yaml(path) == yaml.safe_load(path.read_text())


@given(st.binary(max_size=300))
@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_bytes_as_json_or_yaml_end_in_a_mapping_or_a_named_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    for read in (read_json, read_yaml):
        found = ends(lambda: read(path))  # noqa: B023
        assert refused(found, path) or isinstance(found, dict)


def test_damage_anywhere_in_a_table_is_noticed(tmp_path):
    path, rng = tmp_path / "a.parquet", random.Random(0)
    frame = pd.DataFrame(
        {
            "loss": np.random.default_rng(0).random(300),
            "phase": ["forward", "backward", "update"] * 100,
        }
    )
    write_table(frame, path)
    whole, silent = path.read_bytes(), 0
    for _ in range(150):
        at = rng.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        )
        found = ends(lambda: read_table(path))
        # names of columns have no checksum: a table without the columns its readers name is refused
        # by them (see `Run.missing`)
        silent += (
            not refused(found, path) and {*frame} <= {*found} and not found[[*frame]].equals(frame)
        )
        path.write_bytes(whole[: rng.randrange(len(whole))])
        assert refused(ends(lambda: read_table(path)), path)
    assert silent == 0


def test_the_nearest_known_name_is_offered():
    assert (
        nearest("lorra", ["lora", "lomo", "full"]) == " (did you mean lora?)"
        and nearest("xyz", ["lora"]) == ""
    )
    assert all(isinstance(nearest(value, ["lora"]), str) for value in SCALARS)
