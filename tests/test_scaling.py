"""A step solved from other sizes is the step that is traced."""

from __future__ import annotations

import dataclasses

import pytest

from vramlab import atlas, predict
from vramlab.atlas import Atlas, chart
from vramlab.predict import Question
from vramlab.scaling import Sizes, _bytes, alike

TRACED = ((256, 1), (2048, 4), (512, 2))


def _traces(regime: str, weights: str = ""):
    row = Question("tiny", regime, 1, 1, weights)
    return [predict.traced_step(dataclasses.replace(row, seq=seq, batch=batch), None) for seq, batch in (*TRACED, (384, 3))]


@pytest.mark.parametrize("regime", ["full", "offload", "lora", "fsdp"])
def test_a_solved_step_is_the_traced_one(regime):
    *given, wanted = _traces(regime)
    sizes = Sizes()
    for trace in given:
        assert sizes.at(384, 3) is None, "two sizes are solved by too much"
        sizes.add(trace)
    found = sizes.at(384, 3)
    same = [name for name in wanted.frame if name != "t_s"]
    assert found.frame[same].equals(wanted.frame[same])
    for field in dataclasses.fields(wanted):
        if field.name not in ("frame", "work", "took_s"):
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name


def test_lengths_that_kernels_round_up_are_not_solved():
    sizes = Sizes()
    for trace in _traces("zero_shot")[:3]:
        sizes.add(trace)
    assert sizes.at(384, 3) is not None and sizes.at(400, 3) is None


def test_a_head_in_chunks_is_solved_within_one_number_of_chunks_only():
    sizes = Sizes()
    for trace in _traces("lomo"):
        sizes.add(trace)
    assert sizes.at(1024, 3) is None and sizes.at(2048, 2) is None


def test_steps_of_different_regimes_make_no_family():
    full, checkpoint = _traces("full")[0], _traces("checkpoint")[0]
    assert not alike(full, dataclasses.replace(checkpoint, regime="full"))


@pytest.mark.parametrize("size, answer", [
    (lambda s, b: 4096, 4096), (lambda s, b: 8 * s * b, 8 * 384 * 3), (lambda s, b: 100 + 6 * s * s, 100 + 6 * 384 * 384),
    (lambda s, b: 2 * (s - 1) * b, 2 * 383 * 3), (lambda s, b: 7 + s + b * s, None), (lambda s, b: -(-s // 1000) * 64, None)])
def test_a_size_is_solved_only_where_it_follows(size, answer):
    assert _bytes(list(TRACED), [size(*place) for place in TRACED], (384, 3)) == answer


def test_an_atlas_traces_three_sizes_of_a_row_and_says_which(tmp_path, monkeypatch):
    asked = Atlas("grid", ("tiny",), (128, 256, 512), (1, 2), regimes=("full",), cards=("rtx4090",))
    traced = []

    def one(question, cache_dir, counted):
        traced.append(question)
        return predict.traced_step(question, cache_dir, counted)

    monkeypatch.setattr(atlas, "traced_step", one)
    cells = chart(asked, tmp_path, progress=False, jobs=1)["cells"]
    assert [q.regime for q in traced].count("full") == 3 and len({(q.seq, q.batch) for q in traced if q.regime == "full"}) == 3
    assert sum(not cell["solved"] for cell in cells) == len(traced)
    monkeypatch.setattr(atlas, "ENOUGH", 100)
    monkeypatch.setattr(Sizes, "at", lambda self, seq, batch: None)
    whole = chart(asked, None, progress=False, jobs=1)["cells"]
    assert [{**cell, "solved": 0, "trace_s": 0} for cell in cells] == [{**cell, "solved": 0, "trace_s": 0} for cell in whole]
