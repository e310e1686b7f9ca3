"""Figures in sentences: what a reader is told in GiB, MiB and per cent is the number behind it, in
that unit."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from vramlab.allocator.settings import Settings
from vramlab.capture import oom
from vramlab.capture.oom import evidence_lines
from vramlab.forecast.answer import takeaway, to_text
from vramlab.forecast.forecast import Forecast, Question
from vramlab.gpu_check import table as gpu_table
from vramlab.gpu_check.plan import Cell
from vramlab.report import tables
from vramlab.report import takeaways as sentences

GIB, MIB = 1 << 30, 1 << 20


def forecast(**changes) -> SimpleNamespace:
    """What `Forecast`'s sentences read, every figure another."""
    trace = SimpleNamespace(
        device="a device",
        phase="backward",
        host_bytes=5 * GIB // 4,
        crossed={},
        owners=lambda count: [("weights", "lm_head", 3 * GIB), ("gradients", "mlp", GIB // 2)][
            :count
        ],
    )
    floor = SimpleNamespace(s=1.25, binds="memory", compute_s=1.0, memory_s=1.25, bus_s=0.5)
    made = {
        "question": Question("tiny", "full", 128, 2),
        "trace": trace,
        "allocated_peak_bytes": 7 * GIB,
        "floor": floor,
        "reserved_peak_bytes": 15 * GIB // 2,
        "simulated": SimpleNamespace(label="verified"),
        "floor_s": 1.25,
        "took_s": 2.5,
        "ledger": {"weights": 4 * GIB, "cached": GIB // 4},
        "fits": True,
        "retries": 0,
        "margin_bytes": GIB // 2,
        "settings": Settings(),
        "card": SimpleNamespace(name="a card", capacity_bytes=8 * GIB, total_bytes=9 * GIB),
        "weights": "fp32",
        "max_positions": 128,
        "reserved_range_bytes": (2 * GIB, 2 * GIB),
    }
    return SimpleNamespace(**{**made, **changes}, sides=dict)


def test_a_forecast_in_words_by_value():
    lines = [" ".join(line.split()) for line in to_text(forecast()).splitlines()]
    for line in (
        "peak allocated 7.00 GiB in backward",
        "peak reserved 7.50 GiB allocator: verified",
        "host memory 1.25 GiB",
        "weights 4.00 GiB",
        "cached 0.25 GiB",
        "3.00 GiB weights lm_head",
        "0.50 GiB gradients mlp",
        "computed in 2.5 s",
    ):
        assert line in lines
    assert any("2 x 128 tokens" in line for line in lines)
    assert any("fits; margin +0.50 GiB of 8.00" in line for line in lines)
    assert any("1.250 s" in line for line in lines)
    small = to_text(forecast(fits=False, margin_bytes=-3 * GIB // 2, retries=4))
    assert "does not fit; margin -1.50 GiB of 8.00" in small and "flushing" not in small
    assert "fits, after flushing its cache 3 times;" in to_text(forecast(retries=3))
    assert "fit" not in to_text(forecast(card=None))


def test_rows_longer_than_the_model_knows_are_said():
    assert "positions" not in to_text(forecast())
    assert "rows of 128 tokens, and tiny knows 127 positions" in to_text(
        forecast(max_positions=127)
    )
    assert [
        Forecast.max_positions.fget(forecast(question=Question(model, "full", 128, 1)))
        for model in ("tiny", "llama-7b")
    ] == [4096, 2048]


def test_the_range_of_the_reserved_peak_is_told_where_it_can_be_seen():
    wide = (2 * GIB, 5 * GIB // 2)
    assert "between" not in to_text(forecast())
    assert "between 2.00 to 2.50 GiB," in " ".join(
        to_text(forecast(reserved_range_bytes=wide)).split()
    )
    assert "Reserved: 2.00 to 2.50" in takeaway(forecast(reserved_range_bytes=wide))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, ["**+0.5 GiB**", "2 x 128 tokens", "a card: it fits, predicted"]),
        ({"retries": 1}, ["it fits after flushing its cache, "]),
        (
            {"fits": False, "retries": 1, "margin_bytes": -GIB},
            ["**-1.0 GiB**", "it does not fit, predicted"],
        ),
        ({"card": None}, ["**7.5 GiB** reserved at the peak"]),
    ],
)
def test_a_takeaway_by_value(changes, parts):
    assert all(part in takeaway(forecast(**changes)) for part in parts)


def test_evidence_in_words_by_value():
    record = {
        "phase": "backward",
        "asked_bytes": 31 * MIB,
        "free_bytes": MIB // 2,
        "capacity_bytes": 2048 * MIB,
        "source": "torch",
        "reserved_bytes": 1500 * MIB,
        "allocated_bytes": 1400 * MIB,
        "largest_free_block_bytes": None,
        "said": "a note",
        "owners": [{"category": "weights", "module": "lm_head", "bytes": 1000 * MIB}],
    }
    assert evidence_lines(record) == [
        (
            "out of memory in backward: asked for 31.0 MiB, 0.5 MiB free of 2,048.0 MiB; 1,500.0"
            " MiB reserved, 1,400.0 MiB allocated, largest free block N/A (torch)"
        ),
        "     1,000.0 MiB  weights lm_head",
        "  a note",
    ]
    changes = [
        {"change": "half", "reason": "", "peak_reserved_bytes": 900 * MIB, "fits": True},
        {"change": "less", "reason": "", "peak_reserved_bytes": 2500 * MIB, "fits": False},
        {"change": "other", "reason": "it cannot", "fits": None},
    ]
    assert oom.to_text({**record, "said": "", "phase": None, "would_fit": changes}).splitlines()[
        2:
    ] == [
        "  with half: 900.0 MiB reserved, fits, predicted",
        "  with less: 2,500.0 MiB reserved, does not fit, predicted",
        "  with other: it cannot",
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("measured_bytes", 3 * GIB // 2, "1.500"),
        ("reserved_error", -0.0123, "-1.23%"),
        ("reserved_error", 0.1, "+10.00%"),
        ("mfu", 0.4567, "45.7%"),
        ("tokens_per_s", 1234.5, "1,234"),
        ("tokens_per_s", 99.994, "99.99"),
        ("tokens_per_s", 100.0, "100"),
        ("mfu", None, ""),
        ("mfu", float("nan"), ""),
    ],
)
def test_a_cell_of_the_check_by_value(name, value, text):
    assert gpu_table.to_cell(name, value) == text


def test_a_row_of_the_check_by_value():
    question, card = (
        Question("tiny", "full", 64, 1),
        SimpleNamespace(context_bytes=300, bf16_tflops=2.0),
    )
    told = {
        "allocated_peak_bytes": 900,
        "reserved_peak_bytes": 1200,
        "fits": True,
        "flops": {"forward": 1e12, "backward": 2e12, "update": 7e12},
    }
    kept = {
        "outcome": "ok",
        "reason": "",
        "allocated_peak_bytes": 1000,
        "reserved_peak_bytes": 1000,
        "nvml_used_bytes": 2000,
        "step_s_median": 3.0,
        "tokens_per_s": 90.0,
        "energy": {"j": 0.0},
        "window_tokens": 500,
        "num_alloc_retries": 2,
    }
    peer = (Cell("peer", question, told), {**kept, "tokens_per_s": 60.0})
    ours, theirs = gpu_table.build_table(
        [(Cell("measure", question, told), kept), peer], card
    ).to_dict("records")
    assert (ours["allocated_error"], ours["reserved_error"]) == pytest.approx((-0.1, 0.2)) and ours[
        "over_trainer"
    ] == 1.5
    assert (ours["predicted_nvml_bytes"], ours["measured_nvml_bytes"], ours["nvml_error"]) == (
        1500,
        2000,
        -0.25,
    )
    assert (
        ours["mfu"] == pytest.approx(0.5)
        and ours["j_per_1000_tokens"] == 0
        and ours["num_alloc_retries"] == 2
    )
    assert (
        pd.isna(theirs["predicted_allocated_bytes"])
        and pd.isna(theirs["over_trainer"])
        and theirs["mfu"] == pytest.approx(0.5)
    )
    bare = gpu_table.build_table(
        [(Cell("measure", question, told), {"outcome": "oom", "reason": "no room"})], None
    ).iloc[0]
    assert all(
        pd.isna(bare[name])
        for name in (
            "predicted_nvml_bytes",
            "nvml_error",
            "mfu",
            "j_per_1000_tokens",
            "allocated_error",
        )
    )
    assert gpu_table.to_line(Cell("measure", question), {**kept, "took_s": 7.6}).split()[1:] == [
        "ok",
        "8",
        "s",
        "90",
        "tokens/s",
    ]
    assert gpu_table.to_line(
        Cell("measure", question), {"outcome": "oom", "reason": "no room"}
    ).split()[1:] == ["oom", "0", "s", "no", "room"]


def run(**changes) -> SimpleNamespace:
    """A finished run as the report's tables read it."""
    cells = (
        ("news", "none", "yesno", "balanced_accuracy", 0.7),
        ("news", "none", "likelihood", "balanced_accuracy", 0.8),
        ("news", "mild", "yesno", "balanced_accuracy", 0.6),
        ("law", "none", "yesno", "balanced_accuracy", 0.5),
        ("news", "none", "yesno", "auc", 0.9),
    )
    accuracy = pd.DataFrame(cells, columns=["domain", "shift", "scoring", "metric", "value"])
    accuracy = accuracy.assign(
        low=accuracy["value"] - 0.1, high=accuracy["value"] + 0.1, threshold=0.5, n=9
    )
    speed = {
        "tokens_per_s": 1000.0,
        "step_s_median": 0.2,
        "step_s_q25": 0.1,
        "step_s_q75": 0.4,
        "forward_s": 0.05,
        "backward_s": 0.08,
        "update_s": 0.01,
    }
    result = {
        "outcome": "ok",
        "reason": "",
        "speed": speed,
        "peak_bytes": {"meter": 3 * MIB // 2, "process": 64 * MIB},
        "peak": {"phase": "backward"},
        "host_bytes": MIB // 4,
        "optimizer_state_bytes": 2 * MIB,
        "trainable_parameters": 77,
        "loss_first": 4.0,
        "loss_last": 2.0,
        "memory_ledger": {"weights": MIB, "gradients": MIB // 2},
    }
    return SimpleNamespace(
        **{
            "name": "full",
            "ok": True,
            "has_timeline": True,
            "result": result,
            "accuracy": accuracy,
            "params": {"train_domain": "news"},
            **changes,
        }
    )


def test_a_summary_of_runs_by_value():
    (row,) = tables.summary([run()]).to_dict("records")
    assert row == {
        "regime": "full",
        "outcome": "ok",
        "reason": "",
        "peak_mib": 1.5,
        "process_peak_mib": 64.0,
        "phase": "backward",
        "host_mib": 0.25,
        "optimizer_state_mib": 2.0,
        "trainable_parameters": 77,
        "tokens_per_s": 1000.0,
        "step_ms": 200.0,
        "step_ms_q25": 100.0,
        "step_ms_q75": 400.0,
        "forward_ms": 50.0,
        "backward_ms": 80.0,
        "update_ms": 10.0,
        "loss_first": 4.0,
        "loss_last": 2.0,
        "yesno": 0.7,
        "yesno_low": pytest.approx(0.6),
        "yesno_high": pytest.approx(0.8),
        "likelihood": 0.8,
        "likelihood_low": pytest.approx(0.7),
        "likelihood_high": pytest.approx(0.9),
    }
    assert tables.ledger([run(), run(ok=False), run(has_timeline=False)]).to_dict("records") == [
        {"regime": "full", "category": "weights", "mib": 1.0},
        {"regime": "full", "category": "gradients", "mib": 0.5},
    ]
    assert [
        tables.place(*where)
        for where in (("news", "none", "news"), ("news", "mild", "news"), ("law", "severe", "news"))
    ] == ["news", "news, mild", "law"]


@pytest.mark.parametrize(("points", "kept"), [(500, [0, 1, 2, 3]), (2, [1, 2]), (1, [2])])
def test_a_thinned_curve_keeps_the_highest_event_of_each_bin_in_mib(points, kept):
    frame = pd.DataFrame(
        {
            "event": ["alloc", "alloc", "alloc", "free"],
            "bytes": [2 * MIB, 8 * MIB, MIB, 2 * MIB],
            "step": [0, 0, 1, 1],
            "category": ["weights", "host", "activations", "weights"],
            "phase": ["init", "init", "forward", "update"],
            "live_bytes": [2 * MIB, 2 * MIB + 1, 3 * MIB, MIB],
        }
    )
    found = tables.curve(SimpleNamespace(timeline=frame), points)
    assert found["event"].tolist() == kept and "host" not in found
    assert found["weights"].tolist() == [[2.0, 2.0, 2.0, 0.0][at] for at in kept]
    assert found["activations"].tolist() == [[0.0, 0.0, 1.0, 1.0][at] for at in kept]
    assert found["live"].tolist() == (frame["live_bytes"] / MIB)[kept].tolist()
    assert found["step"].tolist() == frame["step"][kept].tolist()


def test_shares_judged_right_are_by_transformation_at_the_validations_threshold():
    scores = pd.DataFrame(
        {
            "split": ["val", *["test"] * 6],
            "domain": ["news"] * 6 + ["law"],
            "shift": "none",
            "transform": ["", "", "", "negation", "negation+noise", "entity", "entity"],
            "yesno": [9.0, 0.6, 0.5, 0.6, 0.4, 0.5, 0.1],
            "label": [1, 1, 1, 0, 0, 0, 0],
        }
    )
    found = tables.recalls([run(scores=scores)])
    assert found[["transform", "right", "n"]].to_dict("records") == [
        {"transform": "entity", "right": 1.0, "n": 1},
        {"transform": "negation", "right": 0.5, "n": 2},
        {"transform": "unchanged", "right": 0.5, "n": 2},
    ]


# sentences of the report --------------------------------------------------------------------------


def of_sizes(
    name: str,
    peak_mib: float,
    host_mib: float = 0.0,
    tokens_per_s: float = 1000.0,
    trains: int = 77,
) -> SimpleNamespace:
    """A finished run of this peak, host memory and speed."""
    usual = run().result
    return run(
        name=name,
        result={
            **usual,
            "peak_bytes": {"meter": int(peak_mib * MIB)},
            "host_bytes": int(host_mib * MIB),
            "speed": {**usual["speed"], "tokens_per_s": tokens_per_s},
            "trainable_parameters": trains,
        },
    )


def test_the_least_memory_and_the_speeds_are_those_of_regimes_that_train():
    runs = [
        of_sizes("full", 100),
        of_sizes("lora", 25, 0.5, 250.0),
        of_sizes("zero_shot", 1, tokens_per_s=9000.0, trains=0),
    ]
    memory, speed = sentences._memory_and_speed(runs)
    assert (
        memory == "Least device memory among the regimes that train: lora, 25.0 MiB at its peak in"
        " backward "
        "(and 0.5 MiB in host memory), 25% of full's 100.0 MiB."
    )
    assert speed == "Fastest: full, 1,000 tokens/s; slowest: lora, 250 (25% of it)."
    memory, _ = sentences._memory_and_speed(runs[:1])
    assert memory.endswith("in backward, 100% of full's 100.0 MiB.")
    memory, _ = sentences._memory_and_speed([of_sizes("lora", 25)])
    assert memory.endswith("25.0 MiB at its peak in backward.")
    assert sentences._memory_and_speed(runs[2:]) == []


def test_runs_that_did_not_finish_are_counted_and_named():
    wrong = run(name="lora", ok=False, result={"outcome": "failed", "reason": "no room"})
    assert (
        sentences._failed([run(), wrong]) == "1 of 2 runs did not finish: lora (failed: no room)."
    )
    assert sentences._failed([run()]) == ""


def test_a_run_in_one_sentence_and_its_claims_in_one_each():
    shares = [
        {
            "n": 5,
            "domain": "news",
            "shift": "none",
            "judge": judge,
            "call": call,
            "share": 0.5,
            "low": 0.25,
            "high": 0.75,
        }
        for judge, call in (
            ("oracle", "consistent"),
            ("oracle", "wrong"),
            ("checker", "consistent"),
        )
    ]
    result = {
        **run().result,
        "peak": {"phase": "backward", "peak_bytes": 3 * MIB // 2},
        "generation": {"checker": "C", "shares": shares},
    }
    assert (
        sentences.one_run(run(result=result))
        == "**full**: 1.5 MiB at the peak of a step (backward), 1,000 tokens/s, balanced accuracy"
        " in news 0.700 [0.600, 0.800] by yes/no and 0.800 [0.700, 0.900] by likelihood. Of 5"
        " claims it wrote in news (none), the grammar that made the document finds 50.0% [25.0%,"
        " 75.0%] consistent. Of 5 claims it wrote in news (none), the checker C calls 50.0%"
        " [25.0%, 75.0%] consistent."
    )
    assert sentences.one_run(run(result={**result, "peak": None})).startswith(
        "**full**: 1,000 tokens/s, "
    )


def judging(name: str, **scores: float) -> SimpleNamespace:
    """A run with these balanced accuracies in its domain, each in an interval of .1 to either
    side."""
    frame = pd.DataFrame(
        [
            {
                "domain": "news",
                "shift": "none",
                "metric": "balanced_accuracy",
                "scoring": scoring,
                "value": value,
                "low": value - 0.1,
                "high": value + 0.1,
            }
            for scoring, value in scores.items()
        ]
    )
    return run(name=name, accuracy=frame)


def by_name(*runs) -> dict:
    return {each.name: each for each in runs}


@pytest.mark.parametrize(
    ("high", "p", "words"),
    [
        (-0.01, 0.049, "clearly above"),
        (0.0, 0.01, "not clearly above"),
        (-0.01, 0.05, "not clearly above"),
    ],
)
def test_full_is_clearly_above_the_base_where_interval_and_test_agree(monkeypatch, high, p, words):
    paired = pd.DataFrame(
        [
            {
                "scoring": scoring,
                "place": place,
                "difference": -0.2,
                "low": -0.3,
                "high": high,
                "mcnemar_p": p,
            }
            for scoring in ("yesno", "likelihood")
            for place in ("news", "law")
        ]
    )
    monkeypatch.setattr(tables, "against_reference", lambda runs: paired)
    bars = {"unigram_overlap": 0.4, "bigram_overlap": 0.5, "claim_only": 0.45}
    full, base = (
        judging("full", yesno=0.7, likelihood=0.75, **bars),
        judging("zero_shot", yesno=0.5, likelihood=0.55),
    )
    first, second, last, _ = sentences._learned(by_name(full, base))
    assert (
        first
        == f"In news, yes/no: full reaches 0.700 [0.600, 0.800], {words} zero_shot's 0.500 [0.400,"
        f" 0.600] (paired difference +0.200 [{-high:+.3f}, +0.300], exact McNemar p = {p:.2g})."
    )
    assert second.startswith("In news, likelihood: full reaches 0.750")
    assert (
        last
        == "full's better score (likelihood, 0.750 [0.650, 0.850]) is above the interval of the"
        " better overlap judge (bigram overlap, 0.500 [0.400, 0.600]); claim only: 0.450 [0.350,"
        " 0.550]."
    )
    assert "is NOT above" in sentences._over_baselines(
        judging("full", yesno=0.69, likelihood=0.6, **bars)
    )
    assert sentences._learned(by_name(full)) == sentences._learned(by_name(base)) == []


def test_transfer_and_identity_by_value():
    far = [
        {
            "domain": domain,
            "shift": shift,
            "metric": "balanced_accuracy",
            "scoring": "yesno",
            "value": value,
            "low": 0.0,
            "high": 1.0,
        }
        for domain, shift, value in (("law", "severe", 0.6), ("news", "none", 0.9))
    ]
    full, base = (
        run(accuracy=pd.DataFrame(far)),
        run(name="zero_shot", accuracy=pd.DataFrame(far).assign(value=0.5)),
    )
    assert (
        sentences._transfer(by_name(full, base))
        == "Out of domain after training on news, yes/no: law 0.600 (zero_shot 0.500)."
    )
    full, same, short = (
        run(name=name, steps=pd.DataFrame({"loss": losses}))
        for name, losses in (("full", [2.0, 1.0]), ("checkpoint", [2.25, 0.5]), ("offload", [2.0]))
    )
    assert sentences._identical(by_name(full, same, short)).endswith(
        "the law says is 0: checkpoint 5.0e-01."
    )
    assert sentences._identical(by_name(full, short)) == sentences._identical(by_name(same)) == ""


def test_caveats_say_when_there_is_one_seed_and_each_note_once():
    runs = [run(params={"seed": seed}, result={"notes": ["a note", "b"]}) for seed in (3, 3)]
    one, two = sentences.caveats(runs), sentences.caveats([*runs, run(params={}, result={})])
    assert (
        len(one) == 4
        and "one training seed (3)" in one[1]
        and one[2:] == ["A note.", "B."]
        and two == [one[0], *one[2:]]
    )


def test_comparisons_are_against_the_finished_reference_with_holm_over_each_place_and_scoring(
    monkeypatch,
):
    def compared(one, other):
        assert other == "full"
        if one == "others":
            raise ValueError("other items")
        return pd.DataFrame(
            [
                {"domain": "news", "shift": shift, "scoring": "yesno", "mcnemar_p": p}
                for shift, p in zip(("none", "mild"), one, strict=True)
            ]
        )

    monkeypatch.setattr(tables, "compare", compared)
    runs = [
        run(scores="full"),
        run(name="a", scores=(0.01, 0.9)),
        run(name="b", scores=(0.04, 0.5)),
        run(name="c", scores="others"),
        run(name="d", ok=False),
    ]
    found = tables.against_reference(runs)
    assert found[["regime", "place", "holm_p"]].values.tolist() == [
        ["a", "news", 0.02],
        ["a", "news, mild", 1.0],
        ["b", "news", 0.04],
        ["b", "news, mild", 1.0],
    ]
    assert tables.against_reference(runs[1:]).empty and tables.against_reference(runs[:1]).empty
    assert tables.against_reference([run(ok=False, scores="full"), *runs[1:]]).empty


def test_every_judge_of_every_place_stands_once():
    rows = [
        {"domain": domain, "shift": "none", "scoring": scoring, "metric": metric, "value": 0.5}
        for domain in ("news", "law")
        for scoring, metric in (
            ("yesno", "balanced_accuracy"),
            ("claim_only", "balanced_accuracy"),
            ("yesno", "auc"),
        )
    ]
    found = tables.accuracy(
        [
            run(accuracy=pd.DataFrame(rows)),
            run(name="lora", accuracy=pd.DataFrame(rows)),
            run(ok=False),
        ]
    )
    assert found[["judge", "place"]].values.tolist() == [
        ["full", "news"],
        ["claim only", "news"],
        ["full", "law"],
        ["claim only", "law"],
        ["lora", "news"],
        ["lora", "law"],
    ]
    assert tables.accuracy([run(accuracy=pd.DataFrame(rows))], "auc")["place"].tolist() == [
        "news",
        "law",
    ]


def test_what_would_have_fitted_by_value():
    changes = [
        {
            "change": "half",
            "reason": "",
            "peak_reserved_bytes": 3 * MIB,
            "fits": True,
            "regime": "lora",
            "kind": "row",
        },
        {"change": "less", "reason": "", "peak_reserved_bytes": 5 * MIB, "fits": False},
        {"change": "other", "reason": "it cannot", "fits": None},
    ]
    found = tables.would_fit([run(), run(name="big", result={"oom": {"would_fit": changes}})])
    assert found["verdict"].tolist() == ["fits", "does not fit", "it cannot"] and list(
        found["row"]
    ) == ["lora", "", ""]
    assert found["reserved_mib"].tolist()[:2] == [3.0, 5.0] and pd.isna(found["reserved_mib"][2])
    assert set(found["regime"]) == {"big"}
