"""Which cells of the check on a GPU are planned, begun and kept, by value: no process is started
and nothing is forecast."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace as Its

import pytest

from benchmarks import trainer_peers
from vramlab.cards import read_cards
from vramlab.forecast.forecast import Question
from vramlab.gpu_check import __main__ as command
from vramlab.gpu_check import check as gpu_check
from vramlab.gpu_check import forecasts
from vramlab.gpu_check import plan as gpu_plan
from vramlab.gpu_check.check import Check
from vramlab.gpu_check.plan import Cell
from vramlab.processes import CallResult

LORA, FULL = Question("tiny", "lora", 32, 1, "bf16"), Question("tiny", "full", 32, 1, "")
MIXED = Question("tiny", "mixed", 64, 2, "mixed")
FITS = {
    "reason": "",
    "fits": True,
    "host_bytes": 0,
    "reserved_peak_bytes": 103,
    "requested_peak_bytes": 90,
    "parts": [1],
    "step": 2,
}


@pytest.mark.parametrize(
    ("cell", "name", "runs_out"),
    [
        (Cell("tiny", FULL), "tiny-full", False),
        (Cell("measure", LORA), "lora-bf16-1x32", False),
        (Cell("measure", FULL), "full-1x32", False),
        (Cell("measure", MIXED), "mixed-2x64", False),
        (Cell("peer", LORA, FITS), "lora-bf16-1x32-trainer", False),
        (Cell("measure", LORA, FITS, limit_bytes=1), "lora-bf16-1x32-oom", True),
        (Cell("measure", LORA, {"fits": False}), "lora-bf16-1x32-oom", True),
        (Cell("measure", LORA, {"fits": None}), "lora-bf16-1x32", False),
    ],
)
def test_a_cell_has_a_name_by_what_it_does(cell, name, runs_out):
    assert cell.name == name and cell.meant_to_run_out is runs_out
    assert gpu_check.ended_as_expected(cell, {"outcome": "oom"}) is runs_out
    assert gpu_check.ended_as_expected(cell, {"outcome": "ok"}) is not runs_out


def test_rows_whose_point_is_their_type_are_asked_for_as_written_and_once():
    asked = gpu_plan.questions("tiny", (32,), ("full", "mixed", "lora", "fsdp"))
    assert [(each.regime, each.weights) for each in asked] == [
        ("lora", "bf16"),
        ("full", "bf16"),
        ("mixed", ""),
    ]
    assert (
        gpu_plan.row_name(asked[1]) == "bf16"
        and gpu_plan.row_name(FULL) == "full"
        and gpu_plan.row_name(asked[0]) == "lora"
    )


def test_of_cards_of_one_kind_the_rates_are_those_of_the_nearest_in_memory():
    for near in read_cards().values():
        alike = [
            card
            for card in read_cards().values()
            if card.compute_capability == near.compute_capability
        ]
        if len({card.total_bytes for card in alike}) == len(alike):
            found = gpu_plan.card_of(
                {
                    "name": "it",
                    "total_bytes": near.total_bytes + 1000,
                    "context_bytes": 3 << 20,
                    "compute_capability": list(near.compute_capability),
                }
            )
            assert found.bf16_tflops == near.bf16_tflops and found.source == {
                "rates": f"of {near.name}"
            }
            assert found.total_bytes == near.total_bytes + 1000 and found.context_mib == 3.0


@pytest.mark.parametrize(
    ("weights", "each"),
    [("bf16", 2), ("fp32", 6), ("nf4", 2.5), ("mixed", 6), ("int8", 3), ("other", 2)],
)
def test_a_model_is_made_as_published_and_once_more_where_it_is_stored_otherwise(
    monkeypatch, weights, each
):
    monkeypatch.setattr(gpu_plan, "count_parameters", lambda spec: 1000)
    assert (
        gpu_plan._model_bytes(Its(row=Its(values={"weights": weights}), spec=None)) == 1000 * each
    )


@pytest.mark.parametrize(("host_bytes", "planned"), [(600, True), (601, False)])
def test_a_row_is_measured_where_seven_tenths_of_host_memory_hold_what_it_puts_there(
    monkeypatch, host_bytes, planned
):
    monkeypatch.setattr(gpu_plan, "_model_bytes", lambda question: 100)
    cells = gpu_plan.plan(
        [LORA], {"lora-bf16-1x32": {**FITS, "host_bytes": host_bytes}}, {"host_bytes": 1000}, ()
    )
    assert bool(cells) is planned


def test_what_is_not_forecast_in_time_comes_last_and_none_runs_out_where_there_is_no_forecast():
    assert gpu_plan.plan([LORA], {}, {"host_bytes": 10**12}, ()) == [Cell("measure", LORA)]
    assert gpu_plan.running_out([], []) == []
    (short,) = gpu_plan.running_out([Cell("measure", LORA, FITS)], [])
    assert short.limit_bytes == 77  # three quarters of 103, rounded down


def made(**changed):
    figures = {
        "allocated_peak_bytes": 5,
        "reserved_peak_bytes": 6,
        "fits": True,
        "retries": 1,
        "ledger": {"a": 4},
        "floor": Its(s=0.5),
    }
    step = Its(
        peak_bytes=4,
        host_bytes=3,
        phase="forward",
        ledger={"b": 4},
        step=1,
        parts=(2,),
        device="gpu",
        work={"forward": {"flops": {"bfloat16": 5, "float32": 6}}},
        events="events",
    )
    return Its(**{**figures, "trace": step, **changed})


def test_a_forecast_in_plain_numbers_with_a_card_and_without_one(monkeypatch):
    monkeypatch.setattr(forecasts, "forecast", lambda question, card, cache_dir: made())
    monkeypatch.setattr(forecasts, "trace", lambda *asked, mode: made().trace)
    monkeypatch.setattr(forecasts, "simulate", lambda events: Its(peak_reserved_bytes=8))
    monkeypatch.setattr(
        forecasts, "time", Its(perf_counter=iter([10.0, 14.0, 20.0, 21.0, 30.0]).__next__)
    )
    same = {
        "reason": "",
        "requested_peak_bytes": 4,
        "host_bytes": 3,
        "phase": "forward",
        "step": 1,
        "parts": [2],
        "flops": {"forward": 11},
        "device": "gpu",
    }
    assert forecasts.predict_step(LORA, "card") == {
        **same,
        "allocated_peak_bytes": 5,
        "reserved_peak_bytes": 6,
        "fits": True,
        "num_alloc_retries": 1,
        "ledger": {"a": 4},
        "floor_s": 0.5,
        "took_s": 4.0,
    }
    assert forecasts.predict_step(LORA, None) == {
        **same,
        "allocated_peak_bytes": 4,
        "reserved_peak_bytes": 8,
        "fits": None,
        "num_alloc_retries": 0,
        "ledger": {"b": 4},
        "floor_s": None,
        "took_s": 1.0,
    }
    monkeypatch.setattr(forecasts, "forecast", lambda question, card, cache_dir: {}["a\n b"])
    assert forecasts.predict_step(LORA, "card") == {"reason": "KeyError: 'a\\n b'"}


def test_forecasts_that_are_done_are_kept_and_those_of_other_code_are_made_again(
    monkeypatch, tmp_path
):
    ends = {LORA: ({"reason": "", "made": 1}, ""), FULL: (None, "ValueError: odd")}
    asked = []

    def side_by_side(function, questions, jobs, environment, budget_s):
        asked.append((function.keywords, questions, jobs, environment, budget_s))
        return [(question, *ends[question]) for question in questions if question in ends]

    monkeypatch.setattr(forecasts, "side_by_side", side_by_side)
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"code": "then", "steps": {"old": 1}}))
    expected = {
        "lora-bf16-1x32": {"reason": "", "made": 1},
        "full-1x32": {"reason": "ValueError: odd"},
    }
    assert forecasts.forecast_all([LORA, FULL, MIXED], None, file, "now", 1.5, 3) == expected
    assert json.loads(file.read_text()) == {"code": "now", "steps": expected}
    assert forecasts.forecast_all([LORA, MIXED], None, file, "now", 1.5, 3) == expected
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert asked == [
        ({"card": None}, [LORA, FULL, MIXED], 3, hidden, 1.5),
        ({"card": None}, [MIXED], 3, hidden, 1.5),
    ]


# the check ----------------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.forecasts, "code_hash", lambda peers: "now")
    monkeypatch.setattr(gpu_check, "time", Its(monotonic=lambda: 1000.0))
    monkeypatch.setattr(gpu_check.table, "to_line", lambda cell, result: cell.name)
    return Check(tmp_path / "out", 2.0, "cpu", "tiny", (32,), small=())


def keep(check, cell, **found):
    (check.out / cell.name).mkdir(parents=True, exist_ok=True)
    (check.out / cell.name / "result.json").write_text(json.dumps({"code": "now", **found}))


def test_minutes_are_of_sixty_seconds(check):
    assert check.left_s == 120.0 and check.ends == 1120.0


@pytest.mark.parametrize(
    ("left_s", "limits"), [(19.9, []), (20.0, [20.0]), (89.0, [89.0]), (95.0, [90.0])]
)
def test_a_cell_is_begun_while_there_is_time_and_ended_in_time(check, monkeypatch, left_s, limits):
    asked = []
    check.ends = 1000.0 + left_s
    monkeypatch.setattr(
        Check, "run_cell", lambda self, cell, limit_s: asked.append(limit_s) or {"outcome": "ok"}
    )
    check.measure([Cell("measure", LORA, FITS)], None)
    assert asked == pytest.approx(limits)


@pytest.mark.parametrize(
    ("limit", "capacity", "with_card", "key", "capacity_bytes"),
    [
        (7 << 20, 5 << 20, True, "limit", 5 << 20),
        (0, 5 << 20, True, "here", 4 << 30),
        (0, 5 << 20, False, "limit", 5 << 20),
        (7 << 20, None, True, "", None),
    ],
)
def test_what_would_have_fitted_is_asked_for_the_device_that_ran_out(
    check, monkeypatch, limit, capacity, with_card, key, capacity_bytes
):
    asked, answered = [], []
    card = dataclasses.replace(
        next(iter(read_cards().values())), key="here", total_gib=4.0, context_mib=0.0
    )
    results = [{"outcome": "oom", "oom": {"capacity_bytes": capacity}}]
    child = Its(send=lambda *payload: asked.append(payload))
    monkeypatch.setattr(Check, "run_cell", lambda self, cell, limit_s: results[-1])
    monkeypatch.setattr(Check, "_start_child", lambda self, function, environment: child)
    monkeypatch.setattr(Check, "add_what_fits", lambda self, *each: answered.append(each))
    cell = Cell("measure", LORA, FITS, limit_bytes=limit)
    check.measure([cell], card if with_card else None)
    if not key:
        assert asked == answered == []
        return
    (((function, question), limit_s),) = asked
    device = function.keywords["card"]
    assert (function.func, question, limit_s) == (gpu_check.what_fits, LORA, 120.0)
    assert device.key == key and device.capacity_bytes == pytest.approx(capacity_bytes)
    assert answered == [(cell, results[0], child)]
    for result in (
        {"outcome": "ok"},
        {"outcome": "oom"},
        {"outcome": "oom", "oom": {"capacity_bytes": 1, "would_fit": []}},
    ):
        results.append(result)
        check.measure([cell], card)
    assert len(asked) == 1


def test_an_answer_goes_into_the_record_or_why_there_is_none(check):
    cell = Cell("measure", LORA, FITS)
    for answer, expected in (
        (CallResult([1], ""), {"said": "a", "would_fit": [1]}),
        (CallResult(None, "x"), {"said": "a no answer what would have fitted: x"}),
    ):
        result = {"code": "now", "outcome": "oom", "oom": {"said": "a"}}
        (check.out / cell.name).mkdir(exist_ok=True)
        check.add_what_fits(cell, result, Its(result=lambda answer=answer: answer))
        assert check.read_result(cell) == {"code": "now", "outcome": "oom", "oom": expected}


@pytest.mark.parametrize(
    ("kept", "again"),
    [
        ({"outcome": "ok", "code": "now"}, False),
        ({"outcome": "oom", "code": "now"}, False),
        ({"outcome": "failed", "code": "now"}, True),
        ({"outcome": "ok", "code": "then"}, True),
    ],
)
def test_what_was_measured_by_this_code_is_not_measured_again(check, monkeypatch, kept, again):
    begun, sent = [], []

    def start(self, function, environment):
        begun.append((function, environment))
        return Its(
            send=lambda *payload: sent.append(payload),
            result=lambda: CallResult({"outcome": "made"}, ""),
            stop=lambda: None,
        )

    monkeypatch.setattr(Check, "_start_child", start)
    cell = Cell("measure", LORA, FITS)
    keep(check, cell, **kept)
    check._next_child = check._start_child(gpu_check.CELL, {})
    result = check.run_cell(cell, 30)
    if not again:
        assert result == kept and not sent
        return
    assert result == {**check.request(cell), "outcome": "made"} == check.read_result(cell)
    folder = str(check.out / cell.name)
    assert sent == [({**check.request(cell), "folder": folder, "budget_s": 30}, 30)]
    assert begun == [(gpu_check.CELL, {}), (gpu_check.CELL, {"HF_HUB_OFFLINE": "1"})]  # the spare


def test_a_cell_asks_by_its_forecast_and_a_peer_by_our_steps_time(check):
    keep(check, Cell("measure", LORA), outcome="ok", step_s_median=0.25)
    check.peers = Its(__name__="trainer")
    same = {
        "device": "cpu",
        "window_s": 2.2,
        "code": "now",
        "model": "tiny",
        "regime": "lora",
        "weights": "bf16",
        "seq": 32,
        "batch": 1,
        "peers": "trainer",
    }
    assert check.request(Cell("peer", LORA, FITS)) == {
        **same,
        "does": "peer",
        "limit_bytes": 0,
        "parts": [1],
        "step": 2,
        "peer_step_s": 0.25,
    }
    assert check.request(Cell("measure", LORA, limit_bytes=9)) == {
        **same,
        "does": "measure",
        "limit_bytes": 9,
        "parts": None,
        "step": None,
        "peer_step_s": None,
    }


@pytest.mark.parametrize(
    ("outcomes", "code", "said"),
    [(["ok", "ok"], 0, ""), (["ok", "oom"], 1, ""), (["ok"], 0, "1 of 2"), ([], 1, "2 of 2")],
)
def test_it_ends_well_when_what_was_begun_ended_as_it_should(
    check, monkeypatch, capsys, outcomes, code, said
):
    table = Its(to_parquet=lambda path: None)
    monkeypatch.setattr(
        gpu_check,
        "table",
        Its(
            build_table=lambda *_: table,
            summarise=lambda table: {},
            to_text=lambda *_: "the table",
        ),
    )
    cells = [Cell("measure", LORA, FITS), Cell("measure", FULL, FITS)]
    for cell, outcome in zip(cells, outcomes, strict=False):
        keep(check, cell, outcome=outcome)
    assert check.report(cells, {}, None) == code
    assert ("were not begun" in (out := capsys.readouterr().out)) is bool(said) and said in out


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ([], (8.7, "cuda", "baichuan2-7b", (1024, 4096), (), gpu_check.SMALL_SWEEP, 2.2, None)),
        (["--device", "cpu"], (8.7, "cpu", "tiny", (32, 64), (), gpu_check.SMALL_SWEEP, 0.2, None)),
        (
            ["--minutes", "3", "--model", "m", "--seq", "7", "--only", "a", "--no-tiny"],
            (3.0, "cuda", "m", (7,), ("a",), (), 2.2, None),
        ),
        (
            ["--peers", "benchmarks.trainer_peers"],
            (
                8.7,
                "cuda",
                "baichuan2-7b",
                (1024, 4096),
                (),
                gpu_check.SMALL_SWEEP,
                2.2,
                trainer_peers,
            ),
        ),
    ],
)
def test_what_is_asked_for_unless_told(monkeypatch, argv, asked):
    monkeypatch.setenv("OUT", "there")
    monkeypatch.setattr(command, "Check", lambda *given: Its(run=lambda: given))
    assert command.main(argv) == (Path("there/gpu-check"), *asked)


def test_peers_that_cannot_be_imported_say_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        command.main(["--peers", "no_such_module"])
    assert "No module named 'no_such_module': its folder must be on" in capsys.readouterr().err
