"""A run's parameters end in a run or in one error that names what is wrong: nothing heavy begins
before, and no loop waits."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import SMALL
from vramlab.baichuan import BaichuanTokenizer
from vramlab.baichuan.tokenizer import train_tokenizer
from vramlab.factcc.base.curriculum import checked_batches
from vramlab.factcc.dataset import dataset
from vramlab.factcc.generator import GeneratorConfig, generate_items
from vramlab.factcc.prompt import check_room, sequences, training_batches
from vramlab.files import ROOT
from vramlab.runs import preparation
from vramlab.runs.execute import execute
from vramlab.runs.parameters import KNOWN_PARAMETERS, resolve
from vramlab.runs.sweep import read_sweep
from vramlab.studies.plan import PARAMS, read_plan

WRONG = {
    "lr": [math.nan, math.inf, -1.0, 10**400, "1e-3", True, None],
    "steps": [0, -1, 10**10, 1.0, "4", True, None, [4]],
    "batch_size": [0, -4, 33, 10**9, 2.0],
    "max_length": [0, -1, 15, 10**9],
    "records": [0, 1, 4, 10**6],
    "train_items": [0, -1, 10**12],
    "val_items": [0, -1],
    "test_items": [0, -1],
    "seed": [-1, 2**32, 0.5],
    "data_seed": [-1, 2**32],
    "threads": [-1, 10**6],
    "limit_mib": [-1.0, math.nan, math.inf],
    "generate": [-1],
    "device": ["", "gpu", "tpu", "cuda:", "cuda:-1", "cpu:0:1", "mps"],
    "objective": ["", "all"],
    "task": ["", "claim"],
    "recipe": ["", "quick"],
    "weights": ["fp8", "bf61"],
    "train_domain": ["", "sports"],
    "test_domains": ["sports"],
    "test_shifts": ["far", "severe"],
    "model": ["tyni", "", "/nowhere.yml"],
    "regime": ["lomoo", ""],
    "measure": [1, "yes", None],
    "config": [
        {"norm": 1},
        {"hidden_size": 97},
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        [],
    ],
    "axes": [
        {"acts": "chekpoint"},
        {"act": "keep"},
        {"accumulate": 0},
        {"trains": {"lora": {"rank": "x"}}},
        {"acts": []},
        "lora",
    ],
    "checker": ["a/folder"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_cannot_work_is_refused_by_name_and_value(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError) as raised:
            resolve({**SMALL, name: value})
        text = str(raised.value)
        assert name in text, text
        if not isinstance(value, dict | list) and value != 10**400:
            assert repr(value).strip("'") in text, text
        assert len(text) < 2000


def test_every_parameter_is_tried():
    assert set(WRONG) == set(KNOWN_PARAMETERS) - {"items", "watch_logits"}


def test_all_that_is_wrong_is_one_error():
    with pytest.raises(ValueError) as raised:
        resolve(
            {
                "lr": math.nan,
                "steps": 0,
                "batch_size": 0,
                "threads": -1,
                "device": "gpu",
                "regim": "lomo",
                "regime": "lomoo",
                "model": "tyni",
            }
        )
    text = str(raised.value)
    assert text.startswith("8 parameters cannot work:") and text.count("\n  - ") == 8
    for words in (
        "lr is nan: use a finite number above 0",
        "steps is 0: use 1 to",
        "batch_size is 0: use 1 to",
        "threads is -1: use 0 to 1,024",
        "device is 'gpu': use cpu, cuda",
        "unknown parameter 'regim' (did you mean regime?)",
        "lomoo",
        "tyni",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("items", "batch_size", "domain"),
    [
        (64, 32, "news"),
        (64, 33, "news"),
        (1, 2, "news"),
        (1, 3, "news"),
        (1, 8, "all"),
        (1, 9, "all"),
        (4, 2, "law"),
        (5, 4, "law"),
        (5, 5, "law"),
    ],
)
@pytest.mark.parametrize("task", ["claims", "questions"])
def test_the_most_sequences_a_batch_may_have_are_those_that_come(items, batch_size, domain, task):
    """What the parameters are refused for is exactly what the generated items could not fill half a
    batch of."""
    asked = {
        **SMALL,
        "train_items": items,
        "batch_size": batch_size,
        "train_domain": domain,
        "task": task,
        "val_items": 1,
        "test_items": 1,
    }
    count = len(sequences(dataset({**KNOWN_PARAMETERS, **asked}).train, random.Random(0)))
    if 2 * count >= batch_size:
        assert resolve(asked)["batch_size"] == batch_size
    else:
        with pytest.raises(
            ValueError,
            match=(
                f"batch_size is {batch_size} and train_items {items}.*size of {2 * count} at most"
            ),
        ):
            resolve(asked)


def test_nothing_heavy_begins_before_the_parameters_and_the_data_are_right(tmp_path, monkeypatch):
    def heavy(*_):
        raise AssertionError("a base was begun")

    monkeypatch.setattr(preparation, "base_of", heavy)
    for wrong in (
        {"train_items": 64, "batch_size": 33},
        {"lr": math.nan},
        {"steps": 0},
        {"items": "nowhere"},
    ):
        with pytest.raises(ValueError, match="|".join(wrong)):
            execute({**SMALL, **wrong}, tmp_path / "r", progress=False)
    sweep = tmp_path / "s.yml"
    sweep.write_text("grid: {regime: [full], threads: [-1]}")
    with pytest.raises(ValueError, match="threads is -1: use 0 to"):
        read_sweep(sweep)


@pytest.mark.slow
def test_every_file_of_params_asks_for_runs_that_can_work():
    for path in (ROOT / "params").glob("*.yml"):
        if "\ngrid:" in path.read_text():
            assert read_sweep(path)[2]
    for path in PARAMS.glob("*.yml"):  # a seed more is no other question
        cells = [
            {**cell.params, "seed": 0} for cell in read_plan(path).every_cell() if not cell.call
        ]
        assert all(map(resolve, {json.dumps(params): params for params in cells}.values()))


SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=9),
)
VALUES = (
    SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=9), SIMPLE, max_size=3)
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(KNOWN_PARAMETERS)), st.text(max_size=12)),
        VALUES,
        max_size=5,
    )
)
@example({"steps": 10**400})
@example({"config": {"vocab_size": -5, "position": []}})
@example({"axes": {"rule": {"adamw": {"beta1": "x"}}, "clip": "x"}})
@example({"axes": {"lr": math.nan}})
def test_any_parameters_end_in_a_resolved_run_or_one_error_of_ours(params):
    began = time.process_time()
    try:
        full = resolve(params)
    except ValueError as error:
        assert (
            any(repr(name)[1:20].rstrip("'\"") in str(error) for name in params)
            and len(str(error)) < 8000
        )
    else:
        assert 0 < full["lr"] < math.inf and full["steps"] >= 1 and full["batch_size"] >= 1
    assert time.process_time() - began < 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    items = [
        item for domain in ("news", "general") for item in generate_items(domain, "train", 200, 0)
    ]
    texts = [*(f"{item.doc} {item.claim}" for item in items), *["yes", "no"] * 400]
    return BaichuanTokenizer(
        str(train_tokenizer(texts, tmp_path_factory.mktemp("pieces") / "tokenizer.model", 1000))
    )


ITEMS = generate_items("news", "train", 40, 0, config=GeneratorConfig(claims=4))


@pytest.mark.parametrize("count", [0, 1, 4, 8, 40])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 20, 21])
def test_a_loop_over_batches_yields_or_raises(tokenizer, count, batch_size):
    made = len(sequences(ITEMS[:count], random.Random(0)))
    for loop, enough in (
        (training_batches(tokenizer, ITEMS[:count], batch_size, 256, 0), 2 * made >= batch_size),
        (checked_batches(tokenizer, ITEMS[:count], batch_size, 0), made >= batch_size),
    ):
        if enough:
            assert all(len(next(loop)["input_ids"]) <= batch_size for _ in range(3))
        else:
            with pytest.raises(
                ValueError,
                match=f"batch_size is {batch_size}, and the {count} items .* make {made} sequences",
            ):
                next(loop)


def test_a_claim_that_leaves_no_room_is_refused_before_training(tokenizer):
    """Among the items to be scored, which training never meets; whatever the length of the
    documents."""
    long = replace(ITEMS[0], uid="long", claim=" ".join([ITEMS[0].claim] * 30), doc="")
    check_room(tokenizer, [[item] for item in ITEMS], 256)
    with pytest.raises(
        ValueError,
        match=(
            "item long: its 1 claims leave no room for the document in max_length 256: raise"
            " max_len"
        ),
    ):
        check_room(tokenizer, [[item] for item in (*ITEMS, long)], 256)
