"""What stands in the cells, lists and sections of the report's page, worked out by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go
import pytest

from test_report_values import cell, made
from vramlab.report import (
    forecast_sections,
    forecast_tables,
    page,
    planner,
    rendering,
    run_sections,
    takeaways,
)
from vramlab.report.style import CONFIG


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, '<td data-value="">–</td>'),
        (float("nan"), '<td data-value="">–</td>'),
        (pd.NA, '<td data-value="">–</td>'),
        (999.96, '<td data-value="999.96">1000</td>'),
        (1000.0, '<td data-value="1000.0">1,000</td>'),
        (-999.0, '<td data-value="-999.0">-999</td>'),
        (-1234.5, '<td data-value="-1234.5">-1,234</td>'),
        (0.123456, '<td data-value="0.123456">0.1235</td>'),
        (12345, '<td data-value="12345">12,345</td>'),
        ("x" * 24, f"<td>{'x' * 24}</td>"),
        ("x" * 25, f"<td class=words>{'x' * 25}</td>"),
        ("<b>", "<td>&lt;b&gt;</td>"),
    ],
)
def test_a_cell_of_a_table(value, shown):
    frame = pd.DataFrame({"a": pd.Series([value], dtype=object)})
    section = rendering.Section("T", "about", None, frame)
    text = rendering.render("section", index=0, section=section)
    assert f"<tbody><tr>{shown}</tr></tbody>" in text


def test_a_section_is_numbered_and_has_what_it_was_given():
    frame = pd.DataFrame({"a_b": [1, 2]})
    figure = go.Figure(go.Bar(x=["</script>"], y=[1]))
    section = rendering.Section("T", "about", figure, frame, "B", ["s<"], "<i>extra</i>")
    text = rendering.render("section", index=7, section=section)
    assert (
        "<h2>T <span class=badge>B</span></h2>" in text
        and "<div data-figure=figure7></div>" in text
    )
    assert (
        "<ul>\n<li>s&lt;</li>\n</ul>\n<i>extra</i>" in text
        and "<summary>table, 2 rows</summary>" in text
    )
    assert (
        "<th>a b</th>" in text
        and '<tr><td data-value="1">1</td></tr><tr><td data-value="2">2</td></tr>' in text
    )
    packed = text.split("id=figure7>")[1].split("</script>")[0]
    kept = json.loads(packed)
    assert (
        "<" not in packed
        and kept["data"][0]["x"] == ["</script>"]
        and "template" not in kept["layout"]
    )
    assert kept["config"] == CONFIG
    section = rendering.Section("T", "about", None, frame.iloc[:0])
    bare = rendering.render("section", index=0, section=section)
    assert (
        "<h2>T</h2>\n<p class=soft>about</p>" in bare
        and "<ul>" not in bare
        and "data-figure" not in bare
    )
    assert "table, 0 rows" in bare


def test_the_environments_rows_leave_out_what_is_not_known():
    env = {
        "device": {"name": "C"},
        "cores": 4,
        "versions": {"torch": "2"},
        "commit": "abc",
        "dirty": True,
        "bf16": None,
    }
    result = {"base": {"hash": "h", "recipe": "r", "general": {"news": 0.51249, "law": 0.5}}}
    assert page._environment(env, result).set_index("what")["value"].to_dict() == {
        "device": "C",
        "cores": "4",
        "torch": "2",
        "commit": "abc (changed since)",
        "base model": "h",
        "base reached (general, held out)": "news 0.512, law 0.500",
    }
    clean = (
        page._environment({"commit": "abc"}, {"base": {"recipe": "r"}})
        .set_index("what")["value"]
        .to_dict()
    )
    assert clean == {"commit": "abc", "base model": "r"}


def test_what_is_predicted_to_fit_is_told_only_where_it_was_asked():
    asked = [
        {"change": "a", "fits": True},
        {"change": "b", "fits": False},
        {"change": "c", "fits": True},
    ]
    assert run_sections._would_fit({"would_fit": asked}) == ["predicted to fit: with a; or c"]
    assert run_sections._would_fit({"would_fit": asked[1:2]}) == [
        "none of the changes is predicted to fit"
    ]
    assert run_sections._would_fit({}) == [] == run_sections._would_fit({"would_fit": []})


def test_sections_are_there_only_for_what_there_is(monkeypatch):
    monkeypatch.setattr(
        run_sections, "evidence_lines", lambda found: [f" {at} " for at in range(9)]
    )
    lost = SimpleNamespace(name="full", result={"oom": {"x": 1}})
    section = run_sections._out_of_memory([lost, SimpleNamespace(name="lora", result={})])
    assert (
        section.sentences == [f"full, {at}" for at in range(6)] and section.title == "Out of memory"
    )
    empty = (run_sections._out_of_memory([]), run_sections._driver([]), run_sections._written([]))
    assert run_sections._with_content(section, *empty) == [section]
    share = {
        "judge": "oracle",
        "call": "consistent",
        "share": 0.5,
        "low": 0.25,
        "high": 0.75,
        "n": 4,
        "domain": "news",
        "shift": "none",
    }
    run = SimpleNamespace(
        name="full", params={"train_domain": "news"}, result={"generation": {"shares": [share]}}
    )
    assert run_sections._written([run]).table.to_dict("records") == [
        {
            "regime": "full",
            "judge": "oracle",
            "place": "news",
            "consistent": 0.5,
            "n": 4,
            "low": 0.25,
            "high": 0.75,
        }
    ]


def forecast(**changes) -> dict:
    curve = {"share": [0], "phase": ["forward"], "bytes": {"weights": [1]}}
    one = cell(device="cpu", curve=curve, **changes)
    return one | {"cards": {key: {**held, "retries": 0} for key, held in one["cards"].items()}}


def test_the_forecast_part_says_how_many_cells_it_draws(monkeypatch):
    failed = forecast_sections.forecast_sections(made(cell(reason="no")))
    assert [(one.title, one.figure, one.badge, len(one.table)) for one in failed] == [
        ("The atlas", None, "predicted", 1)
    ]
    monkeypatch.setattr(planner, "embed", lambda said: "PLAN")
    its = forecast_sections.forecast_sections(made(forecast()))
    assert [one.title for one in its] == [
        "The atlas",
        "Why this peak",
        "The predicted timeline",
        "Allocator what-if",
        "Regime diff",
        "Planner",
    ]
    assert {one.badge for one in its} == {"predicted, cpu"} and its[-1].extra == "PLAN"
    assert not any("Of " in one.about for one in its)
    assert its[3].sentences == [
        "In no cell here does a setting make a step fit that does not fit without it."
    ]
    assert its[-1].table.values.tolist() == [["full", "m", 8, 2]] and its[-1].figure is None
    monkeypatch.setattr(forecast_tables, "MOST_CELLS", 1)
    two = forecast_sections.forecast_sections(
        made(forecast(), forecast(seq=9), worlds=[forecast(reason="no", world=1)])
    )
    assert all(one.about.endswith(" Of 2 cells the first 1 are here.") for one in two[1:5])
    assert (two[5].title, two[5].figure, two[5].badge) == ("One rank of many", None, "predicted")


def test_the_head_of_the_page_is_of_the_first_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(takeaways, "takeaways", lambda runs: ["t<"])

    def run(name: str, ok: bool, device: str, **more) -> SimpleNamespace:
        (tmp_path / name).mkdir()
        (tmp_path / name / "env.json").touch()
        return SimpleNamespace(
            **{
                "ok": ok,
                "folder": tmp_path / name,
                "damage": {},
                "environment": {"device": {"name": device}},
                "result": {"model": name, "parameters": 1234},
                **more,
            }
        )

    runs = [
        run("bad", False, "A", damage={"env.json": "x"}),
        run("good", True, "B"),
        run("other", True, "C"),
    ]
    text = page._page("n<", runs, [], ["d<"], ["c<"])
    assert (
        "sweep n&lt; · 3 runs · model good, 1,234 parameters" in text
        and "measured on CPU</span> B</p>" in text
    )
    for said in ("<li>t&lt;</li>", "counts as not there: d&lt;</li>", "<li>c&lt;</li>"):
        assert said in text
    runs[1].folder = tmp_path / "nowhere"
    assert "CPU</span> C</p>" in page._page("n", runs, [], [], [])
    none = page._page(
        "n",
        [SimpleNamespace(**{**vars(runs[0]), "result": {"model": "m", "measured_on": "cuda"}})],
        [],
        [],
        [],
    )
    assert (
        "1 runs · model m, 0 parameters" in none
        and "measured on CUDA</span> unknown device</p>" in none
    )
    assert "counts as not there" not in none
