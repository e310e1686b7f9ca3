"""The arithmetic on a napkin and its words, on ledgers and timelines written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vramlab.forecast import arithmetic as expectation
from vramlab.forecast.arithmetic import (
    GIB,
    _cause,
    causes,
    closed_form,
    comparison,
    count_parameters,
    explain,
    large_differences,
    to_text,
)
from vramlab.forecast.forecast import Question

BLOCK = 4 * 96**2 + 3 * 96 * 192 + 2 * 96
TINY = 2 * 768 * 96 + 5 * BLOCK + 96
"""Embedding and head, five blocks of attention, MLP and two norms, the last norm."""


def _question(regime: str = "full", weights: str = "", axes: str = "") -> Question:
    return Question("tiny", regime, 32, 1, weights, axes=axes)


def test_the_parameters_of_tiny_are_its_matrices_and_norms():
    assert count_parameters(_question().spec) == TINY


@pytest.mark.parametrize(
    ("question", "each"),
    [
        (_question("mixed"), (4, 4, 8)),
        (_question("bf16_sr"), (2, 2, 4)),
        (_question("adam_mini"), (4, 4, 4)),
        (_question("adam_mini", "master"), (2, 2, 8)),
        (_question("sgd"), (4, 4, 0)),
        (_question("mezo"), (4, 0, 0)),
        (_question("badam"), (4, 4 / 5, 8 / 5)),
        (_question("badam_master"), (2, 2 / 5, 12 / 5)),
        (_question("lora"), (4, 0, 0)),
        (_question("qlora"), (0.5, 0, 0)),
        (_question("int8_lora"), (1, 0, 0)),
    ],
    ids=str,
)
def test_the_bytes_a_parameter_of_every_kind_of_row(question, each):
    assert tuple(closed_form(question).values()) == tuple(round(size * TINY) for size in each)


def test_the_arithmetic_as_a_line():
    words = to_text(_question("full", "bf16"))
    assert (
        words
        == f"tiny has {TINY:,} parameters. full (bf16): 2 + 2 + 4 bytes a parameter for weights,"
        " gradients and optimizer, 0.00 GiB before any activation."
    )
    assert "104.36 GiB" not in words and "55.92 GiB before" in to_text(
        Question("baichuan2-7b", "full", 1, 1, "bf16")
    )


def _found(
    monkeypatch,
    arithmetic: dict,
    ledger: dict,
    alive: dict | None = None,
    owners: tuple = (),
    phase: str = "update",
    question: Question | None = None,
):
    question = question or _question()
    monkeypatch.setattr(expectation, "closed_form", lambda _: arithmetic)
    trace = SimpleNamespace(phase=phase, owners=lambda count: list(owners), alive=alive or {})
    return SimpleNamespace(
        question=question, weights=question.row.values["weights"], ledger=ledger, trace=trace
    )


def test_beside_sums_both_columns_and_over_is_a_hundredth_of_the_lesser(monkeypatch):
    """The forecast's sum is 100 GiB, so 1 GiB is the limit; where arithmetic says 20 GiB, 0.2;
    where it says 300, 1 again."""
    found = _found(
        monkeypatch,
        {"weights": 20 * GIB, "gradients": 20 * GIB, "optimizer": 300 * GIB},
        {
            "weights": int(20.25 * GIB),
            "gradients": int(19.875 * GIB),
            "workspace": int(0.75 * GIB),
            "cached": 2 * GIB,
            "rounding": int(57.125 * GIB),
        },
    )
    frame = comparison(found)
    assert frame["category"].tolist() == [
        "weights",
        "gradients",
        "optimizer",
        "workspace",
        "cached",
        "rounding",
        "sum",
    ]
    assert frame["arithmetic_GiB"].tolist() == [20, 20, 300, 0, 0, 0, 340]
    assert frame["predicted_GiB"].tolist() == [20.25, 19.875, 0, 0.75, 2, 57.125, 100]
    assert frame["difference_GiB"].tolist() == [0.25, -0.125, -300, 0.75, 2, 57.125, -240]
    assert large_differences(found)["category"].tolist() == [
        "weights",
        "optimizer",
        "cached",
        "rounding",
    ]
    near = _found(monkeypatch, {"weights": 300 * GIB}, {"weights": int(301.5 * GIB)})
    assert large_differences(near).empty, "below a hundredth of the sum"
    edge = _found(monkeypatch, {}, {"cached": GIB, "rounding": 99 * GIB})
    assert large_differences(edge)["category"].tolist() == ["rounding"], (
        "a hundredth itself is not over it"
    )
    high = _found(
        monkeypatch,
        {"weights": 400 * GIB},
        {"weights": 98 * GIB, "cached": GIB + 2**20, "rounding": GIB - 2**20},
    )
    assert large_differences(high)["category"].tolist() == ["weights", "cached"]


def test_every_reason_in_words(monkeypatch):
    owners = (
        ("weights", "w", 3 * GIB),
        ("gradients", "small.*", GIB // 2),
        ("gradients", "other", 1),
    )
    found = _found(
        monkeypatch,
        {"weights": 10 * GIB, "gradients": 10 * GIB, "optimizer": 10 * GIB},
        {"weights": 12 * GIB, "gradients": 4 * GIB, "workspace": 3 * GIB},
        owners=owners,
    )
    assert explain(found) == [
        (
            "weights: 12.00 GiB predicted, 10.00 by arithmetic (+2.00): more is there at the peak"
            " in update than the arithmetic has; the largest is w, 3.00 GiB."
        ),
        (
            "gradients: 4.00 GiB predicted, 10.00 by arithmetic (-6.00): the peak is in update,"
            " when not all of it is there; the largest is small.*, 0.50 GiB."
        ),
        (
            "optimizer: 0.00 GiB predicted, 10.00 by arithmetic (-10.00): the peak is in update,"
            " when none of it is there."
        ),
        (
            "workspace: 3.00 GiB predicted, 0.00 by arithmetic (+3.00): held by cuBLAS and"
            " attention kernels."
        ),
    ]


@pytest.mark.parametrize(
    ("regime", "weights", "moment_bytes"),
    [("badam", "", 4), ("badam", "bf16", 2), ("badam_master", "", 4)],
)
def test_the_active_weights_are_counted_by_their_moments(
    regime, weights, moment_bytes, monkeypatch
):
    """Two moments a weight, fp32 beside a master; the master itself is none."""
    alive = {
        ("a.exp_avg", "optimizer", "x"): 300 * moment_bytes,
        ("a.exp_avg_sq", "optimizer", "x"): 300 * moment_bytes,
        ("a.master", "optimizer", "x"): 1200,
        ("a.exp_avg", "weights", "x"): 99,
    }
    found = _found(monkeypatch, {}, {"optimizer": 1}, alive, question=_question(regime, weights))
    assert expectation._why(found, "optimizer", -1.0).startswith(
        f"the active part has 300 weights, an equal share of the model {TINY / 5:,.0f};"
    )
    assert "none of it" in expectation._why(
        _found(monkeypatch, {}, {}, alive, question=found.question), "optimizer", -1.0
    )


@pytest.mark.parametrize(
    ("regime", "axes"),
    [
        ("badam", '{"rule": "adafactor"}'),
        ("badam", '{"rule": "adam8bit"}'),
        ("full", ""),
        ("lora", ""),
    ],
)
def test_where_moments_count_no_weights_the_active_part_is_not_counted(regime, axes, monkeypatch):
    found = _found(monkeypatch, {}, {"optimizer": 1}, question=_question(regime, axes=axes))
    assert (
        expectation._why(found, "optimizer", 1.0)
        == "more is there at the peak in update than the arithmetic has"
    )


def test_causes_are_what_is_alive_at_the_peak_by_name():
    rows = pd.DataFrame(
        [
            ("alloc", 1, 100, "temporaries", "", "before"),
            ("alloc", 2, 7, "temporaries", "model.layers.0.mlp", "mm"),
            ("alloc", 3, 5, "activations", "model.layers.0.mlp", "mm"),
            ("free", 1, 100, "temporaries", "", "before"),
            ("alloc", 4, 30, "temporaries", "model.layers.1.mlp.up_proj", "mm"),
            ("alloc", 5, 20, "temporaries", "model.layers.1.self_attn", "mm"),
            ("free", 5, 20, "temporaries", "", ""),
            ("free", 4, 30, "temporaries", "model.layers.1.mlp.up_proj", "mm"),
        ],
        columns=["event", "storage", "bytes", "category", "module", "op"],
    )
    trace = SimpleNamespace(reported=slice(2, 8), device_rows=lambda: rows, phase="backward")
    live = np.array([900, 900, 12, 12, 42, 62, 42, 12])
    found = SimpleNamespace(
        trace=trace, simulated=SimpleNamespace(allocated_bytes=live), question=_question()
    )
    assert list(causes(found, "temporaries").items()) == [("MLP", 37), ("attention", 20)]
    assert causes(found, "activations") == {"MLP": 5}


@pytest.mark.parametrize(
    ("module", "op", "phase", "model", "cause"),
    [
        ("", "mm", "update", "tiny", "the update"),
        ("", "mm", "backward", "tiny", "the loss on the logits"),
        ("base_model.model", "mm", "backward", "tiny", "the loss on the logits"),
        ("lm_head", "_log_softmax", "backward", "tiny", "the loss on the logits"),
        ("lm_head", "nll_loss", "backward", "tiny", "the loss on the logits"),
        (
            "lm_head",
            "_to_copy",
            "forward",
            "tiny",
            "NormHead, its weight normalised and gradients of that",
        ),
        ("model.layers.1.mlp", "softmax", "forward", "tiny", "MLP"),
        ("model", "mm", "forward", "tiny", "the attention mask"),
        ("base_model.model.model", "mm", "forward", "baichuan2-13b", "ALiBi's mask"),
        (
            "model.layers.0.self_attn",
            "_to_copy",
            "forward",
            "tiny",
            "copies in another type, attention",
        ),
        ("model.layers.0.input_layernorm", "mm", "forward", "tiny", "norms"),
        ("model.layers.0", "add", "forward", "tiny", "sums between blocks"),
        ("model.embed_tokens", "mm", "forward", "tiny", "embedding"),
        ("model.rotary_emb", "cos", "forward", "tiny", "rotary angles"),
        ("else", "mm", "forward", "tiny", "unnamed (else)"),
    ],
)
def test_bytes_are_named_by_where_they_were_made(module, op, phase, model, cause):
    found = SimpleNamespace(
        trace=SimpleNamespace(phase=phase), question=Question(model, "full", 1, 1)
    )
    assert _cause(found, module, op) == cause


def test_causes_below_a_twentieth_are_one_and_the_head_is_in_copies_of_its_weight(monkeypatch):
    head = expectation.PLACES[0][1]
    alive = {
        ("lm_head.weight", "weights", "x"): 2 * GIB,
        ("lm_head.weight", "gradients", "x"): GIB,
        ("mlp", "weights", "x"): GIB,
    }
    found = SimpleNamespace(trace=SimpleNamespace(alive=alive))

    def words(*sizes: float) -> str:
        monkeypatch.setattr(
            expectation,
            "causes",
            lambda *_: {
                name: int(size * GIB)
                for name, size in zip((head, "MLP", "norms", "embedding"), sizes, strict=False)
            },
        )
        return expectation._named_causes(found, "activations")

    assert words(5, 14, 1) == f"{head} 5.00 (the stored weight 2.5 times); MLP 14.00; norms 1.00", (
        "a twentieth itself is named"
    )
    assert words(5, 14, 0.75, 0.25).endswith("MLP 14.00; smaller ones 1.00")
    assert words(0.125, 0.0625, 0.003, 0.003).endswith(
        "(the stored weight 0.1 times); MLP 0.06; smaller ones 0.01"
    )
    assert words(0.125, 0.0625, 0.003, 0.001).endswith("MLP 0.06"), (
        "what rounds to nothing is not told"
    )
    found.trace.alive = {}
    assert words(5) == f"{head} 5.00"
