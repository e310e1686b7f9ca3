"""A forecast: its ledger closes, its cache is found again, what fits fits, and the 7B's rows cost
no more than they did."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from slow_allocator import MIB, TIE
from vramlab.allocator.settings import Settings
from vramlab.allocator.simulate import simulate
from vramlab.cards import card, read_cards
from vramlab.cli import main
from vramlab.forecast import answer, kept_answers
from vramlab.forecast import forecast as predict
from vramlab.forecast import question as questions
from vramlab.forecast.forecast import Question, assert_peak, forecast, largest
from vramlab.regimes.regime import IllegalRegime

TINY = Question("tiny", "full", 128, 2)


def _card(mib: float):
    return dataclasses.replace(card("rtx4090"), total_gib=mib / 1024, context_mib=0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("forecasts")


@pytest.fixture(scope="module")
def full(cache):
    return forecast(TINY, card("rtx4090"), cache_dir=cache)


def test_the_ledger_is_what_the_driver_would_report(full):
    at = int(full.simulated.allocated_bytes.argmax())
    assert (
        sum(full.ledger.values())
        == int(full.simulated.reserved_bytes[at]) + full.card.context_bytes
    )
    assert full.ledger["weights"] == 4 * sum(p.numel() for p in _model().parameters())
    assert full.ledger["rounding"] >= 0 and full.ledger["cached"] >= 0
    assert full.trace.peak_bytes <= full.allocated_peak_bytes <= full.reserved_peak_bytes


def _with_events(made, events, peak_mib, **changes):
    """The same forecast of another step: these events, all of them reported."""
    step = SimpleNamespace(events=events, reported=slice(0, len(events)))
    return dataclasses.replace(made, trace=step, reserved_peak_bytes=peak_mib * MIB, **changes)


def test_the_range_of_reserved_bytes_is_over_orders_of_addresses(full):
    one = _with_events(
        full, [("alloc", 1, 30 * MIB, 0), ("free", 1, 0, 0), ("alloc", 2, 20 * MIB, 0)], 30
    )
    assert one.reserved_range_bytes == (30 * MIB, 30 * MIB) and answer._reserved_range(one) == []
    either = _with_events(full, TIE, 50)
    assert (simulate(TIE).peak_reserved_bytes, either.reserved_range_bytes) == (
        50 * MIB,
        (30 * MIB, 50 * MIB),
    )
    words = "0.03 to 0.05 GiB, depending on where the driver places segments"
    assert answer._reserved_range(either) == [words] and words in answer.takeaway(either)
    assert words in answer.takeaway(dataclasses.replace(either, card=None))
    expandable = _with_events(full, TIE, 40, settings=Settings.parse("expandable_segments:True"))
    assert expandable.reserved_range_bytes == (40 * MIB, 40 * MIB)


def test_the_range_of_a_step_that_collects_garbage_is_of_the_card(full):
    settings = Settings.parse("garbage_collection_threshold:0.5,per_process_memory_fraction:0.99")
    events = [("alloc", 1, 100 * MIB, 0), ("free", 1, 0, 0), ("alloc", 2, 120 * MIB, 0)]
    on_card = _with_events(full, events, 120, card=_card(150), settings=settings, fits=True)
    assert on_card.reserved_range_bytes == (120 * MIB, 120 * MIB)
    assert dataclasses.replace(on_card, fits=False).reserved_range_bytes == (
        120 * MIB,
        220 * MIB,
    )  # as without end


def _model():
    from vramlab.baichuan import BaichuanForCausalLM

    return BaichuanForCausalLM(TINY.spec.config)


def test_a_trace_is_found_again_and_is_the_same(full, cache, monkeypatch):
    monkeypatch.setattr(questions, "trace", lambda *_, **__: pytest.fail("traced again"))
    again = forecast(TINY, card("rtx4090"), cache_dir=cache)
    assert {**again.to_json(), "took_s": 0} == {**full.to_json(), "took_s": 0}
    assert all(
        (again.trace.events[name] == full.trace.events[name]).all() for name in full.trace.events
    )
    assert again.trace.owners(5) == full.trace.owners(5)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 129},
        {"batch": 3},
        {"regime": "lomo"},
        {"weights": "bf16"},
        {"model": "baichuan2-7b"},
        {"architecture": (9, 0)},
    ],
)
def test_another_question_has_another_key(change):
    assert (
        dataclasses.replace(TINY, **change).key()
        != TINY.key()
        == Question("tiny", "full", 128, 2).key()
    )


def test_changed_code_has_another_key(monkeypatch):
    before = TINY.key()
    monkeypatch.setattr(questions, "traced_code_hash", lambda: "changed")
    assert TINY.key() != before


def test_forward_flops_are_the_formulas(full):
    config, tokens = TINY.spec.config, TINY.seq * TINY.batch
    hidden, inside = config.hidden_size, config.intermediate_size
    products = (
        config.num_hidden_layers * (4 * hidden**2 + 3 * hidden * inside)
        + config.vocab_size * hidden
    )
    attention = config.num_hidden_layers * 4 * TINY.seq * tokens * hidden
    assert full.trace.work["forward"]["flops"] == {"float32": 2 * tokens * products + attention}
    parameters = sum(
        p.numel() for p in _model().parameters()
    )  # the update touches each, its gradient and both moments
    assert full.trace.work["update"]["compulsory_bytes"] == pytest.approx(
        4 * 4 * parameters, rel=0.01
    )


def test_a_card_with_just_enough_fits_and_one_with_less_does_not(full, cache):
    just = full.reserved_peak_bytes / 2**20
    enough, less = (
        forecast(TINY, _card(size), cache_dir=cache)
        for size in (just, full.allocated_peak_bytes / 2**20 - 1)
    )
    assert enough.fits and enough.margin_bytes == 0 and enough.retries == 0
    assert less.fits is False and less.margin_bytes < 0


def test_the_largest_batch_fits_and_the_next_does_not(cache, monkeypatch):
    monkeypatch.setattr(predict, "CACHE", cache)
    small = _card(64)
    value, found = largest(TINY, "batch", small)
    assert found.fits and found.question.batch == value > 1
    assert not forecast(dataclasses.replace(TINY, batch=value + 1), small).fits
    assert largest(TINY, "batch", _card(1)) == (0, None)
    with pytest.raises(ValueError, match="seq or batch"):
        largest(TINY, "layers", small)


def test_settings_are_told_with_their_label(cache):
    found = forecast(TINY, None, Settings.parse("expandable_segments:True"), cache_dir=cache)
    assert (
        "not verified" in found.to_json()["allocator"]
        and found.fits is None
        and "context" not in found.ledger
    )


def test_published_weights_are_exact():
    assert (
        forecast(Question("baichuan2-7b", "zero_shot", 1024, 1, "bf16")).ledger["weights"]
        == 15_011_946_496
    )
    assert (
        forecast(Question("baichuan2-13b", "zero_shot", 1024, 1, "bf16")).ledger["weights"]
        == 27_793_336_320
    )


SEVEN_B = {
    ("zero_shot", "bf16"): 16_316_533_248,
    ("full", "bf16"): 60_073_340_928,
    ("full", ""): 120_129_515_008,
    ("mixed", ""): 120_910_943_744,
    ("checkpoint", "bf16"): 60_073_340_928,
    ("offload", "bf16"): 60_073_340_928,
    ("lora", "bf16"): 26_305_571_328,
    ("lomo", "bf16"): 15_627_348_992,
    ("chunkft", "bf16"): 26_400_684_544,
    ("mezo", "bf16"): 15_427_855_872,
}
"""(row, weights) -> peak allocated bytes of the 7B at 1 x 1,024 tokens: what this library costs
today, and no more."""


@pytest.mark.parametrize(
    ("regime", "weights"),
    [
        pytest.param(*row, marks=[] if row[0] in ("lora", "lomo") else [pytest.mark.slow])
        for row in SEVEN_B
    ],
)
def test_no_change_costs_the_7b_memory(regime, weights):
    assert_peak(regime, "baichuan2-7b", 1024, 1, SEVEN_B[regime, weights], weights)


BUDGETS = {
    ("badam", "bf16"): 19.0,
    ("lora_checkpoint", "bf16"): 15.6,
    ("qlora", ""): 7.0,
    ("chunkft_128", "bf16"): 15.2,
    ("adalomo", "bf16"): 15.2,
    ("chunkft_host_embed", "bf16"): 13.72,
}
"""(row, weights) -> GiB that the 7B's peak allocated at 1 x 1,024 tokens has to stay below; its
bf16 weights alone are 13.98."""


@pytest.mark.parametrize(
    ("regime", "weights"),
    [pytest.param(*row, marks=[pytest.mark.slow] if row[0] != "badam" else []) for row in BUDGETS],
)
def test_rows_that_save_memory_stay_in_their_budget(regime, weights):
    assert_peak(regime, "baichuan2-7b", 1024, 1, int(BUDGETS[regime, weights] * 2**30), weights)


def test_a_regression_names_what_is_alive(cache, monkeypatch):
    monkeypatch.setattr(predict, "CACHE", cache)
    with pytest.raises(
        AssertionError, match=r"(?s)full on tiny.*more than 1,000; alive then:\n\s+[\d,]+  \w+ "
    ):
        assert_peak("full", "tiny", 128, 2, 1000)


@pytest.fixture
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_answers, "FORECASTS", tmp_path / "kept")


def test_the_command_answers_in_words_and_in_json(capsys, nothing_kept):
    assert (
        main(
            [
                "predict",
                "--model",
                "tiny",
                "--seq",
                "128",
                "--batch",
                "2",
                "--card",
                "rtx3090",
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert (
        said["kind"] == "predicted"
        and said["fits"]
        and sum(said["ledger"].values()) <= card("rtx3090").total_bytes
    )
    least, most = said["reserved_range_bytes"]
    assert least <= said["peak_reserved_bytes"] <= most < 1.2 * least
    assert (
        main(["predict", "--model", "tiny", "--seq", "128", "--batch", "2", "--card", "rtx3090"])
        == 0
    )
    assert "GeForce RTX 3090: fits" in capsys.readouterr().out


LIGHT = """
import json, pathlib, sys
from vramlab import cli
from vramlab.forecast import kept_answers
kept_answers.FORECASTS = pathlib.Path(sys.argv[1])
code = cli.main(json.loads(sys.argv[2]))
sys.exit(7 if "torch" in sys.modules else code)
"""
"""Ends with 7 where a command has imported torch."""


def test_an_answer_is_kept_and_read_without_torch(capsys, nothing_kept, monkeypatch):
    command = ["predict", "--model", "tiny", "--seq", "64", "--card", "rtx3090"]
    assert main(command) == main([*command, "--json"]) == 0
    computed = capsys.readouterr().out
    monkeypatch.setattr(answer, "forecast", lambda *_: pytest.fail("computed again"))
    assert main(command) == main([*command, "--json"]) == 0
    assert capsys.readouterr().out == computed
    for options in (command, [*command, "--json"]):
        light = subprocess.run(
            [sys.executable, "-c", LIGHT, str(kept_answers.FORECASTS), json.dumps(options)],
            capture_output=True,
            text=True,
        )
        assert light.returncode == 0 and light.stdout in computed, light.stderr


def test_an_answer_is_of_its_options_and_of_its_model_file(nothing_kept, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(answer, "answer", lambda **options: made.append(options) or {"text": "x"})
    model = tmp_path / "mine.yml"
    model.write_text("a: 1")
    request = {"model": str(model), "seq": 8}
    for change, count in (({}, 1), ({}, 1), ({"seq": 9}, 2), ({"model": "tiny"}, 3)):
        kept_answers.predict({**request, **change})
        assert len(made) == count
    model.write_text("a: 2")
    kept_answers.predict(request)
    assert len(made) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "rtx9999"], "it has: rtx3090"),
        (["--seq", "0"], "seq is 0"),
        (["--regime", "lomoo"], "zero_shot"),
        (["--model", "llama"], "baichuan2-7b"),
        (["--max", "seq"], "--card"),
        (["--allocator", "speed:11"], "speed"),
    ],
)
def test_a_wrong_question_is_refused_with_the_way_out(arguments, words, capsys):
    assert main(["predict", *arguments]) == 2 and words in capsys.readouterr().err


def test_another_storage_type_that_makes_the_row_illegal_is_refused():
    with pytest.raises(IllegalRegime):
        Question("tiny", "full", 128, 1, "int3").key()


def test_every_card_says_where_its_figures_come_from():
    for one in read_cards().values():
        assert (
            set(one.source) == {"memory", "context", "rates", "host"}
            and 0 < one.context_bytes < one.total_bytes < 2**38
        )


def test_a_fraction_of_the_card_is_all_that_is_left_of_it():
    """What is told as left never contradicts whether it fits."""
    for fraction in ("0.001", "0.0001", "0.5"):
        settings = Settings.parse(f"per_process_memory_fraction:{fraction}")
        found = forecast(Question("tiny", "full", 32, 1), card("rtx4090"), settings)
        assert (
            found.fits == (found.margin_bytes >= 0)
            and found.margin_bytes < float(fraction) * found.card.total_bytes
        )
