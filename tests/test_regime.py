"""Rows are read strictly: every reason at once, each with the way out."""

import pytest

from vramlab.cli import main, table
from vramlab.regimes.forbidden import ILLEGAL
from vramlab.regimes.regime import (
    IllegalRegime,
    ImpossibleHere,
    check_machine,
    read_regimes,
    read_row,
    regime,
)


@pytest.mark.parametrize("prohibition", ILLEGAL, ids=lambda prohibition: prohibition.reason[:40])
def test_every_prohibition_is_reachable_alone(prohibition):
    with pytest.raises(IllegalRegime) as refusal:
        read_row("row", prohibition.example)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 2 and prohibition.reason in lines[1] and "use" in lines[1]


def test_all_reasons_come_together():
    with pytest.raises(IllegalRegime) as refusal:
        read_row("row", {"until": "backward", "accumulate": 4, "clip": 1.0})
    assert str(refusal.value).count("\n  - ") == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"acts": "chekpoint"}, ["chekpoint", "keep, checkpoint, offload, selective"]),
        ({"colour": 1}, ["colour", "weights, trains"]),
        ({"trains": {"chunks": {"k": 3}}}, ["k", "count"]),
        ({"trains": {"chunks": {"count": 0}}}, ["trains.chunks.count is 0", "1 to 1,000,000"]),
        ({"trains": {"blocks": {"order": "sideways"}}}, ["sideways", "descending"]),
        ({"acts": {"checkpoint": {}, "offload": {}}}, ["checkpoint", "one of keep"]),
        ({"rule": {"galore": {"rank": 0}}}, ["0", "1 or more"]),
        ({"rule": {"galore": {"inner": "adam"}}}, ["adam", "adamw, sgd"]),
        (
            {"grads": {"zeroth_order": {"eps": 0.0}}, "rule": "sgd"},
            ["grads.zeroth_order.eps is 0.0", "1e-12 to 1"],
        ),
        (
            {"until": {"backward": {"clip_norm": -1.0}}},
            ["until.backward.clip_norm is -1.0", "0 to 1,000,000"],
        ),
        (
            {"until": {"backward": {"clip_norm": 1.0, "clip_value": 1.0}}},
            ["clip_value", "one of them"],
        ),
        ({"until": {"backward": {"clip_norm": 1.0, "norm": "next"}}}, ["next", "this, last"]),
        ({"until": {"backward": {"loss_scale": 8.0}}}, ["loss_scale", "clip_norm"]),
        ({"trains": {"blocks": {"ends": "both"}}}, ["both", "rest, units, always"]),
        (
            {"trains": {"blocks": {"sample": 2, "order": "ascending"}}},
            ["sample", "use order: random"],
        ),
        ({"trains": {"blocks": {"sample": -1}}}, ["-1", "0 or more"]),
        ({"trains": {"top": {"share": 0}}}, ["trains.top.share is 0", "0.001 to 1"]),
        ({"trains": {"lora": {"adapters": "fp8"}}}, ["fp8", "fp32, bf16"]),
        ({"trains": {"lora": {"rank": 0}}}, ["trains.lora.rank is 0", "1 to 65,536"]),
        ({"trains": {"split_lora": {"cut": 0}}}, ["0", "1 or more"]),
        ({"trains": {"prefix": {"tokens": 0}}}, ["trains.prefix.tokens is 0", "1 to 65,536"]),
    ],
)
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
    from vramlab.files import ROOT

    readme = (ROOT / "params" / "README.md").read_text()
    shown = readme.split("<!-- regimes -->")[1].split("<!-- /regimes -->")[0]
    assert shown.strip() == table(read_regimes()), (
        "run `vramlab regimes` and paste its output between the markers"
    )
