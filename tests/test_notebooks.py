"""Every notebook runs by itself under papermill, refuses a typo, and is committed without
outputs."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import papermill
import pytest

from conftest import CHROMIUM, SMALL
from vramlab.cards import card
from vramlab.files import ROOT
from vramlab.forecast import arithmetic as expectation
from vramlab.forecast.answer import takeaway
from vramlab.forecast.forecast import Question, forecast
from vramlab.runs.folder import Run
from vramlab.runs.parameters import KNOWN_PARAMETERS

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_stripped_with_one_parameters_cell_and_the_environments_kernel(
    path,
):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (
        not any(cell.outputs or cell.execution_count for cell in code)
        and "widgets" not in notebook.metadata
    )
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.metadata.kernelspec.name == "python3"
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "## What to expect" in prose and "## Takeaway" in prose


def test_finetunes_parameters_are_the_runs_with_the_same_defaults():
    inferred = papermill.inspect_notebook(str(ROOT / "notebooks" / "finetune.ipynb"))
    shown = {name: found["default"] for name, found in inferred.items() if name != "out_dir"}
    assert shown == {
        name: json.dumps(default) if isinstance(default, str) else str(default)
        for name, default in KNOWN_PARAMETERS.items()
    }
    assert all(found["help"] for found in inferred.values())


def _execute(path, out, **parameters):
    return papermill.execute_notebook(
        str(path), str(out), parameters=parameters, engine_name="vramlab", progress_bar=False
    )


def _figures(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return [output.data[PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]


def _last_words(notebook):
    return notebook.cells[-1].outputs[-1].data["text/markdown"]


@pytest.mark.slow
def test_finetune_trains_and_leaves_a_run_folder_and_plain_figures(tmp_path):
    done = _execute(
        ROOT / "notebooks" / "finetune.ipynb",
        tmp_path / "out.ipynb",
        regime="lomo",
        out_dir=str(tmp_path / "run"),
        **SMALL,
    )
    run = Run(tmp_path / "run")
    assert run.ok and run.params["regime"] == "lomo"
    figures = _figures(done)
    assert [figure["data"][0]["type"] for figure in figures] == ["scatter", "scatter", "heatmap"]
    peak = run.result["peak"]["peak_bytes"] / 2**20
    assert f"**lomo**: {peak:.1f} MiB at the peak" in _last_words(done)


@pytest.mark.slow
def test_the_command_line_of_the_notebooks_own_text_refuses_a_typo(tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/finetune.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "regim",
        "lomo",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown parameter regim; known: regime, model" in done.stderr


@pytest.mark.slow
def test_timeline_shows_the_run_asked_for_and_where_its_peak_is(finished, tmp_path):
    done = _execute(
        ROOT / "notebooks" / "timeline.ipynb",
        tmp_path / "out.ipynb",
        folder=str(finished),
        run_name="checkpoint",
    )
    peak = Run(finished / "checkpoint-0").result["peak"]["peak_bytes"] / 2**20
    assert (
        len(_figures(done)) == 4
        and f"peak {peak:.1f} MiB" in _last_words(done)
        and "error at the peak" in _last_words(done)
    )
    assert any(
        "held before, only predicted" in str(figure["layout"].get("annotations"))
        for figure in _figures(done)
    )
    with pytest.raises(papermill.PapermillExecutionError, match="zero_shot, full, checkpoint"):
        _execute(
            ROOT / "notebooks" / "timeline.ipynb",
            tmp_path / "no.ipynb",
            folder=str(finished),
            run_name="lomo",
        )


@pytest.mark.slow
def test_compare_draws_every_figure_and_keeps_what_failed_in_view(finished, tmp_path):
    done = _execute(
        ROOT / "notebooks" / "compare.ipynb", tmp_path / "out.ipynb", folder=str(finished)
    )
    assert len(
        _figures(done)
    ) == 5 and "1 of 4 runs did not finish: lora (oom: no room" in _last_words(done)


@pytest.mark.slow
def test_predict_says_what_the_forecast_says_beside_the_arithmetic(tmp_path):
    done = _execute(
        ROOT / "notebooks" / "predict.ipynb",
        tmp_path / "out.ipynb",
        model="tiny",
        regime="lomo",
        seq=32,
        weights="",
        sharded=["tiny"],
        worlds=[1, 8],
    )
    found = forecast(Question("tiny", "lomo", 32, 1), card("rtx4090"))
    assert [figure["data"][0]["type"] for figure in _figures(done)] == [
        "heatmap",
        "bar",
        "scatter",
        "bar",
        "bar",
        "bar",
    ]
    one_rank = _figures(done)[-1]
    assert one_rank["layout"]["xaxis"]["ticktext"] == ["1", "8"]
    assert {"collectives", "reserved at the peak"} <= {trace["name"] for trace in one_rank["data"]}
    assert takeaway(found) == _last_words(
        done
    ) and f"{found.margin_bytes / 2**30:+.1f} GiB" in takeaway(found)
    with pytest.raises(papermill.PapermillExecutionError, match="no card 'gtx'"):
        _execute(
            ROOT / "notebooks" / "predict.ipynb",
            tmp_path / "no.ipynb",
            model="tiny",
            seq=32,
            card="gtx",
        )


@pytest.mark.slow
def test_the_study_draws_a_familys_chapter_and_leaves_the_others_out(tmp_path):
    path = ROOT / "notebooks" / "studies" / "regimes.ipynb"
    done = _execute(
        path,
        tmp_path / "out.ipynb",
        model="tiny",
        seq=32,
        families=["lifetime", "projected"],
        rows=["lomo", "galore"],
    )
    ledgers = [figure for figure in _figures(done) if figure["layout"].get("barmode") == "stack"]
    assert [figure["data"][0]["y"] for figure in ledgers] == [["lomo"], ["galore"]]
    found = forecast(Question("tiny", "lomo", 32, 1, "bf16"), card("rtx4090"))
    weights = next(trace for trace in ledgers[0]["data"] if trace["name"] == "weights")
    assert weights["x"][0] == pytest.approx(found.ledger["weights"] / 2**20, abs=1e-4)
    assert {figure["layout"]["annotations"][-1]["text"] for figure in _figures(done)} == {
        "predicted",
        "measured on this CPU",
    }
    assert len(_figures(done)) == 3 and str(done).count("Left out by the parameters.") == 7
    assert "**lomo** needs least of the 2 rows drawn" in _last_words(done)


@pytest.mark.parametrize(
    ("question", "count", "each"),
    [
        (Question("baichuan2-7b", "full", 1, 1), 7_505_973_248, (4, 4, 8)),
        (Question("baichuan2-7b", "full", 1, 1, "bf16"), 7_505_973_248, (2, 2, 4)),
        (Question("baichuan2-7b", "master", 1, 1), 7_505_973_248, (2, 2, 12)),
        (Question("baichuan2-7b", "adam8bit", 1, 1, "bf16"), 7_505_973_248, (2, 2, 2.03125)),
        (Question("baichuan2-7b", "adam4bit", 1, 1, "bf16"), 7_505_973_248, (2, 2, 1.0625)),
        (Question("baichuan2-13b", "lomo", 1, 1, "bf16"), 13_896_668_160, (2, 0, 0)),
        (Question("baichuan2-7b", "chunkft", 1, 1), 7_505_973_248, (4, 0.5, 1)),
        (Question("baichuan2-7b", "zero_shot", 1, 1), 7_505_973_248, (4, 0, 0)),
    ],
)
def test_the_arithmetic_is_parameters_times_bytes(question, count, each):
    assert tuple(expectation.closed_form(question).values()) == tuple(size * count for size in each)


def test_every_difference_over_a_hundredth_is_explained_and_the_sum_is_the_ledgers():
    found = forecast(Question("tiny", "full", 64, 2), card("rtx4090"))
    frame = expectation.comparison(found).set_index("category")
    assert frame.loc["sum", "predicted_GiB"] * 2**30 == pytest.approx(sum(found.ledger.values()))
    gaps = frame.drop("sum")["difference_GiB"].abs()
    wanted = gaps.index[gaps > frame.loc["sum", "predicted_GiB"] / 100].tolist()
    told = [sentence.split(":")[0] for sentence in expectation.explain(found)]
    assert (
        set(wanted) <= set(told)
        and told == expectation.large_differences(found)["category"].tolist()
        and "context" in wanted
    )


@pytest.mark.parametrize(
    "model", ["baichuan2-7b", pytest.param("baichuan2-13b", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("regime", "weights"),
    [
        ("full", ""),
        ("full", "bf16"),
        ("mixed", ""),
        ("checkpoint", "bf16"),
        ("lora", "bf16"),
        ("lomo", "bf16"),
        ("badam", "bf16"),
        ("chunkft", "bf16"),
    ],
)
def test_no_difference_of_a_published_model_is_left_unexplained(model, regime, weights):
    """By name, and the names' bytes are the ledger's."""
    found = forecast(Question(model, regime, 1024, 1, weights), card("a100-80"))
    told = dict(sentence.split(": ", 1) for sentence in expectation.explain(found))
    assert list(told) == expectation.large_differences(found)["category"].tolist()
    for category, why in told.items():
        if category in ("activations", "temporaries"):
            named = expectation.causes(found, category)
            assert sum(named.values()) == found.ledger[category]
            assert (
                not any(name.startswith(expectation.UNNAMED) for name in named)
                and next(iter(named)) in why
            )
        elif category in ("weights", "gradients", "optimizer"):
            assert ("none of it is there" in why) is (category not in found.ledger)
        else:
            assert expectation.WHY[category] in why
    if regime == "badam":
        wide, inner = {"baichuan2-7b": (4096, 11008), "baichuan2-13b": (5120, 13696)}[model]
        block = 4 * wide**2 + 3 * wide * inner + 2 * wide
        assert f"the active part has {block:,} weights" in told["optimizer"]
        masks = {name for name in expectation.causes(found, "activations") if "mask" in name}
        assert masks == ({"ALiBi's mask"} if model == "baichuan2-13b" else set())
    if regime == "lora":
        assert "(the stored weight 1.0 times)" in told["activations"], (
            "a frozen NormHead keeps one copy"
        )


@pytest.fixture
def lab(finished, tmp_path):
    """JupyterLab on a copy of the notebooks; gives its address."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    source = tmp_path / "notebooks" / "timeline.ipynb"
    source.write_text(source.read_text().replace("outputs/quick", str(finished)))
    source = tmp_path / "notebooks" / "predict.ipynb"
    notebook = nbformat.read(source, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += '\nmodel, seq, weights, sharded, worlds = "tiny", 32, "", ["tiny"], [1, 8]'
    nbformat.write(notebook, source)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.token=t",
            "--LabApp.news_url=None",
            f"--ServerApp.root_dir={tmp_path}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/api?token=t").close()
            break
        except OSError:
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(timeout=30)


