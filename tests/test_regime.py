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
    10: {"weights": "nf4"},
    11: {"weights": "int8", "trains": {"lora": {"dora": True}}},
    12: {"weights": "nf4", "trains": "lora", "place": "fsdp"},
    13: {"trains": "prefix", "acts": "checkpoint"},
    14: {"trains": "split_lora", "place": "fsdp"},
    15: {"place": "host_state", "trains": "none", "rule": "none"},
    16: {"place": "host_weights", "acts": {"checkpoint": {"every": 2}}},
    17: {"place": "host_weights", "acts": "checkpoint", "trains": "chunks"},
    18: {"place": "host_weights", "acts": "checkpoint", "trains": "lora", "weights": "nf4"},
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
    ({"trains": {"blocks": {"ends": "both"}}}, ["both", "rest, units, always"]),
    ({"trains": {"blocks": {"sample": 2, "order": "ascending"}}}, ["2", "use order: random"]),
    ({"trains": {"blocks": {"sample": -1}}}, ["-1", "or 0"]),
    ({"trains": {"top": {"share": 0}}}, ["0", "at most 1"]),
    ({"trains": {"lora": {"adapters": "fp8"}}}, ["fp8", "fp32, bf16"]),
    ({"trains": {"lora": {"rank": 0}}}, ["0", "1 or more"]),
    ({"trains": {"split_lora": {"cut": 0}}}, ["0", "1 or more"]),
    ({"trains": {"prefix": {"tokens": 0}}}, ["prefix.tokens", "1 or more"]),
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
