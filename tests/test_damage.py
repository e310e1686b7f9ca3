"""What a crash, a bad disk or a wrong copy leaves: run folders, caches and data sets that are
damaged, one file at a time."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import changed, damages, ends, no_files, refused
from vramlab import files
from vramlab.cli import main
from vramlab.factcc import checker
from vramlab.factcc.generator import generate_items
from vramlab.factcc.sources import load_items, write_items
from vramlab.factcc.statistics import summarise
from vramlab.files import write_checked, write_table
from vramlab.forecast import question as questions
from vramlab.forecast.forecast import Question, traced_step
from vramlab.reading import BadFile
from vramlab.regimes.regime import regime as read_regime
from vramlab.report import build
from vramlab.report import page as html
from vramlab.runs import folder as runs
from vramlab.runs.folder import FINISHED, NEEDED, outcome, read_runs, seal_run
from vramlab.runs.schema import SPEED
from vramlab.runs.sweep import read_sweep

BOUNDED = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def _run(folder: Path, regime: str, **result) -> Path:
    """A finished run's folder as `runs.execute.execute` writes it, with few rows."""
    folder.mkdir(parents=True)
    rows = [
        {
            "uid": f"{split}{i}",
            "domain": "news",
            "split": split,
            "shift": "none",
            "group": f"{split}{i}",
            "transform": "",
            "label": i % 2,
            "truncated": False,
            "yesno": (i * 7 % 5) - 2.0,
            "likelihood": (i * 3 % 4) - 1.0,
            "n_tokens": 9,
            **{
                name: float(i % 3)
                for name in ("unigram_overlap", "bigram_overlap", "claim_only", "majority")
            },
        }
        for split in ("val", "test")
        for i in range(12)
    ]
    scores = pd.DataFrame(rows)
    steps = pd.DataFrame(
        {"step": range(4), "loss": [3.0, 2.0, 1.5, 1.0], "step_s": 0.1, "tokens": 64, "lr": 0.1}
    )
    timeline = pd.DataFrame(
        {
            "event": ["alloc", "alloc", "free"],
            "bytes": 64,
            "category": "weights",
            "module": "m",
            "op": "x",
            "storage": [0, 1, 1],
            "step": 0,
            "phase": "forward",
            "live_bytes": [64, 128, 64],
            "t_s": 0.0,
        }
    )
    for name, frame in (
        ("scores", scores),
        ("accuracy", summarise(scores)),
        ("steps", steps),
        ("timeline", timeline),
    ):
        write_table(frame, folder / f"{name}.parquet")
    peak = {
        "peak_bytes": 128,
        "phase": "forward",
        "step": 0,
        "categories": {"weights": 128},
        "owners": [{"category": "weights", "module": "m", "op": "x", "bytes": 128}],
    }
    content = {
        "outcome": "ok",
        "reason": "",
        "regime": regime,
        "model": "tiny",
        "speed": dict.fromkeys(SPEED, 1.0),
        "trainable_parameters": 8,
        "parameters": 8,
        "loss_first": 3.0,
        "loss_last": 1.0,
        "peak": peak,
        "host_bytes": 0,
        "memory_ledger": {"weights": 128},
        "peak_bytes": {"meter": 128, "process": None},
        "optimizer_state_bytes": 0,
        "notes": ["a note"],
        "base": {"recipe": "none"},
        "measured_on": "cpu",
        "device": "a cpu",
        **result,
    }
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "params.yml").write_text(
        yaml.safe_dump({"regime": regime, "seed": 0, "train_domain": "news", "model": "tiny"})
    )
    (folder / "env.json").write_text(json.dumps({"device": {"name": "a cpu"}, "versions": {}}))
    return folder


@pytest.fixture
def swept(tmp_path):
    """Two finished runs and one that failed, in the order of their sweep."""
    for regime in ("full", "lomo"):
        _run(tmp_path / f"{regime}-0", regime)
    _run(tmp_path / "badam-0", "badam", outcome="failed", reason="no luck")
    write_checked(
        tmp_path / "sweep.json",
        {"cells": [{"run_id": f"{regime}-0"} for regime in ("lomo", "full", "badam")]},
    )
    return tmp_path


