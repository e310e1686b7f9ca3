"""Measured, recorded and predicted timelines: one code draws them; a recorded run is a run like any
other."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from conftest import SMALL
from simulated_history import SimulatedHistory, recorded
from vramlab.allocator.replay import replay_file
from vramlab.capture.cuda_recorder import Recorder
from vramlab.capture.recording import COLUMNS, read_recording
from vramlab.regimes.regime import read_regimes
from vramlab.report import comparison as measured
from vramlab.report import figures
from vramlab.report.page import build
from vramlab.runs import passes
from vramlab.runs.execute import execute
from vramlab.runs.folder import Run
from vramlab.timeline.agreement import compare
from vramlab.timeline.byte_ledger import ledger
from vramlab.timeline.events import peak_event, peak_owners

LOMO = Path(__file__).parent / "recorded" / "lomo"
REGIMES = read_regimes()


def test_a_recorded_run_reads_as_it_did_when_it_was_live():
    frame = read_recording(LOMO).frame()
    peak = peak_owners(frame)
    assert (len(frame), peak["peak_bytes"], peak["phase"]) == (995, 121248, "backward")
    assert peak["categories"] == {
        "weights": 53280,
        "activations": 51440,
        "temporaries": 15716,
        "inputs": 792,
        "buffers": 20,
    }
    assert (frame["reserved_bytes"].max(), frame["allocated_bytes"].max()) == (2097152, 141824)
    assert set(frame["source"]) == {"simulated"}
    assert replay_file(LOMO / "snapshot.pickle").max_error == 0.0


def test_the_recorded_run_is_named_by_a_run_of_today():
    metered, _, _ = recorded(REGIMES["lomo"], steps=1)
    found = compare(read_recording(LOMO).frame(), metered)
    assert (found.peak_error, found.joined.share, found.divergences) == (0.0, 1.0, ())
    backward = found.joined.frame.query("phase == 'backward' and event == 'alloc'")
    assert backward["module"].str.contains("layers.1.mlp").any() and (backward["op"] != "").all()


@pytest.fixture(scope="module")
def lines():
    metered, recorder, _ = recorded(REGIMES["full"], steps=2)
    return metered, recorder.frame()


def test_every_kind_of_timeline_is_drawn_with_the_same_legend(lines):
    metered, history = lines
    shown = [measured.NamedTimeline(f"full: {measured.kind(frame)}", frame) for frame in lines]
    assert [line.name for line in shown] == [
        "full: measured on a CPU",
        "full: recording by our simulator, no GPU",
    ]
    first, second = (
        [(trace.name, trace.fillcolor) for trace in figures.timelines([line]).data]
        for line in shown
    )
    assert first == second and {"weights", "activations", "backward"} <= {name for name, _ in first}
    assert len(figures.timelines(shown).layout.updatemenus[0].buttons) == 2


def test_an_overlay_keeps_both_peaks_and_says_where_they_part(lines):
    metered, history = lines
    late = metered["storage"].isin(
        metered.query("step == 1 and phase == 'forward' and event == 'alloc'")["storage"].iloc[-30:]
    )
    lacking = metered[~late].reset_index(drop=True)
    lacking["live_bytes"] = (
        lacking["bytes"].where(lacking["event"] == "alloc", -lacking["bytes"]).cumsum()
    )
    found = compare(history, lacking)
    figure = measured.overlay(found, "recorded", "predicted", points=20)
    for trace, column in zip(figure.data[:2], ("measured_bytes", "predicted_bytes"), strict=True):
        assert (
            max(trace.y) == pytest.approx(found.curve[column].max() / 2**20, abs=1e-4)
            and len(trace.y) <= 60
        )
    assert min(figure.data[2].y) == pytest.approx(
        found.curve["error_bytes"].min() / 2**20, abs=1e-4
    )
    said = figure.layout.annotations[0].text
    assert (
        f"{found.first().bytes:,} bytes" in said
        and "not predicted" in said
        and f"{found.peak_error:+.3%}" in said
    )


def test_a_ledger_is_drawn_with_its_rest_and_without_inventing(lines):
    metered, history = lines
    peak = int(history["reserved_bytes"].max())
    told = ledger(
        history, sample={"used_bytes": peak + 700, "process_bytes": peak + 600}, context_bytes=500
    )
    named = {"recorded": told, "on the CPU": ledger(metered)}
    figure, table = measured.ledgers(named), measured.ledger_table(named)
    bars = {trace.name: trace.y for trace in figure.data}
    assert sum(
        size for name, (size, _) in bars.items() if size and name != "used (driver)"
    ) * 2**20 == pytest.approx(told.used)
    assert bars["the rest"][1] is None and "N/A" in figure.layout.annotations[0].text
    assert table.loc["context", "on the CPU"] == table.loc["used (driver)", "on the CPU"] == "N/A"
    assert table.loc["rounding", "recorded"] == f"{told.rounding / 2**20:,.2f}"


def test_a_runs_ledger_takes_its_context_from_before_the_first_tensor():
    _, recorder, _ = recorded(REGIMES["full"], steps=1)
    frame, before = recorder.frame(), recorder.recording.reserved_before_bytes
    t_s, reserved = (
        frame["t_s"].iloc[peak_event(frame)],
        int(frame["reserved_bytes"].iloc[peak_event(frame)]),
    )
    samples = pd.DataFrame(
        {
            "t_s": [0.0, t_s + 1e-3],
            "used_bytes": [800, reserved + 1100],
            "process_bytes": [500, reserved + 530],
        }
    ).astype({"used_bytes": "Int64", "process_bytes": "Int64"})
    told = passes.device_ledger(frame, before, samples)
    assert (before, told.context, told.other_processes, told.rest) == (0, 500, 570, 30)
    unknown = passes.device_ledger(
        frame, before, samples.assign(process_bytes=pd.array([None, None], "Int64"))
    )
    assert (unknown.context, unknown.other_processes) == (
        None,
        None,
    ) and "with context, other processes" in unknown.rest_name
    assert passes.device_ledger(frame, before, samples.iloc[:0]).used is None


@pytest.mark.slow
def test_a_run_whose_metered_pass_was_recorded_is_a_run_folder_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "watching", lambda device: Recorder(history=SimulatedHistory()))
    execute({**SMALL, "regime": "full"}, tmp_path / "full-0", progress=False)
    run = Run(tmp_path / "full-0")
    assert tuple(run.timeline.columns) == COLUMNS and run.result["host_bytes"] is None
    told = run.result["recorder"]
    assert [said.split(":")[0] for said in told["said"]] == ["NVML"] and [
        step["step"] for step in told["steps"]
    ] == [-1, 0, 1]
    assert (
        run.result["peak"]["peak_bytes"]
        == run.timeline["live_bytes"].max()
        <= told["allocated_peak_bytes"]
    )
    assert told["allocated_peak_bytes"] == run.timeline["allocated_bytes"].max()
    assert run.result["ledger"]["used"] is None and run.result["ledger"]["parts"]["rounding"] > 0
    assert "full" in build(tmp_path).read_text()
