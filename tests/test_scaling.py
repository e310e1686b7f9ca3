"""A step solved from other sizes is the step that is traced."""

from __future__ import annotations

import dataclasses

import pytest

import micro
from vramlab.baichuan import ModelSpec
from vramlab.forecast import chart as atlas
from vramlab.forecast import forecast as predict
from vramlab.forecast.chart import Atlas, chart
from vramlab.forecast.forecast import Question
from vramlab.forecast.solver.byte_formulas import solve_bytes
from vramlab.forecast.solver.folding import differs, unfold
from vramlab.forecast.solver.scaling import Sizes, plan_for
from vramlab.forecast.trace import trace
from vramlab.regimes.head import chunks
from vramlab.regimes.regime import read_regimes, read_row, regime_row

TRACED = ((256, 1), (2048, 4), (512, 2))


def _traces(regime: str, weights: str = ""):
    row = Question("tiny", regime, 1, 1, weights)
    return [
        predict.traced_step(dataclasses.replace(row, seq=seq, batch=batch), None)
        for seq, batch in (*TRACED, (384, 3))
    ]


@pytest.mark.parametrize("regime", ["full", "offload", "lora", "fsdp"])
def test_a_solved_step_is_the_traced_one(regime):
    *given, wanted = _traces(regime)
    sizes = Sizes()
    sizes.add(given[0])
    assert sizes.at(384, 3) is None, "one size is told by nothing"
    for one in given[1:]:
        sizes.add(one)
        _same(sizes.at(384, 3), wanted)


def _same(found, wanted):
    same = [name for name in wanted.frame if name != "t_s"]
    assert found.frame[same].equals(wanted.frame[same])
    for field in dataclasses.fields(wanted):
        if field.name not in ("frame", "work", "took_s"):
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name


@pytest.fixture
def chunked(monkeypatch):
    """(regime, seq, batch) -> a step whose head has 1, 2, 3, 4, 4 and 5 chunks of 256, 512, 768,
    1024, 1280 and 1536 tokens, and 8 to 58 chunks of rows."""
    for name, value in (("CHUNK_SHARE", 16), ("LEAST_ROWS", 1), ("LEAST_PRODUCTS", 1)):
        monkeypatch.setattr(chunks, name, value)
    spec = ModelSpec(
        "micro",
        micro.model(vocab_size=173, num_hidden_layers=1, max_position_embeddings=4096).config,
        None,
    )

    def step(regime: str, seq: int, batch: int):
        row = read_regimes()[regime]
        weights = "fp32" if row.values["place"] == "host_weights" else "bf16"
        return trace(
            spec,
            read_row(regime, {**regime_row(regime), "weights": weights}),
            seq,
            batch,
            counted=False,
        )

    return step


@pytest.mark.parametrize(
    "regime",
    [
        "lomo_clip",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("lora_checkpoint", "adalomo", "host_weights")
        ),
    ],
)
def test_a_head_goes_round_its_loops_as_often_as_it_is_traced_to(regime, chunked):
    """Frozen; rows whose norms outlive their loop; three sweeps; rows on their way from the
    host."""
    sizes, wanted = Sizes(), chunked(regime, 128, 2)
    turns = [[len(loop.edges) for loop in wanted.loops]]
    for place in ((128, 8), (256, 2), (384, 2)):
        sizes.add(one := chunked(regime, *place))
        turns.append([len(loop.edges) for loop in one.loops])
    assert len({*map(tuple, turns)}) == 4
    _same(sizes.at(128, 2), wanted)


def test_a_head_that_would_take_its_gradient_in_rows_is_not_told_from_one_that_does_not(chunked):
    one = chunked("hift", 128, 10)
    assert unfold(one, 128, 8) is not None and unfold(one, 256, 6) is None
    assert len({loop.cut.rows for loop in chunked("hift", 256, 6).loops}) == 2