def test_a_whole_folder_is_read_in_the_order_of_its_sweep_with_nothing_to_say(swept):
    damage = []
    assert [run.name for run in read_runs(swept, damage)] == [
        "lomo",
        "full",
        "badam",
    ] and damage == []
    assert build(swept).exists()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        "params.yml",
        "env.json",
        "steps.parquet",
        "scores.parquet",
        "accuracy.parquet",
        "timeline.parquet",
    ],
)
def test_a_damaged_file_is_named_counts_as_not_there_and_hides_no_other_run(swept, name, sealed):
    path = swept / "full-0" / name
    if sealed:
        seal_run(path.parent)
    whole = path.read_bytes()
    for kind, content in damages(whole).items():
        text = ("cut", "without its end", "another file", "an empty object") * (
            not name.endswith(".parquet")
        )
        if kind in ("a flipped bit", *text):
            continue  # may be as good as the first, see the tests of single values
        path.write_bytes(content)
        damage: list[str] = []
        names = [run.name for run in ends(lambda: read_runs(swept, damage))]  # noqa: B023, it has ended
        left_out = name in NEEDED or name == "result.json"
        assert names == (["lomo", "badam"] if left_out else ["lomo", "full", "badam"]), kind
        assert damage and str(path) in damage[0] and len(damage) == 1 + left_out, kind
        assert (outcome(swept / "full-0") is None) == left_out and outcome(swept / "lomo-0") == "ok"
    path.write_bytes(whole)
    assert outcome(swept / "full-0") == "ok"


def test_the_report_names_damage_in_its_first_lines(swept):
    (swept / "full-0" / "result.json").write_text("")
    (swept / "lomo-0" / "timeline.parquet").write_text("<!--<script>")
    (swept / "forecast.json").write_text("{}")
    (swept / "sweep.json").write_text("{")
    text = build(swept).read_text()
    head = text[text.index("<ul class=takeaways>") : text.index("</ul>")]
    assert all(
        name in head
        for name in ("full-0/result.json", "lomo-0/timeline.parquet", "forecast.json", "sweep.json")
    )
    assert "full-0 is left out: it lacks result.json" in head


def test_damage_goes_to_whoever_asks_for_it_and_else_to_standard_error(swept, monkeypatch):
    (swept / "full-0" / "result.json").write_text("")
    noticed, damage = [], []
    monkeypatch.setattr(runs, "notice", noticed.append)
    read_runs(swept, damage)
    assert damage and not noticed
    read_runs(swept)
    assert noticed == damage


