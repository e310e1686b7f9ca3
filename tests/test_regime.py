"""Rows are read strictly: every reason at once, each with the way out."""

import pytest

from vramlab.cli import main, table
from vramlab.regime import ILLEGAL, IllegalRegime, ImpossibleHere, check_machine, read_regimes, read_row, regime

ALONE = {
    0: {"accumulate": 0},
    1: {"clip": -1.0},
    2: {"trains": "none"},
    3: {"rule": "none"},
    4: {"trains": "none", "rule": "none", "until": "backward"},
    5: {"trains": "none", "rule": "none", "acts": "offload"},
    6: {"trains": "none", "rule": "none", "clip": 1.0},
    7: {"until": "backward", "accumulate": 2},
    8: {"until": "backward", "clip": 1.0},
    9: {"place": "fsdp", "trains": "blocks"},
    10: {"weights": "master", "rule": "galore"},
    11: {"trains": "none", "rule": "none", "weights": "master"},
    12: {"place": "fsdp", "rule": "galore"},
    13: {"rule": "adam_mini", "trains": "chunks"},
    14: {"place": "fsdp", "until": {"backward": {"clip_norm": 1.0}}},
    15: {"place": "fsdp", "grads": "zeroth_order", "rule": "sgd"},
    16: {"grads": "zeroth_order"},
    17: {"trains": "none", "rule": "none", "grads": "zeroth_order"},
    18: {"grads": "zeroth_order", "rule": "sgd", "until": "backward"},
    19: {"grads": "zeroth_order", "rule": "sgd", "acts": "checkpoint"},
    20: {"grads": "zeroth_order", "rule": "sgd", "clip": 1.0},
    21: {"grads": "zeroth_order", "rule": "sgd", "weights": "master"},
}


@pytest.mark.parametrize("index", range(len(ILLEGAL)))
def test_every_prohibition_is_reachable_alone(index):
    with pytest.raises(IllegalRegime) as refusal:
        read_row("row", ALONE[index])
    lines = str(refusal.value).splitlines()
    assert len(lines) == 2 and ILLEGAL[index][1] in lines[1] and "use" in lines[1]


def test_all_reasons_come_together():
    with pytest.raises(IllegalRegime) as refusal:
        read_row("row", {"until": "backward", "accumulate": 4, "clip": 1.0})
    assert str(refusal.value).count("\n  - ") == 2


@pytest.mark.parametrize(("row", "words"), [
    ({"acts": "chekpoint"}, ["chekpoint", "keep, checkpoint, offload"]),
    ({"colour": 1}, ["colour", "weights, trains"]),
    ({"trains": {"chunks": {"k": 3}}}, ["k", "count"]),
    ({"trains": {"chunks": {"count": 0}}}, ["0", "1 or more"]),
    ({"trains": {"blocks": {"order": "sideways"}}}, ["sideways", "descending"]),
    ({"acts": {"checkpoint": {}, "offload": {}}}, ["checkpoint", "known values"]),
    ({"rule": {"galore": {"rank": 0}}}, ["0", "1 or more"]),
    ({"rule": {"galore": {"inner": "adam"}}}, ["adam", "adamw, sgd"]),
    ({"grads": {"zeroth_order": {"eps": 0.0}}, "rule": "sgd"}, ["0.0", "positive"]),
    ({"until": {"backward": {"clip_norm": -1.0}}}, ["-1.0", "positive"]),
])
def test_a_wrong_row_names_the_value_and_the_known_ones(row, words):
    with pytest.raises(IllegalRegime) as refusal:
        read_row("mine", row)
    assert "mine" in str(refusal.value) and all(word in str(refusal.value) for word in words)


def test_an_unknown_regime_names_the_known_ones():
    with pytest.raises(IllegalRegime, match="zero_shot, full, mixed"):
        regime("lomoo")


def test_a_machine_without_a_gpu_is_another_error():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ImpossibleHere, match="use device: cpu"):
        check_machine(regime("full"), "cuda")


def test_a_process_without_ranks_reads_the_row_and_cannot_train_it():
    row = regime("fsdp")
    with pytest.raises(ImpossibleHere, match="torchrun"):
        check_machine(row, "cpu")


def test_regimes_command_prints_every_row(capsys):
    assert main(["regimes"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == table(read_regimes())
    assert all(f"`{name}`" in printed for name in read_regimes())


def test_readme_shows_the_table_of_the_file():
    from vramlab.environment import ROOT

    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- regimes -->")[1].split("<!-- /regimes -->")[0]
    assert shown.strip() == table(read_regimes()), "run `vramlab regimes` and paste its output between the markers"
