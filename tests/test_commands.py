"""What commands do with their options and their errors, with the library's part faked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vramlab import cli
from vramlab.regimes.regime import read_regimes
from vramlab.runs import sweep


def test_json_holds_no_number_that_is_not_finite():
    found = cli._plain(
        {
            "a": [1.5, float("nan")],
            "b": (float("inf"), {"c": -0.0}),
            "d": "nan",
            "e": None,
            "f": True,
        }
    )
    assert found == {"a": [1.5, None], "b": [None, {"c": 0.0}], "d": "nan", "e": None, "f": True}


def test_the_table_leaves_defaults_empty_and_tells_other_fields():
    rows = read_regimes()
    lines = cli.table({name: rows[name] for name in ("full", "lomo", "chunkft_128")}).splitlines()
    axes = lines[0].split(" | ")[1:-1]
    cells = {
        line.split("`")[1]: dict(zip(axes, line.split(" | ")[1:], strict=False))
        for line in lines[2:]
    }
    assert (
        set(cells["full"].values()) == {""}
        and lines[1].count("---") == lines[0].count("|") - 1 == len(axes) + 2
    )
    assert {axis: value for axis, value in cells["lomo"].items() if value}.keys() >= {
        "until",
        "rule",
    }
    assert cells["lomo"]["until"] == "backward" and "(count 128" in cells["chunkft_128"]["trains"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("wrong"), 2, "wrong"),
        (OSError(2, "gone", "a.yml"), 2, "a.yml: gone"),
        (OSError("no name"), 2, "no name"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_document_and_a_code(error, code, words, monkeypatch, capsys):
    def raises():
        raise error

    monkeypatch.setattr("vramlab.runs.machine_report.examine", raises)
    assert cli.main(["doctor", "--json"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": words} and printed.err == (
        "" if code == 130 else f"vramlab doctor: {words}\n"
    )
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--json", "--no-such"])
    assert "no-such" in json.loads(capsys.readouterr().out)["error"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--no-such"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "outcome", "code", "built", "charted"),
    [
        ((), "ok", 0, True, True),
        ((), "due", 0, False, False),
        (("--dry-run",), "ok", 0, False, False),
        (("--no-report",), "ok", 0, False, False),
        (("--no-forecast",), "ok", 0, True, False),
        ((), "ok", 130, True, False),
        ((), "oom", 1, True, True),
    ],
)
def test_a_sweep_is_reported_where_anything_has_run(
    options, outcome, code, built, charted, monkeypatch, tmp_path, capsys
):
    done = []
    swept = SimpleNamespace(
        rows=[{"outcome": "due"}, {"outcome": outcome}], folder=tmp_path, code=code
    )
    monkeypatch.setattr(sweep, "sweep", lambda *args, **named: swept)
    monkeypatch.setattr(sweep, "to_text", lambda rows: "rows")
    monkeypatch.setattr(cli, "_chart", lambda path, folder, quiet: done.append(path.name))
    monkeypatch.setattr(
        cli, "_build", lambda folder: done.append("report") or cli.Answer({"report": "r"}, "report")
    )
    (tmp_path / "atlas-mine.yml").write_text("")
    assert cli.main(["sweep", str(tmp_path / "mine.yml"), *options]) == code
    assert done == ["atlas-mine.yml"] * charted + ["report"] * built
    assert capsys.readouterr().out == ("rows\nreport\n" if built else "rows\n")


def test_the_largest_that_fits_is_a_value_with_its_forecast(monkeypatch, capsys):
    asked = []

    def largest(question, axis, card, settings, said):
        asked.append((question.seq, axis, card.key))
        said("tried")
        return 0, None

    monkeypatch.setattr("vramlab.forecast.forecast.largest", largest)
    command = ["predict", "--model", "tiny", "--max", "batch", "--card", "h100"]
    assert cli.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert (
        json.loads(printed.out) == {"max": "batch", "value": 0, "forecast": None}
        and printed.err == ""
    )
    assert cli.main(command) == 0 and asked == [(1024, "batch", "h100")] * 2
    printed = capsys.readouterr()
    assert (
        printed.out.startswith("largest batch that fits on H100")
        and printed.out.endswith(": 0\n")
        and printed.err == "tried\n"
    )


def test_codes_of_a_replay_and_of_studies(monkeypatch, tmp_path):
    seen = []
    for agrees, code in ((True, 0), (False, 1)):
        outcome = SimpleNamespace(
            as_dict=lambda tolerance, agrees=agrees: {"agrees": agrees, "verdict": str(tolerance)}
        )
        monkeypatch.setattr(
            "vramlab.allocator.replay.replay_file",
            lambda *asked, outcome=outcome: seen.append(asked) or outcome,
        )
        assert cli.main(["replay", "x.pickle", "--max-mib", "3", "--device", "1"]) == code
    assert [tuple(asked[1:]) for asked in seen] == [(1, 3 * 1024**2)] * 2
    for reason, code in (("", 0), ("no", 1)):
        monkeypatch.setattr(
            "vramlab.studies.run_all.run",
            lambda *args, reason=reason, **named: [{}, {"reason": reason}],
        )
        monkeypatch.setattr("vramlab.studies.run_all.to_text", lambda found: "")
        assert cli.main(["studies", "lomo"]) == code