@contextlib.contextmanager
def _run_in(lab: str, name: str):
    """A tab in which JupyterLab has opened the notebook and was told to run all of it."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: install the package chromium, see the README")
    sync_api.expect.set_options(timeout=30_000)  # another test may be at work beside it
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        tab = browser.new_page(viewport={"width": 1400, "height": 4000})
        tab.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?token=t")
        tab.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for(timeout=240000)
        tab.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        tab.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        yield tab, sync_api.expect
        browser.close()


@pytest.mark.slow
def test_in_jupyterlab_a_widget_redraws_its_figure(lab):
    with _run_in(lab, "timeline") as (tab, expect):
        choice = tab.locator(".widget-dropdown select").first
        choice.wait_for(timeout=240000)
        first = tab.locator(
            ".jp-CodeCell:has(.widget-dropdown)"
        ).first  # of several figures with a peak
        words = first.locator(".annotation-text", has_text="peak")
        before = words.text_content(timeout=60000)
        choice.select_option("checkpoint")
        expect(words).not_to_have_text(before, timeout=60000)
        expect(words).to_have_count(1)  # redrawn in place, not beside


@pytest.mark.slow
def test_in_jupyterlab_the_planners_answer_follows_its_controls(lab):
    """Every control by itself, and what it says is the forecast's or between two."""
    with _run_in(lab, "predict") as (tab, expect):
        planner = tab.locator(".jp-OutputArea-output .planner")
        planner.wait_for(timeout=240000)
        planner.scroll_into_view_if_needed()
        regime, chosen = planner.locator("select").nth(1), planner.locator("select").nth(2)
        answer = planner.locator("[role=status]")
        tokens, rows = planner.get_by_label("tokens a row"), planner.get_by_label("rows (")
        regime.select_option("lomo")
        chosen.select_option("rtx4090")
        found = forecast(Question("tiny", "lomo", 32, 1), card("rtx4090"))
        expect(answer).to_have_text(
            f"Fits: {found.reserved_peak_bytes / 2**30:.1f} GiB reserved, margin "
            f"{found.margin_bytes / 2**30:+.1f} GiB (a forecast, predicted)."
        )
        tokens.click()
        tokens.press("ArrowUp")  # the notebook must not take the key for its own
        assert tokens.input_value() == "33"
        expect(answer).to_contain_text("interpolated linearly between forecasts")
        tokens.fill("64")
        expect(answer).to_contain_text("(a forecast, predicted)")
        before = answer.text_content()
        chosen.select_option("h100")
        expect(answer).not_to_have_text(before)
        rows.fill("2")
        expect(answer).to_contain_text("Refused")