def test_turns_that_do_not_tell_are_not_repeated(chunked):
    two, four = chunked("lora_checkpoint", 512, 1), chunked("lora_checkpoint", 128, 10)
    assert unfold(two, 128, 10) is None, "no turn in the middle"
    plan = unfold(four, 512, 1)
    assert not differs(four, plan, two) and differs(four, plan, chunked("lora_checkpoint", 256, 1))
    event = four.loops[0].edges[2]
    for column, value in (("op", "another"), ("storage", 0)):
        frame = four.frame.copy()
        frame.loc[event, column] = value
        assert unfold(dataclasses.replace(four, frame=frame), 512, 1) is None, (
            "turns in the middle differ"
        )
    assert unfold(dataclasses.replace(four, batch=9), 512, 1) is None, (
        "the head has not seen these tokens"
    )


def test_lengths_that_kernels_round_up_are_not_solved():
    sizes = Sizes()
    for one in _traces("zero_shot")[:3]:
        sizes.add(one)
    assert sizes.at(384, 3) is not None and sizes.at(400, 3) is None


def test_steps_of_different_regimes_make_no_family():
    full, checkpoint = _traces("full")[0], _traces("checkpoint")[0]
    assert plan_for(full, dataclasses.replace(checkpoint, regime="full")) is None


def test_what_is_a_sum_of_two_takes_a_third_size():
    *given, wanted = _traces("prompt")
    sizes = Sizes()
    for one in given[:2]:
        sizes.add(one)
    assert sizes.at(384, 3) is None
    assert all(
        solve_bytes(list(TRACED[:2]), [size(*place) for place in TRACED[:2]], (384, 3)) == answer
        for size, answer in (
            (lambda s, b: 8 * s * b, 8 * 384 * 3),
            (lambda s, b: 4 * b * (s - 1), 4 * 3 * 383),
            (lambda s, b: 64 + 8 * s * b, None),
        )
    )
    turns, wanted, count = [(256, 1, 7), (2048, 4, 14)], (384, 3, 21), [lambda s, b, turns: turns]
    assert solve_bytes(turns, [28, 56], wanted, (), count, count) == 84, "four bytes a turn"
    for sizes in ([27, 54], [4 * 700, 8 * 700]):
        assert (
            solve_bytes(turns, sizes, wanted, (), count)
            and solve_bytes(turns, sizes, wanted, (), count, count) is None
        ), "no number"


@pytest.mark.parametrize(
    "size, answer",
    [
        (lambda s, b: 4096, 4096),
        (lambda s, b: 8 * s * b, 8 * 384 * 3),
        (lambda s, b: 100 + 6 * s * s, 100 + 6 * 384 * 384),
        (lambda s, b: 2 * (s - 1) * b, 2 * 383 * 3),
        (lambda s, b: 7 + s + b * s, None),
        (lambda s, b: -(-s // 1000) * 64, None),
    ],
)
def test_a_size_is_solved_only_where_it_follows(size, answer):
    assert solve_bytes(list(TRACED), [size(*place) for place in TRACED], (384, 3)) == answer


def test_an_atlas_traces_two_sizes_of_a_row_and_says_which(tmp_path, monkeypatch):
    asked = Atlas("grid", ("tiny",), (128, 256, 512), (1, 2), regimes=("full",), cards=("rtx4090",))
    traced = []

    def one(question, cache_dir, counted):
        traced.append(question)
        return predict.traced_step(question, cache_dir, counted)

    monkeypatch.setattr(atlas, "traced_step", one)
    cells = chart(asked, tmp_path, progress=False, jobs=1)["cells"]
    assert [(q.seq, q.batch) for q in traced if q.regime == "full"] == [(128, 1), (512, 2)]
    assert sum(not cell["solved"] for cell in cells) == len(traced)
    monkeypatch.setattr(atlas, "ENOUGH", 100)
    monkeypatch.setattr(Sizes, "at", lambda self, seq, batch: None)
    whole = chart(asked, None, progress=False, jobs=1)["cells"]
    assert [{**cell, "solved": 0, "trace_s": 0} for cell in cells] == [
        {**cell, "solved": 0, "trace_s": 0} for cell in whole
    ]
