"""Model files, config.json, cards and rows: every input ends in a result, or in one error of ours
that names file and value."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vramlab.baichuan import BaichuanConfig, ModelSpec, read_model_file
from vramlab.baichuan.config import config_of
from vramlab.baichuan.features import UNSUPPORTED
from vramlab.baichuan.loading import BadCheckpoint, load_model
from vramlab.cards import CARDS_FILE, card, read_cards
from vramlab.reading import BadFile
from vramlab.regimes.parameters import model_file, model_spec
from vramlab.regimes.regime import read_regimes

TINY = yaml.safe_load(model_file("tiny").read_text())
CARD = {"card": yaml.safe_load(CARDS_FILE.read_text())["rtx4090"]}
ROWS = {"mine": {"rule": {"adamw": {"beta1": 0.9}}, "acts": "checkpoint", "clip": 1.0}}
PUBLISHED = {
    "baichuan2-7b": {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "z_loss_weight": 0,
    },
    "baichuan2-13b": {
        "_from_model_config": True,
        "gradient_checkpointing": [False],
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
ALIKE = {
    "model_type": "baichuan",
    "vocab_size": 125696,
    "model_max_length": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "4.29.2",
    "tokenizer_class": "BaichuanTokenizer",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_the_model_files_say(tmp_path, name):
    config, ours = config_of({**ALIKE, **PUBLISHED[name]}), model_spec(name).config
    same = (
        "position",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "norm_head",
        "dtype",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    assert {field: getattr(config, field) for field in same} == {
        field: getattr(ours, field) for field in same
    }
    config.save_pretrained(tmp_path)  # what we save is read again
    assert (
        ModelSpec(
            "x", config_of(json.loads((tmp_path / "config.json").read_text())), None
        ).fingerprint()
        == ModelSpec("x", config, None).fingerprint()
    )


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-7b", "llama-3-8b", "llama-65b"])
def test_llama_files_have_a_plain_head(name):
    assert model_spec(name).config.norm_head is False


ASKS = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "model_type": "llama",
    "rope_ratio": 2,
    "partial_rotary_factor": 0.5,
    "pretraining_tp": 2,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn"},
    "quantization_config": {"bits": 4},
    "sliding_window": 4096,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_feature_that_a_baichuan_2_lacks_is_refused_by_name_on_every_path(tmp_path, name):
    value = ASKS.get(name, True)
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump({**TINY, "config": {**TINY["config"], name: value}}))
    (tmp_path / "config.json").write_text(
        json.dumps({**ALIKE, **PUBLISHED["baichuan2-7b"], name: value})
    )
    for read in (
        lambda: read_model_file(file),
        lambda: BaichuanConfig(**TINY["config"], **{name: value}),
        lambda: model_spec("tiny", {name: value}),
        lambda: load_model(tmp_path),
    ):
        with pytest.raises((ValueError, BadCheckpoint), match=name):
            read()


def test_what_a_baichuan_2_has_anyway_may_be_said():
    said = {
        "num_key_value_heads": 4,
        "head_dim": 24,
        "rope_scaling": None,
        "attention_bias": False,
        "sliding_window": None,
    }
    assert config_of({**TINY["config"], **said}).head_dim == 24


@pytest.mark.parametrize("name, value", [("max_position_embeddings", 0), ("position", "")])
def test_an_empty_value_is_not_taken_for_a_missing_one(name, value):
    with pytest.raises(ValueError, match=f"config: {name} is {value!r}: use "):
        config_of({"hidden_size": 4096, "num_hidden_layers": 32, name: value})


def test_a_typo_is_refused_with_the_nearest_key(tmp_path):
    wrong = {
        ("intermediat_size" if name == "intermediate_size" else name): value
        for name, value in TINY["config"].items()
    }
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump({**TINY, "config": wrong}))
    with pytest.raises(
        ValueError,
        match=r"mine.yml: config: .*'intermediat_size' \(did you mean intermediate_size\?\)",
    ):
        read_model_file(file)


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "a/", "..", ".", "", "a\0b", "n" * 300])
def test_a_models_name_is_one_folders(tmp_path, name):
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump({**TINY, "name": name}))
    with pytest.raises(BadFile, match="mine.yml has the name .*one folder"):
        read_model_file(file)


# every input --------------------------------------------------------------------------------------

READERS = {
    "model": (read_model_file, TINY),
    "cards": (read_cards, CARD),
    "rows": (read_regimes, ROWS),
}
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    10**30,
    10**400,
    1.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "1e-3",
    "\ud7ff\0",
    "baichuan2-7b",
    [],
    [1, 2],
    [[]],
    ["x", None],
    {},
    {"x": 1},
    {"x": {"y": []}},
    "a" * 5000,
    list(range(50)),
]


def _paths(content, path=()):
    yield path
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from _paths(value, (*path, key))


def _put(content, path, value):
    if not path:
        return value
    changed = copy.deepcopy(content)
    within = changed
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = value
    return changed


def _ends(kind: str, file: Path) -> bool:
    """Whether it was read; else it was refused in words that name the file."""
    try:
        READERS[kind][0](file)
    except ValueError as error:
        words = str(error)
        assert words and len(words) < 6000 and (file.name in words or kind == "rows"), words
        return False
    return True


@pytest.mark.parametrize("kind", ["model", "cards"])  # values of a row: see test_regime
def test_any_value_at_any_place_is_read_or_refused(tmp_path, kind):
    content, count, read = READERS[kind][1], 0, 0
    for path in _paths(content):
        for value in VALUES:
            file = tmp_path / "mine.yml"
            file.write_text(
                yaml.safe_dump(_put(content, path, value), allow_unicode=True), encoding="utf-8"
            )
            count, read = count + 1, read + _ends(kind, file)
    assert count >= 29 * 5 and 0 < read < count / 2, (count, read)


JUNK = {
    "empty": b"",
    "space": b" \n\n",
    "mark": b"\xef\xbb\xbf",
    "list": b"- a\n- b\n",
    "text": b"name",
    "number": b"12",
    "not utf-8": b"name: \xff\xfe",
    "utf-16": "name: x".encode("utf-16"),
    "twice": b"name: a\nname: b\n",
    "tag": b"name: !!int x\n",
    "python": b"name: !!python/object/apply:os.getcwd []\n",
    "deep": b"[" * 1500,
    "keys": b"1: 2\n[a]: 3\n",
    "half": b"name: {a: [",
    "tab": b"name:\n\t- x\n",
    "many": b"a: [" + b"1," * 300_000 + b"]\n",
    "nul": b"name: a\0b\n",
    "date": b"name: 2020-13-45\n",
    "digits": b"name: " + b"9" * 6000,
    "hex": b"name: 0x" + b"f" * 6000,
    "two": b"name: a\n---\nname: b\n",
    "merge": b"<<: 3\n",
    "aliases": (
        b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
        )
    ),
    "self": b"a: &a [*a]\n",
    "null": b"null\n",
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_such_file_is_refused_by_name(tmp_path, kind, junk):
    file = tmp_path / "mine.yml"
    file.write_bytes(JUNK[junk])
    with pytest.raises(ValueError) as refusal:
        read = READERS[kind][0](file)
        assert not read, read  # a file of rows or cards may hold none
        raise ValueError(f"{file.name}: nothing in it")
    assert "mine.yml" in str(refusal.value) or kind == "rows"


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_changes_nothing_and_a_pipe_is_not_waited_for(tmp_path, kind):
    file, pipe = tmp_path / "mine.yml", tmp_path / "pipe.yml"
    file.write_text("\ufeff" + yaml.safe_dump(READERS[kind][1]), encoding="utf-8")
    assert _ends(kind, file)
    os.mkfifo(pipe)
    for wrong in (pipe, tmp_path):
        with pytest.raises(ValueError):
            READERS[kind][0](wrong)
    with pytest.raises((OSError, ValueError), match="none.yml"):
        READERS[kind][0](tmp_path / "none.yml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*TINY["config"], *UNSUPPORTED, "name", "path", "config"])
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plain, plain)
def test_any_json_is_a_config_or_is_refused(tmp_path, content, more):
    merged = {**ALIKE, **PUBLISHED["baichuan2-7b"], **more} if isinstance(more, dict) else content
    (tmp_path / "config.json").write_text(json.dumps(merged))
    try:
        load_model(tmp_path)
    except BadCheckpoint as error:  # a good config has no weights here
        assert "config.json" in str(error) or "has no weights" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        '{"model_type": "baichuan", "model_type": 1}',
        "\ufeff{}",
        "[" * 9000,
        '{"a": NaN}',
        '{"a": ' + "9" * 6000 + "}",
    ],
)
def test_a_config_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="config.json"):
        load_model(tmp_path)


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"no card 'rtx409' in cards.yml \(did you mean rtx4090\?\)"
    ):
        card("rtx409")
