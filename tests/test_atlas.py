"""The atlas says what single forecasts say, keeps what it has, and goes on past a cell that
fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from vramlab.allocator.settings import Settings
from vramlab.cards import card, read_cards
from vramlab.cli import main
from vramlab.files import ROOT, read_checked
from vramlab.forecast import card_summary as summary
from vramlab.forecast import chart as atlas
from vramlab.forecast import forecast as predict
from vramlab.forecast import kept_answers
from vramlab.forecast import question as questions_module
from vramlab.forecast.chart import Atlas, chart, read_atlas
from vramlab.forecast.chart_table import table
from vramlab.forecast.chart_worlds import chart_worlds
from vramlab.forecast.forecast import Question, forecast
from vramlab.regimes.regime import read_regimes
from vramlab.runs.sweep import Swept
from vramlab.timeline.events import any_block, signed

CONF = "expandable_segments:True"


@pytest.fixture(scope="module")
def asked():
    return Atlas(
        "small",
        ("tiny",),
        (16, 32),
        (1,),
        ("", "bf16"),
        regimes=("full", "lomo", "mixed"),
        allocators=(CONF,),
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def content(asked, kept):
    return chart(asked, kept, progress=False, jobs=1)


def test_a_storage_type_that_makes_no_new_step_is_left_out(asked):
    names = [question.name for question in asked.questions() if question.seq == 16]
    assert names == [
        "full",
        "lomo",
        "mixed",
        "full (bf16)",
        "lomo (bf16)",
    ], "mixed with bf16 weights is full with them"
    assert len(asked.questions()) == 10


def test_a_row_is_the_forecast_of_its_cell_and_card(asked, content, kept):
    frame = table(content).set_index(["name", "seq", "card"])
    assert len(frame) == 10 * len(read_cards())
    for name, regime, weights in (("full", "full", ""), ("lomo (bf16)", "lomo", "bf16")):
        for key in ("a100-40", "rtx4090") + (
            ("h100",) if not weights else ()
        ):  # fp32 takes no other kernel on Hopper
            said = forecast(
                Question(asked.models[0], regime, 32, 1, weights), card(key), cache_dir=kept
            )
            row = frame.loc[name, 32, key]
            assert (
                row["allocated_bytes"],
                row["reserved_bytes"],
                row["margin_bytes"],
                row["fits"],
                row["retries"],
            ) == (
                said.allocated_peak_bytes,
                said.reserved_peak_bytes,
                said.margin_bytes,
                said.fits,
                said.retries,
            )


def test_a_second_look_traces_and_simulates_nothing(asked, content, kept, monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("simulated again")

    monkeypatch.setattr(summary, "simulate", no)
    monkeypatch.setattr(atlas, "traced_step", no)
    assert chart(asked, kept, progress=False) == content
    other = dataclasses.replace(asked, allocators=())
    assert {cell["reason"] for cell in chart(other, kept, progress=False, jobs=1)["cells"]} == {
        "AssertionError: simulated again"
    }


def test_a_stopped_atlas_goes_on_where_it_was(asked, content, kept, monkeypatch):
    gone = asked.questions()[3]
    for path in (kept / gone.key()).glob("summary-*.json"):
        path.unlink()
    assert [atlas.kept(asked, question, kept) for question in asked.questions()].count(False) == 1
    again = []

    def read(question, cache_dir, counted):
        again.append(question)
        return predict.traced_step(question, cache_dir, counted)

    monkeypatch.setattr(atlas, "traced_step", read)
    assert chart(asked, kept, progress=False) == content and again == [gone]


def test_a_failing_cell_is_a_row_with_its_reason(asked, tmp_path, monkeypatch):
    def fails(question, cache_dir, counted):
        if question.regime == "lomo":
            raise RuntimeError("no such kernel")
        return predict.traced_step(question, cache_dir, counted)

    monkeypatch.setattr(atlas, "traced_step", fails)
    one = dataclasses.replace(asked, seq=(16,), weights=("",), regimes=("full", "lomo"))
    frame = table(chart(one, tmp_path, progress=False, jobs=1))
    assert frame.loc[frame["name"] == "lomo", "reason"].tolist() == ["RuntimeError: no such kernel"]
    assert (frame.loc[frame["name"] == "full", "reason"] == "").all()


@pytest.mark.slow
def test_processes_say_what_one_says(asked, content, tmp_path):
    two = dataclasses.replace(asked, seq=(16,), weights=("",), regimes=("full", "lomo"))
    cells = [
        {**cell, "trace_s": 0} for cell in chart(two, tmp_path, progress=False, jobs=2)["cells"]
    ]
    wanted = [
        {**cell, "trace_s": 0}
        for cell in content["cells"]
        if cell["seq"] == 16 and cell["name"] in ("full", "lomo")
    ]
    assert cells == wanted


COLLECTS = "garbage_collection_threshold:0.8,per_process_memory_fraction:0.999"


def test_garbage_is_collected_only_beside_a_fraction_and_can_lose_a_step(kept):
    traced = predict.traced_step(Question("baichuan2-7b", "zero_shot", 1024, 1), kept)
    held = card("rtx5090")
    rows = traced.device_rows()
    alone, both = (
        summary._on_cards(traced, rows, {"it": held}, Settings.parse(text))["it"]
        for text in ("garbage_collection_threshold:0.8", COLLECTS)
    )
    assert alone == summary._on_cards(traced, rows, {"it": held}, Settings())["it"]
    assert alone["fits"] and not both["fits"]
    room = dataclasses.replace(held, total_gib=held.total_gib + 1)
    said = forecast(
        Question("baichuan2-7b", "zero_shot", 1024, 1), room, Settings.parse(COLLECTS), kept
    )
    fits = summary._on_cards(traced, rows, {"it": room}, Settings.parse(COLLECTS))["it"]
    assert (
        fits["fits"]
        and fits["reserved_bytes"] == said.reserved_peak_bytes > alone["reserved_bytes"]
    )


def test_only_hoppers_workspaces_differ(asked, kept):
    traced = predict.traced_step(asked.questions()[0], kept)
    ampere, hopper = (
        summary.events_for(traced, traced.device_rows(), capability)
        for capability in ((8, 6), (9, 0))
    )
    assert (ampere["bytes"] == traced.events["bytes"]).all()
    changed = hopper["bytes"][hopper["bytes"] != ampere["bytes"]]
    assert len(changed) == 2 and set(changed) == {32 << 20}, "one handle a thread"


def test_without_a_group_the_peak_is_that_of_the_other_events(asked, kept):
    traced = predict.traced_step(asked.questions()[0], kept)
    said = summary.summarize(traced, {}, ())
    assert sum(group["bytes"] for group in summary._groups(traced, 10**6)) == traced.peak_bytes
    rows = traced.device_rows()
    for group in said["without"]:
        its = rows[
            (rows["category"] == group["category"])
            & (rows["module"].map(any_block) == group["module"])
            & (rows["op"] == group["op"])
            & (rows["event"] == "alloc")
        ]
        left = np.where(rows["storage"].isin(its["storage"]), 0, signed(rows)).cumsum()
        assert group["peak_bytes"] == left[traced.reported].max()
        assert traced.peak_bytes - group["bytes"] <= group["peak_bytes"] <= traced.peak_bytes
    stacked = np.sum(list(said["curve"]["bytes"].values()), axis=0)
    assert stacked.max() == traced.peak_bytes and len(stacked) <= summary.POINTS


def test_a_world_is_the_forecast_of_one_of_its_ranks(asked, kept):
    cells = chart_worlds(
        dataclasses.replace(asked, worlds=(1, 8), world_seq=32), kept, progress=False, jobs=1
    )
    assert [cell["world"] for cell in cells] == [1, 8]
    for cell in cells:
        said = forecast(
            Question("tiny", "fsdp", 32, 1, world=cell["world"]), card("a100-40"), cache_dir=kept
        )
        held = cell["cards"]["a100-40"]
        assert (held["reserved_bytes"], held["fits"], cell["ledger"]) == (
            said.reserved_peak_bytes,
            said.fits,
            said.trace.ledger,
        )
        assert (
            sum(cell["ledger"].values()) == cell["requested_bytes"]
            and cell["ledger"]["collectives"] > 0
        )
    whole, eighth = (cell["ledger"] for cell in cells)
    assert 7.9 < whole["optimizer"] / eighth["optimizer"] < 8.1
    assert chart_worlds(asked, kept, progress=False) == []


def test_worlds_are_kept_as_cells_are(asked, kept, monkeypatch):
    two = dataclasses.replace(asked, worlds=(1, 8), world_seq=32)
    before = chart_worlds(two, kept, progress=False, jobs=1)
    monkeypatch.setattr(atlas, "traced_step", None)
    monkeypatch.setattr(questions_module, "trace", None)
    assert chart_worlds(two, kept, progress=False, jobs=1) == before
    failed = chart_worlds(dataclasses.replace(two, worlds=(2,)), kept, progress=False, jobs=1)
    assert failed[0]["world"] == 2 and failed[0]["reason"] and "ledger" not in failed[0]


def test_the_quick_atlas_stays_cheap():
    quick, whole = (read_atlas(ROOT / "params" / name) for name in ("atlas-quick.yml", "atlas.yml"))
    assert (quick.models, quick.worlds) == (
        ("baichuan2-7b",),
        (1, 8, 64, 1024),
    ), "four traces of some five seconds"
    assert whole.worlds == tuple(2**power for power in range(11)) and whole.world_seq == 1024


def test_an_atlas_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "wrong.yml"
    for text, said in (
        ("models: [tiny]\nseq: [1]\n", "no batch"),
        ("modles: [tiny]\nseq: [1]\nbatch: [1]\n", "modles"),
        ("models: [tiny]\nseq: [1]\nbatch: [1]\nworlds: [8, 0]", "worlds or world_seq has 0"),
        ("models: [tiny]\nseq: [1]\nbatch: [1]\nsizes: [[8, 0]]", "sizes has 0"),
        ("models: [tiny]\nseq: [1]\nbatch: [1]\nsizes: [[8]]", "each is .seq, batch."),
        ("models: [tiny]\nseq: [1]\nbatch: [1]\ncards: [gtx]\nregimes: [ful]", "no ful.*no gtx"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_atlas(path)
    with pytest.raises(FileNotFoundError, match="atlas-quick"):
        read_atlas(tmp_path / "none.yml")
    questions = read_atlas(ROOT / "params" / "atlas.yml").questions()
    assert {question.regime for question in questions} == set(read_regimes()) - {
        "bf16"
    }  # which is full in bf16
    names = len({question.name for question in questions})
    assert len(questions) == len(set(questions)) == 2 * 7 * names


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_answers, "FORECASTS", tmp_path / "kept")


LIGHT = """
import pathlib, sys
from vramlab import cli
from vramlab.forecast import kept_answers
kept_answers.FORECASTS = pathlib.Path(sys.argv[1])
code = cli.main(["atlas", sys.argv[2], "--out", sys.argv[3]])
sys.exit(7 if "torch" in sys.modules else code)
"""
"""Ends with 7 where the command has imported torch."""


def test_a_charted_atlas_is_remembered_until_its_file_or_the_code_changes(
    tmp_path, capsys, monkeypatch, kept
):
    path, asked = tmp_path / "mine.yml", []
    path.write_text(
        yaml.safe_dump({"models": ["tiny"], "seq": [16], "batch": [1], "regimes": ["full"]})
    )
    monkeypatch.setattr(
        atlas, "chart", lambda said, progress: asked.append(said) or chart(said, kept, False, 1)
    )
    for times, change in ((1, ""), (1, ""), (2, "allocators: []\n")):
        path.write_text(path.read_text() + change)
        assert main(["atlas", str(path), "--out", str(tmp_path)]) == 0 and len(asked) == times
    again = subprocess.run(
        [sys.executable, "-c", LIGHT, str(kept_answers.FORECASTS), str(path), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and "tiny, 1 x 16 tokens" in again.stdout, again.stderr


def test_the_command_writes_the_table_and_the_reports_file(
    tmp_path, capsys, monkeypatch, kept, asked, content
):
    monkeypatch.setattr(atlas.chart, "__defaults__", (kept, True, None))
    path = tmp_path / "small.yml"
    path.write_text(
        yaml.safe_dump(
            {
                **{
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in dataclasses.asdict(asked).items()
                }
            }
        )
    )
    assert main(["atlas", str(path), "--out", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["cells"]
    assert len(rows) == 80 and rows[0]["kind"] == "predicted" and rows[0]["margin_bytes"] > 0
    assert read_checked(tmp_path / "forecast.json") == json.loads(json.dumps(content))


def test_the_command_adds_the_worlds_only_where_they_are_asked_for(
    tmp_path, capsys, monkeypatch, kept
):
    monkeypatch.setattr(atlas.chart, "__defaults__", (kept, True, None))
    monkeypatch.setattr(chart_worlds, "__defaults__", (kept, True, 1))
    spec = {"models": ["tiny"], "seq": [16], "batch": [1], "regimes": ["full"]}
    for more in ({}, {"worlds": [1, 8], "world_seq": 32}):
        (tmp_path / "mine.yml").write_text(yaml.safe_dump({**spec, **more}))
        assert main(["atlas", str(tmp_path / "mine.yml"), "--out", str(tmp_path)]) == 0
        content = json.loads((tmp_path / "forecast.json").read_text())
        assert [cell["world"] for cell in content.get("worlds", ())] == more.get("worlds", [])
        assert ("worlds" in content) is bool(more)


@pytest.mark.parametrize(
    ("option", "made"), [((), True), (("--no-forecast",), False), (("--no-report",), False)]
)
def test_a_sweep_makes_the_atlas_beside_it_before_its_report(
    option, made, tmp_path, capsys, monkeypatch, kept, asked, content
):
    monkeypatch.setattr(atlas.chart, "__defaults__", (kept, True, None))
    swept = Swept(0, tmp_path / "out", [{"run_id": "full-0", "outcome": "ok"}])
    monkeypatch.setattr("vramlab.runs.sweep.sweep", lambda *args, **kwargs: swept)
    seen = []

    def build(folder, left_out):
        seen.append((folder / "forecast.json").exists())
        (folder / "report.html").write_text("")
        return folder / "report.html"

    monkeypatch.setattr("vramlab.report.build", build)
    (tmp_path / "out").mkdir()
    (tmp_path / "atlas-mine.yml").write_text(
        yaml.safe_dump(
            {
                "models": ["tiny"],
                "seq": [16],
                "batch": [1],
                "regimes": ["full"],
                "allocators": [CONF],
            }
        )
    )
    assert main(["sweep", str(tmp_path / "mine.yml"), "--out", str(tmp_path / "out"), *option]) == 0
    assert seen == ([] if "--no-report" in option else [made])
    assert "report.html" in capsys.readouterr().out or "--no-report" in option
