"""Ratios compare the same work, by numbers that are there."""

import json
import logging
import math
import warnings

import pytest
import torch
import yaml

from benchmarks import peers
from benchmarks.peers import PAIRS, Settings, bench, main, table
from vramlab.files import ROOT
from vramlab.regimes.regime import read_row, regime_row

MICRO = {
    "position": "rope",
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
PAIR = {pair.title: pair for pair in PAIRS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "micro.yml"
    path.write_text(yaml.safe_dump({"name": "micro", "path": None, "config": MICRO}))
    return Settings(
        model=str(path),
        batch_size=2,
        tokens=8,
        bytes_tokens=8,
        untimed=1,
        timed=1,
        checked=2,
        repeats=2,
    )


@pytest.fixture(scope="module")
def result(settings):
    return bench(settings, [PAIR["full"], PAIR["badam"]], progress=False)


@pytest.mark.slow
def test_both_sides_do_the_same_steps(result):
    for row in result["pairs"]:
        losses = row["losses"]
        assert (
            losses["same"] and len(losses["ours"]) == 2 and losses["ours"][0] != losses["ours"][1]
        ), row["name"]


@pytest.mark.slow
def test_ratios_are_of_what_was_measured(result):
    for row in result["pairs"]:
        speed, size = row["speed"], row["bytes"]
        assert size["ratio"] == size["ours"] / size["peer"] and 0.5 < size["ratio"] < 1.1
        ours, peer = (speed[f"{side}_tokens_per_s"]["values"] for side in ("ours", "peer"))
        assert speed["ratio"]["values"] == pytest.approx(
            [a / b for a, b in zip(ours, peer, strict=True)]
        )
        assert all(math.isfinite(value) and value > 0 for value in ours + peer)
        assert speed["ratio"]["q25"] <= speed["ratio"]["median"] <= speed["ratio"]["q75"]


@pytest.mark.slow
def test_the_meter_sees_what_adamw_holds_on_either_side(result):
    """Weights and both moments at least: 12 bytes a parameter, gradients aside."""
    row = result["pairs"][0]
    parameters = 2 * 61 * 20 + 3 * (4 * 20 * 20 + 3 * 20 * 33 + 2 * 20) + 20
    assert all(row["bytes"][side] > 12 * parameters for side in ("ours", "peer"))


def test_a_loop_that_does_other_work_is_told(settings, monkeypatch):
    """Twice the learning rate is not the same training."""
    other = peers.Pair(
        "full",
        "ours, faster",
        lambda row: (
            lambda job, observer: peers.ours(row)(peers.replace(job, lr=2 * job.lr), observer)
        ),
    )
    assert not peers.compare(other, settings)["losses"]["same"]


def test_what_cannot_be_compared_says_why(settings):
    def broken(row):
        raise ImportError("no module named peer: pip install peer")

    missing = peers.compare(peers.Pair("no_such_row", "anything", broken), settings)
    absent = peers.compare(peers.Pair("full", "anything", broken), settings)
    assert missing["outcome"] == "no such row" and "no_such_row" in missing["reason"]
    assert absent["outcome"] == "peer cannot run" and "pip install peer" in absent["reason"]
    given = {
        "settings": {**vars(settings)},
        "environment": peers.environment.record(),
        "made_at": "2026-01-01",
        "pairs": [missing, absent],
    }
    assert "no such row" in table(given) and "pip install peer" in table(given)


@pytest.mark.slow
def test_the_result_is_kept_and_printed_again(result, tmp_path, capsys):
    kept = tmp_path / "peers.json"
    kept.write_text(json.dumps(result))
    assert main(["--table", "--out", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == table(result).strip() and all(
        f"`{row['name']}`" in printed for row in result["pairs"]
    )
    assert {"torch", "transformers", "badam"} <= set(result["environment"]["versions"])
    assert result["made_at"] and result["environment"]["device"]["kind"] == "cpu"


def test_every_pair_names_a_row_that_can_be_read():
    for pair in PAIRS:
        assert read_row(pair.regime, {**regime_row(pair.regime), **pair.changes}), pair.title
    assert len(PAIR) == len(PAIRS)


def test_quiet_leaves_everything_as_it_was():
    before = (
        torch.get_num_threads(),
        logging.getLogger("transformers").level,
        list(warnings.filters),
    )
    with peers.quiet(threads=before[0] + 1):
        assert torch.get_num_threads() == before[0] + 1
        warnings.warn("not heard", stacklevel=1)
    assert (
        torch.get_num_threads(),
        logging.getLogger("transformers").level,
        list(warnings.filters),
    ) == before


def test_the_readme_shows_the_recorded_result():
    record = ROOT / "outputs" / "reference" / "bench" / "peers.json"
    readme = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
    shown = readme.split("<!-- peers -->")[1].split("<!-- /peers -->")[0]
    assert shown.strip() == table(json.loads(record.read_text()))
