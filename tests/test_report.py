"""The report says what the runs say, in one file that asks nobody for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from conftest import CHROMIUM
from vramlab.cli import main
from vramlab.report import build, figures, tables
from vramlab.report import comparison as measured
from vramlab.report import takeaways as words
from vramlab.runs.folder import read_runs
from vramlab.timeline.byte_ledger import Ledger


@pytest.fixture(scope="module")
def runs(finished):
    return read_runs(finished)


@pytest.fixture(scope="module")
def page(finished):
    return build(finished)


def _by_name(runs):
    return {run.name: run for run in runs}


def test_the_summary_is_the_results(runs):
    frame = tables.summary(runs).set_index("regime")
    full = _by_name(runs)["full"].result
    assert frame.loc["full", "peak_mib"] == full["peak_bytes"]["meter"] / 2**20
    assert frame.loc["full", "tokens_per_s"] == full["speed"]["tokens_per_s"]
    assert frame.loc["lora", "outcome"] == "oom" and frame.loc["lora", "reason"] == "no room <here>"


def test_a_bar_of_the_ledger_is_the_peak(runs):
    frame = tables.ledger(runs)
    for run in (run for run in runs if run.ok):
        assert frame.loc[frame["regime"] == run.name, "mib"].sum() == pytest.approx(
            run.result["peak"]["peak_bytes"] / 2**20
        )
    stacked = {}
    for bar in figures.ledger(runs).data:
        if bar.type == "bar":
            for regime, mib in zip(bar.x, bar.y, strict=True):
                stacked[regime] = stacked.get(regime, 0) + mib
    assert stacked["full"] == pytest.approx(
        _by_name(runs)["full"].result["peak"]["peak_bytes"] / 2**20
    )


def test_thinning_a_timeline_keeps_its_peak_and_its_sum(runs):
    run = _by_name(runs)["full"]
    for points in (20, 500):
        curve = tables.curve(run, points)
        assert (
            len(curve) <= points and curve["live"].max() == run.timeline["live_bytes"].max() / 2**20
        )
        categories = [name for name in curve if name in figures.COLORS]
        assert (curve[categories].sum(axis=1) - curve["live"]).abs().max() < 1e-6


def test_what_is_alive_at_an_event_sums_to_the_live_bytes(runs):
    frame = _by_name(runs)["full"].timeline
    event = int(frame["live_bytes"].idxmax())
    figure = figures.alive_at(frame, event, most=10**6)
    assert sum(figure.data[0].x) == pytest.approx(frame["live_bytes"].max() / 2**20)


def test_the_matrix_has_every_domain_for_every_run_and_judge(runs):
    for scoring in figures.SCORINGS:
        heat = figures.matrix_of(runs, scoring).data[0]
        assert list(heat.x) == [
            "news",
            "news, mild",
            "news, moderate",
            "general",
            "law",
            "medicine",
        ]
        assert list(heat.y) == [
            "zero_shot",
            "full",
            "checkpoint",
            "claim only",
            "unigram overlap",
            "bigram overlap",
            "majority",
        ]
        assert all(cell is not None for row in heat.z for cell in row)
        home = tables.in_domain(_by_name(runs)["full"]).loc[scoring, "value"]
        assert heat.z[1][0] == pytest.approx(home, abs=1e-4)


def test_checkpoint_lies_on_full_and_differs_from_it_by_nothing(runs):
    frame = tables.against_reference(runs)
    same = frame[frame["regime"] == "checkpoint"]
    assert (
        len(same) == 12
        and (same[["difference", "low", "high"]] == 0).all().all()
        and (same["holm_p"] == 1).all()
    )
    assert "checkpoint 0.0e+00" in "".join(words.takeaways(runs))


def test_takeaways_hold_the_runs_own_figures_and_failures(runs):
    said = " ".join(words.takeaways(runs))
    full = tables.in_domain(_by_name(runs)["full"])
    assert (
        "lora (oom: no room <here>)" in said
        and f"full reaches {full.loc['yesno', 'value']:.3f}" in said
    )
    assert re.search(r"is (NOT )?above the interval of the better overlap judge", said)
    least = min(
        (run for run in runs if run.ok and run.name != "zero_shot"),
        key=lambda run: run.result["peak"]["peak_bytes"],
    )
    assert (
        f"regimes that train: {least.name}, {least.result['peak']['peak_bytes'] / 2**20:.1f} MiB"
        in said
    )
    assert "one training seed (0)" in " ".join(words.caveats(runs))


def test_the_page_is_small_whole_and_asks_for_nothing(page):
    text = page.read_text()
    assert page.stat().st_size < 8_000_000 and "default-src 'none'" in text
    assert not re.search(r"(?:src|href)\s*=\s*['\"]?(?:https?:)?//", text.split("id=plotly>")[0])
    for drawn in re.findall(
        r'<script type="application/json" id=figure\d+>(.*?)</script>', text, re.S
    ):
        assert json.loads(drawn.replace("<\\/", "</"))["config"]["showSendToCloud"] is False
    assert "no room &lt;here&gt;" in text and "<here>" not in text
    assert text.count("<details>") == text.count("data-figure=")


def test_a_folder_where_nothing_finished_still_gets_a_report(finished, tmp_path):
    shutil.copytree(finished / "lora-0", tmp_path / "lora-0")
    assert "no room &lt;here&gt;" in build(tmp_path).read_text()


def test_a_folder_without_runs_says_how_to_make_some(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2 and "vramlab sweep" in capsys.readouterr().err


def test_the_command_says_where_and_how_large(finished, capsys):
    assert main(["report", str(finished), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["size_bytes"] == (finished / "report.html").stat().st_size


def test_a_report_is_made_without_torch(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")
    light = (
        "import sys; from vramlab.cli import main; assert main(['report', sys.argv[1]]) == 0;"
        " sys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", light, tmp_path / "runs"]).returncode == 0


def test_runs_on_other_items_are_not_compared(finished, tmp_path):
    for name in ("full-0", "checkpoint-0"):
        shutil.copytree(finished / name, tmp_path / name)
    scores = pd.read_parquet(tmp_path / "checkpoint-0" / "scores.parquet")
    scores.iloc[:-5].to_parquet(tmp_path / "checkpoint-0" / "scores.parquet")
    assert tables.against_reference(read_runs(tmp_path)).empty


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: install the package chromium, see the README")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"],
        )
        yield opened
        opened.close()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [pytest.param(1280, "light", marks=pytest.mark.slow), (1280, "dark"), (390, "light")],
)
def test_with_the_network_off_every_figure_is_drawn_and_nothing_is_wider_than_the_window(
    browser, page, width, scheme
):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme
    )
    tab, wrong = context.new_page(), []
    tab.on(
        "console",
        lambda message: (
            wrong.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:", "blob:"))
            else wrong.append(request.url)
        ),
    )
    tab.goto(page.as_uri())
    count = tab.locator("[data-figure]").count()
    for index in range(count):
        holder = tab.locator("[data-figure]").nth(index)
        holder.scroll_into_view_if_needed()
        holder.locator(".plot-container").wait_for(timeout=60000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    tab.locator("button.theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    assert wrong == [] and count >= 7
    context.close()


def test_a_cards_ledger_and_the_evidence_of_a_run_that_ran_out_are_sections(finished, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(finished, folder)
    ledger = Ledger(
        {"weights": 3 << 20, "activations": 5 << 20}, 1 << 19, 2 << 20, None, 7 << 20, 20 << 20
    )
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    evidence = {
        "source": "the simulated allocator",
        "phase": "backward",
        "asked_bytes": 9 << 20,
        "free_bytes": 1 << 20,
        "capacity_bytes": 64 << 20,
        "reserved_bytes": 63 << 20,
        "allocated_bytes": 60 << 20,
        "largest_free_block_bytes": 1 << 19,
        "owners": [{"category": "weights", "module": "lm_head", "bytes": 40 << 20}],
        "said": "",
        "would_fit": [
            {
                "change": "half the batch, 2",
                "regime": "lora",
                "kind": "predicted",
                "fits": True,
                "reason": "",
                "peak_reserved_bytes": 50 << 20,
            }
        ],
    }
    for name, more in (("full-0", {"ledger": ledger.to_json()}), ("lora-0", {"oom": evidence})):
        path = folder / name / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert measured.driver_ledgers(read_runs(folder)) == {"full": ledger}
    page = build(folder).read_text()
    assert (
        "What the driver reports" in page and "the rest" in page and "2.50" in page
    )  # 20 less 3, 5, .5, 2 and 7, in MiB
    assert "lora, out of memory in backward: asked for 9.0 MiB, 1.0 MiB free of 64.0 MiB" in page
    assert (
        "40.0 MiB  weights lm_head" in page
        and "lora, predicted to fit: with half the batch, 2" in page
    )
    row = tables.would_fit(read_runs(folder)).iloc[0]
    assert (row["with"], row["reserved_mib"], row["verdict"]) == ("half the batch, 2", 50.0, "fits")
    without = build(finished).read_text()
    assert "What the driver reports" not in without and "Out of memory</h2>" not in without