def test_the_command_names_what_its_report_leaves_out(swept, capsys):
    (swept / "full-0" / "result.json").write_text("")
    write_checked(
        swept / "forecast.json", {"cells": []}
    )  # sealed, and of other content than the report draws
    assert main(["report", str(swept), "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    assert any("forecast.json holds no forecasts" in sentence for sentence in left_out)
    assert any("full-0 is left out: it lacks result.json" in sentence for sentence in left_out)
    assert (
        main(["report", str(swept)]) == 0
        and "forecast.json holds no forecasts" in capsys.readouterr().out
    )


def test_what_is_no_file_in_a_run_folder_is_damage_too(swept):
    target = swept / "full-0" / "result.json"
    target.unlink()
    for path in no_files(swept / "no files", ".json"):
        if os.path.lexists(path):
            path.rename(target)
        names = [run.name for run in ends(lambda: read_runs(swept, []))]
        assert names == ["lomo", "badam"], path
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)


def test_a_folder_with_nothing_whole_says_what_is_damaged(swept):
    for run in ("full-0", "lomo-0", "badam-0"):
        (swept / run / "params.yml").write_text("")
    with pytest.raises(FileNotFoundError, match="no finished run.*full-0/params.yml"):
        build(swept)


@pytest.mark.slow
def test_a_report_of_any_result_is_a_page_that_names_the_file(swept, monkeypatch):
    """Values of other types, and missing ones, in every field of the result."""
    monkeypatch.setattr(html, "get_plotlyjs", lambda: "")  # plotly itself, half a second each time
    path = swept / "full-0" / "result.json"
    whole, tried = json.loads(path.read_text()), []

    @settings(max_examples=100, **BOUNDED)
    @given(changed(whole))
    def one(content):
        path.write_text(json.dumps(content))
        damage: list[str] = []
        page = ends(lambda: build(swept))
        read_runs(swept, damage)
        assert isinstance(page, Path), repr(page)
        tried.append(bool(damage))

    one()
    assert len(tried) >= 50 and any(tried) and not all(tried)


@pytest.mark.parametrize("field", FINISHED)
def test_a_result_that_lacks_what_a_finished_run_has_is_left_out(swept, field):
    path = swept / "full-0" / "result.json"
    path.write_text(
        json.dumps(
            {name: value for name, value in json.loads(path.read_text()).items() if name != field}
        )
    )
    damage: list[str] = []
    assert [run.name for run in read_runs(swept, damage)] == ["lomo", "badam"] and field in damage[
        0
    ]


def test_accuracy_without_the_rows_that_figures_draw_hides_no_other_run(swept):
    path = swept / "full-0" / "accuracy.parquet"
    whole = pd.read_parquet(path)
    for rows in (
        whole.head(1),
        whole[whole["scoring"] != "yesno"],
        whole[whole["metric"] != "balanced_accuracy"],
        whole[whole["shift"] != "none"],
    ):
        write_table(rows, path)
        damage: list[str] = []
        assert [run.name for run in read_runs(swept, damage)] == ["lomo", "badam"]
        assert "full-0 is left out" in damage[0] and "in accuracy.parquet" in damage[0]
    assert build(swept).exists()


def test_a_speed_that_is_no_number_is_damage(swept):
    path = swept / "full-0" / "result.json"
    path.write_text(path.read_text().replace('"tokens_per_s": 1.0', '"tokens_per_s": NaN'))
    damage: list[str] = []
    assert [run.name for run in read_runs(swept, damage)] == [
        "lomo",
        "badam",
    ] and "speed" in damage[0]


@pytest.mark.parametrize(
    "content", [{}, {"cells": 5}, {"cells": [5]}, {"cells": [{}]}, {"cells": [{"run_id": 3}]}]
)
def test_a_sealed_sweep_of_other_content_is_named_and_counts_as_not_there(swept, content):
    write_checked(swept / "sweep.json", content)
    damage: list[str] = []
    assert len(read_runs(swept, damage)) == 3 and "sweep.json" in damage[0]


def test_names_cannot_leave_their_place_in_the_page(swept):
    (swept / "full-0" / "params.yml").write_text(
        yaml.safe_dump({"regime": "<!--<script>", "seed": 0, "train_domain": "news"})
    )
    text = build(swept).read_text()
    assert "<!--" not in text.split("<!doctype html>")[1].split("id=plotly>")[0]
    assert "\\u003c!--\\u003cscript>" in text


# caches -------------------------------------------------------------------------------------------


def test_a_damaged_forecast_is_traced_again_and_said(tmp_path, monkeypatch, capsys):
    question, rng = Question("tiny", "full", 16, 1), random.Random(0)
    first = traced_step(question, tmp_path)
    made = []
    monkeypatch.setattr(questions, "trace", lambda *args, **kwargs: made.append(1) or first)
    (folder,) = tmp_path.iterdir()
    for name in ("trace.json", "frame.parquet"):
        whole = (folder / name).read_bytes()
        flips = [rng.randrange(len(whole)) for _ in range(20)]
        for content in (
            *damages(whole).values(),
            *(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in flips),
        ):
            (folder / name).write_bytes(content)
            made.clear()
            files.notice.cache_clear()
            again = traced_step(question, tmp_path)
            assert (
                made == [1]
                and again.peak_bytes == first.peak_bytes
                and name in capsys.readouterr().err
            )
            assert traced_step(question, tmp_path).alive == first.alive and made == [1], (
                "healed: it is read again"
            )


@given(st.data())
@settings(max_examples=100, **BOUNDED)
def test_a_checked_file_gives_its_content_or_nothing(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "checked.json"
    content = {"a": [1, 2.5, None], "b": {"c": "text"}, "d": float("inf")}
    write_checked(path, content)
    assert files.recall(path) == content
    whole = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    reasons: list[str] = []
    path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    assert files.recall(path, say=reasons.append) is None and str(path) in reasons[0]
    path.write_bytes(whole[:at])
    assert files.recall(path, say=reasons.append) is None


# data sets ----------------------------------------------------------------------------------------

ROWS = {
    "generated": [dataclasses.asdict(item) for item in generate_items("news", "train", 4, 0)],
    "summedits": [
        {"doc": f"d{i}", "summary": "s", "label": i % 2, "edit_types": ["x"], "id": f"i{i}"}
        for i in range(4)
    ],
    "boolq": [
        {"question": "is it wet", "passage": f"p{i}", "answer": True, "idx": i} for i in range(4)
    ],
    "factcc": [
        {"id": i, "claim": "c", "label": "CORRECT", "text": f"t{i}", "filepath": f"x/{i}"}
        for i in range(4)
    ],
}


def _accounted(found, lines: list[bytes]) -> None:
    """Every line that is not blank is an item, a line without a label or a problem."""
    named = {problem.line for problem in found.problems if problem.line}
    cut = [problem for problem in found.problems if "cannot be read on" in problem.message]
    assert cut or len(found.items) + found.summary["unlabelled"] + len(named) == sum(
        bool(line.strip()) for line in lines
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", ROWS)
def test_every_line_of_a_data_set_is_an_item_or_a_named_problem(source, packed, tmp_path):
    path, tried = tmp_path / ("dev.jsonl.gz" if packed else "dev.jsonl"), []
    good = [json.dumps(row).encode() for row in ROWS[source]]
    odd = [
        b"",
        b" ",
        b"{",
        b"null",
        b"[1]",
        b"{}",
        b"\xff" * 9,
        b"\xef\xbb\xbf{}",
        b"[" * 99_999,
        b"NaN",
        b'{"label": ' + b"9" * 5000 + b"}",
        b'{"claim": "\\ud800", "label": 1}',
        b"\x00" * 40,
        b'"text"',
        b'{"label": NaN}',
        good[0].replace(b"}", b', "label": {}}'),
    ]

    @settings(max_examples=40, **BOUNDED)
    @given(
        st.lists(
            st.one_of(
                st.sampled_from(odd),
                st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
                changed(ROWS[source][3]).map(lambda row: json.dumps(row).encode()),
            ),
            max_size=4,
        ),
        st.booleans(),
    )
    def one(lines, mark):
        lines = [good[0], *lines, good[1], good[2]]
        content = b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n"
        path.write_bytes(gzip.compress(content) if packed else content)
        found = ends(lambda: load_items(path))
        if not refused(found, path):
            _accounted(found, lines)
            assert found.summary["source"] == source and len(found.items) >= 3
        tried.append(found)

    one()
    assert len(tried) >= 30 and not all(isinstance(found, Exception) for found in tried)


def test_a_bad_byte_costs_its_own_line_and_is_reported_there(tmp_path):
    lines = [json.dumps({**ROWS["summedits"][0], "id": str(i)}).encode() for i in range(1026)]
    lines[500] = lines[500].replace(b"d0", b"d\xff")
    (tmp_path / "news.jsonl").write_bytes(b"\n".join(lines))
    found = load_items(tmp_path / "news.jsonl")
    assert len(found.items) == 1025 and [problem.line for problem in found.problems] == [501]


def test_a_byte_order_mark_costs_nothing(tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in ROWS["boolq"])
    (tmp_path / "dev.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert len(load_items(tmp_path / "dev.jsonl").items) == 4


def test_a_repeated_id_is_refused_with_both_lines(tmp_path):
    items = generate_items("news", "train", 6, 0)
    write_items(items, tmp_path / "a.jsonl")
    write_items([*generate_items("news", "train", 2, 1), items[4]], tmp_path / "b.jsonl")
    with pytest.raises(BadFile, match=r"a.jsonl:5 and b.jsonl:3"):
        load_items(tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.story", "cnn/../../secret.story", "/../secret.story"]
)
def test_a_story_outside_its_folder_is_not_read(name, tmp_path):
    (tmp_path / "secret.story").write_text("Secret.")
    (tmp_path / "stories" / "cnn").mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text(json.dumps({"claim": "c", "label": 1, "filepath": name}))
    found = load_items(tmp_path / "data.jsonl", stories=tmp_path / "stories")
    assert not found.items and "leaves the folder" in found.problems[0].message


def test_what_is_no_file_is_no_data_set(tmp_path):
    for path in no_files(tmp_path, ".jsonl"):
        assert isinstance(ends(lambda: load_items(path)), OSError | BadFile), path  # noqa: B023, it has ended
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert refused(ends(lambda: load_items(tmp_path / "checkpoint")), tmp_path / "checkpoint")


def test_a_line_without_end_and_an_archive_of_nothing_are_left_in_time(tmp_path):
    row = json.dumps(ROWS["boolq"][0]).encode()
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(row + b"\n" + b"x" * (1 << 26)))
    found = ends(lambda: load_items(tmp_path / "dev.jsonl.gz"))
    assert (
        len(found.items) == 1
        and found.problems[0].line == 2
        and "cannot be read on" in found.problems[0].message
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ('{"a": 1}'.encode("utf-16"), "line 1: not UTF-8"),
        (b"", "no line at all"),
        (b"a,b\n1,2\n", "line 1: not JSON"),
        (b'{"a": 1}\n', "has the fields a"),
    ],
)
def test_what_holds_no_item_is_refused_with_the_cause(content, words, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert main(["items", str(tmp_path / "a.jsonl")]) == 2 and words in capsys.readouterr().err
    if content:
        assert main(["items", str(tmp_path / "a.jsonl"), "--source", "boolq"]) == 2
        assert "has no item of boolq" in capsys.readouterr().err


def test_items_are_written_only_where_that_destroys_nothing(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    write_items(generate_items("news", "train", 2, 0), path)
    whole = path.read_bytes()
    for target in (path, tmp_path, tmp_path / "none" / "b.jsonl"):
        assert main(["items", str(path), "--write", str(target)]) == 2
        words = capsys.readouterr().err
        assert str(target) in words and ".part" not in words
    assert path.read_bytes() == whole and [*tmp_path.iterdir()] == [path]


# the command line ---------------------------------------------------------------------------------

COMMANDS = [
    ["regimes"],
    ["regimes", "--file", "{}/nope.yml"],
    ["regimes", "--file", "{}"],
    ["items", "{}/good.jsonl"],
    ["items", "{}/nope"],
    ["items", "{}/pipe"],
    ["items", "{}/good.jsonl", "--write", "{}/nope/x.jsonl"],
    ["replay", "{}/nope"],
    ["sweep", "{}/sweep.yml", "--dry-run"],
    ["sweep", "{}/nope.yml"],
    ["sweep", "{}"],
    ["sweep", "{}/sweep.yml", "--out", "{}/good.jsonl/x"],
    ["predict", "--model", "tinny"],
    ["predict", "--model", "tiny", "--regime", "lorra"],
    ["predict", "--model", "tiny", "--card", "rtx409"],
    ["predict", "--model", "{}"],
    ["predict", "--model", "tiny", "--seq", "16"],
    ["predict", "--card", ""],
    ["predict", "--seq", "9" * 20],
    ["predict", "--batch", "1" + 17 * "0"],
    ["base"],
    ["base", "--model", "baichuan2-7b"],
    ["atlas", "{}/nope.yml"],
    ["atlas", "{}"],
    ["atlas", "{}/atlas.yml", "--dry-run"],
    ["studies", "lommo"],
    ["studies", "{}/sweep.yml"],
    ["report", "{}/nope"],
    ["report", "{}/good.jsonl"],
    ["report", "{}"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_with_json_prints_one_document_whatever_happens(command, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.jsonl").write_text(json.dumps(ROWS["boolq"][0]))
    (tmp_path / "sweep.yml").write_text(
        yaml.safe_dump({"name": "other", "grid": {"regime": ["full"]}})
    )
    (tmp_path / "atlas.yml").write_text(
        yaml.safe_dump({"models": ["tiny"], "seq": [8], "batch": [1], "regimes": ["full"]})
    )
    code = ends(
        lambda: main([*(word.replace("{}", str(tmp_path)) for word in command), "--json"]), 120
    )
    out, err = capsys.readouterr()
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code in (0, 2), code
    assert ("error" in document and document["error"] in err and "Traceback" not in err) == (
        code == 2
    )


@pytest.mark.parametrize(
    "words", [["--seq", "1e3"], ["--weights", "nf4"], ["--sek", "3"]], ids=" ".join
)
def test_an_argument_that_cannot_be_read_is_one_document_too(words, capsys):
    with pytest.raises(SystemExit):
        main(["predict", *words, "--json"])
    out, err = capsys.readouterr()
    assert words[0] in json.loads(out)["error"] and words[0] in err


def test_a_typo_is_answered_with_the_nearest_name(capsys):
    for words, name in (
        (["--regime", "lorra"], "lora"),
        (["--card", "rtx409"], "rtx4090"),
        (["--model", "tinny"], "tiny"),
    ):
        assert (
            main(["predict", "--model", "tiny", *words]) == 2
            and f"did you mean {name}" in capsys.readouterr().err
        )
    assert (
        main(["sweep", "params/quik.yml"]) == 2
        and "did you mean quick.yml" in capsys.readouterr().err
    )


def test_a_sweeps_report_lies_with_its_runs_whatever_the_file_is_called(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump({"name": "other", "grid": {"regime": ["full", "lomo"]}}))
    monkeypatch.chdir(tmp_path)

    def run_all(notebook, due, finished, quiet):
        for cell in due:
            _run(cell.folder, cell.params["regime"])

    monkeypatch.setattr("vramlab.runs.sweep._run_all", run_all)
    assert main(["sweep", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (
        document["report"] == "outputs/other/report.html"
        and Path(document["report"]).stat().st_size == document["size_bytes"]
    )
    assert [row["outcome"] for row in document["cells"]] == ["ok", "ok"]


@pytest.mark.parametrize(
    "grid",
    [
        {"regime": ["full", "lomo", "full"]},
        {"regime": ["full", "lomo"], "seed": [0, 0]},
        {"with": [{"regime": "full"}, {"regime": "lomo"}, {"regime": "full", "lr": 0.0}]},
        {"regime": ["full"], "lr": [0.0, read_regime("full").lr, 9e-3]},
    ],
)
def test_combinations_that_are_one_run_are_one_cell(grid, tmp_path, capsys):
    (tmp_path / "twice.yml").write_text(yaml.safe_dump({"grid": grid}))
    _, _, cells = read_sweep(tmp_path / "twice.yml")
    assert len({cell.folder for cell in cells}) == len(cells) == 2
    assert "are 2 runs; each is run once" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "..", "", "a\0b", "n" * 300])
def test_a_sweeps_name_is_one_folder_under_outputs(name, tmp_path):
    (tmp_path / "x.yml").write_text(yaml.safe_dump({"name": name, "grid": {"regime": ["full"]}}))
    with pytest.raises(BadFile, match="one folder under outputs"):
        read_sweep(tmp_path / "x.yml")


def test_a_grid_without_end_is_refused(tmp_path):
    (tmp_path / "x.yml").write_text(
        yaml.safe_dump({"grid": {"seed": list(range(200)), "data_seed": list(range(200))}})
    )
    with pytest.raises(ValueError, match="40,000 combinations"):
        read_sweep(tmp_path / "x.yml")


def test_a_disk_that_is_full_or_read_only_is_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.jsonl").write_text(json.dumps(ROWS["boolq"][0]))
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES):

        def lost(*_, code=code):
            raise OSError(code, os.strerror(code), "/some/place")

        monkeypatch.setattr(os, "replace", lost)
        assert (
            main(["items", str(tmp_path / "good.jsonl"), "--write", str(tmp_path / "copy.jsonl")])
            == 2
        )
        assert capsys.readouterr().err == f"vramlab items: /some/place: {os.strerror(code)}\n"
        assert not list(tmp_path.glob("*.part"))


def test_a_judge_never_runs_code_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    trusted = []

    class Loads:
        id2label, model_max_length = {0: "CONSISTENT", 1: "INCONSISTENT"}, 8

        @classmethod
        def from_pretrained(cls, folder, trust_remote_code=None, output_loading_info=False, **_):
            trusted.append(trust_remote_code)
            model = SimpleNamespace(
                config=SimpleNamespace(max_position_embeddings=8),
                eval=lambda: SimpleNamespace(to=str),
            )
            return (model, {"missing_keys": []}) if output_loading_info else cls

    for name in ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer"):
        monkeypatch.setattr(checker, name, Loads)
    checker.Checker.load(tmp_path)
    assert trusted == [False, False, False]
