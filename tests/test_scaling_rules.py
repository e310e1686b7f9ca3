"""What a size is solved from, by hand: places, coefficients, families, without a trace."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from vramlab.forecast import chart as atlas
from vramlab.forecast.chart import Atlas
from vramlab.forecast.forecast import Question
from vramlab.forecast.solver import byte_formulas, scaling
from vramlab.forecast.solver.byte_formulas import solve_bytes, solve_coefficients
from vramlab.forecast.solver.scaling import Sizes, _between, _Family, plan_for
from vramlab.regimes.head.head import Fused


def test_the_monomials_of_a_place():
    assert [term(3, 5) for term in byte_formulas.MONOMIALS] == [1, 3, 5, 15, 9, 45]
    assert [term(3, 5) for term in byte_formulas.SHIFTED] == [5 * 2]
    assert [term(3, 5, 7) for term in byte_formulas.IN_A_TURN] == [1, 3, 5, 15]
    assert len(byte_formulas.PAIRS) == 15 and [
        term(3, 5, 7) for term in byte_formulas.PAIRS_IN_A_TURN[-1]
    ] == [
        1,
        7,
    ]
    assert len(byte_formulas.PAIRS_IN_A_TURN) == 6 + 1


@pytest.mark.parametrize(
    ("rows", "sizes", "found"),
    [
        ([(3,), (6,)], [12, 24], (12, 3)),
        ([(3,), (6,)], [12, 25], None),
        ([(5,)], [7], (7, 5)),
        ([(1, 2), (1, 5)], [7, 13], (9, 6, 3)),  # 3 + 2 m, times the determinant 1 x 5 - 2 x 1
        ([(1, 2), (1, 2), (1, 5)], [7, 7, 13], (9, 6, 3)),
        ([(1, 2), (2, 4)], [7, 14], None),
        ([(1, 2), (1, 5), (1, 6)], [7, 13, 15], (9, 6, 3)),
        ([(1, 2), (1, 5), (1, 6)], [7, 13, 16], None),
        ([(2, 3), (5, 7)], [2 * 11 + 3 * 13, 5 * 11 + 7 * 13], (-11, -13, -1)),
    ],
)
def test_coefficients_are_integers_over_one_scale_and_hold_in_every_row(rows, sizes, found):
    assert solve_coefficients(rows, sizes) == found


def test_an_answer_is_whole_positive_and_one():
    both = [(128, 1), (256, 2)], [128, 256]  # tokens, or 128 rows
    assert solve_bytes(*both, (384, 3)) == 384 and solve_bytes(*both, (384, 1)) is None, (
        "two explanations, one answer or none"
    )
    assert solve_bytes([(128, 1), (256, 2)], [64, 256], (384, 3)) == 64 * 9
    assert solve_bytes([(2, 1), (4, 1)], [1, 2], (3, 1), singles=(lambda s, b: s,)) is None, (
        "a byte and a half"
    )
    assert solve_bytes([(2, 1), (4, 1)], [2, 4], (3, 1), singles=(lambda s, b: s,)) == 3
    assert solve_bytes([(2, 1), (4, 1)], [0, 0], (3, 1), singles=(lambda s, b: s,)) == 0
    assert (
        solve_bytes(
            [(2, 1), (4, 1), (8, 1)], [6, 4, 0], (9, 1), pairs=[(lambda s, b: 1, lambda s, b: s)]
        )
        is None
    ), "less than none"
    assert (
        solve_bytes(
            [(2, 1), (4, 1), (8, 1)], [6, 4, 0], (8, 1), pairs=[(lambda s, b: 1, lambda s, b: s)]
        )
        == 0
    )
    assert (
        solve_bytes(
            [(2, 1), (4, 1), (2, 1)], [3, 6, 3], (6, 1), pairs=[], singles=(lambda s, b: s,)
        )
        == 9
    ), "two places, one twice"


def test_a_count_is_of_eight_bytes_at_most():
    one, turns = lambda s, turns: 1, lambda s, turns: turns
    for each, answer in ((8, 8 * 5), (9, None)):
        assert (
            solve_bytes([(1, 2), (1, 4)], [2 * each, 4 * each], (1, 5), (), [turns], [turns])
            == answer
        )
        pair = [100 + each * count for count in (2, 4, 7)]
        assert solve_bytes([(1, 2), (1, 4), (2, 7)], pair, (1, 5), [(one, turns)], (), [turns]) == (
            answer and 100 + answer
        )
    halves = [(1, 2), (1, 4), (2, 8)], [3 + 1, 3 + 2, 3 + 4], (1, 6)
    assert solve_bytes(*halves, [(one, turns)], ()) == 3 + 3
    assert solve_bytes(*halves, [(one, turns)], (), [turns]) is None, "half a byte a turn"


@pytest.mark.parametrize(
    ("wanted", "whole", "in_chunks"),
    [
        ((128, 1), True, True),
        ((512, 4), True, True),
        ((256, 2), True, True),
        ((127, 2), False, False),
        ((513, 2), False, False),
        ((256, 5), False, False),
        ((384, 4), True, True),
        ((128, 4), True, True),
        ((512, 1), True, True),
    ],
)
def test_solved_is_only_what_lies_between(wanted, whole, in_chunks):
    assert (
        _between([(128, 1), (512, 4)], wanted, False) is whole
        and _between([(128, 1), (512, 4)], wanted, True) is in_chunks
    )


def test_tokens_too_lie_between_unless_they_are_cut_into_chunks():
    places = [(128, 4), (512, 1)]  # 512 tokens both
    assert not _between(places, (256, 1), False) and not _between(places, (256, 4), False)
    assert (
        _between(places, (256, 2), False)
        and _between(places, (256, 1), True)
        and _between(places, (256, 4), True)
    )


def _family(traces: int, answer, seq: int = 128):
    return SimpleNamespace(
        traces=[SimpleNamespace(seq=seq)] * traces,
        at=lambda seq, batch: answer and (answer, seq, batch),
    )


def test_the_first_family_that_answers_does_and_one_trace_tells_nothing():
    sizes = Sizes()
    assert sizes.at(128, 1) is None
    sizes._families = [
        _family(1, "lone"),
        _family(2, None),
        _family(2, "second"),
        _family(3, "third"),
    ]
    assert sizes.at(256, 3) == ("second", 256, 3) and sizes.at(192, 3) is None
    sizes._families.append(_family(1, "odd", seq=100))
    assert sizes.at(256, 3) is None, "a traced length that kernels rounded up tells nothing"


def _trace(**changes):
    frame = pd.DataFrame(
        {"event": ["alloc"], "bytes": [changes.pop("host", 10)], "category": ["host"]}
    )
    return SimpleNamespace(
        **{
            **dict(
                model="m",
                regime="r",
                architecture=(8, 0),
                world=1,
                step=1,
                parts=(0,),
                ranked={},
                loops=(),
                host_bytes=30,
                seq=128,
                batch=1,
                frame=frame,
            ),
            **changes,
        }
    )


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(scaling, "unfold", lambda trace, seq, batch: (seq, batch))
    monkeypatch.setattr(scaling, "differs", lambda trace, plan, other: False)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"regime": "s"},
        {"architecture": (9, 0)},
        {"world": 2},
        {"step": 2},
        {"parts": (1,)},
        {"ranked": {1: 1}},
        {"host_bytes": 31},
        {"host": 11},
    ],
    ids=str,
)
def test_what_differs_in_anything_but_size_is_not_alike(change, told, monkeypatch):
    assert plan_for(_trace(), _trace(seq=256, batch=4)) and not plan_for(_trace(), _trace(**change))
    assert plan_for(_trace(), _trace(host_bytes=31, host=11)), (
        "host bytes of the timeline are sizes too"
    )
    monkeypatch.setattr(scaling, "differs", lambda trace, plan, other: True)
    assert not plan_for(_trace(), _trace())


def test_a_family_takes_what_one_of_it_tells_and_begins_with_that_one(monkeypatch):
    """Traces are numbers here: a larger one tells a smaller one; in the end, one of its own
    parity."""
    monkeypatch.setattr(
        scaling, "plan_for", lambda one, other: (one, other) if one >= other else None
    )
    family = _Family(4)
    assert (family.first, family.traces, family.plans) == (4, [4], [(4, 4)])
    family._formulas = "old"
    assert family.add(2) and (family.first, family.traces, family.plans) == (
        4,
        [4, 2],
        [(4, 4), (4, 2)],
    )
    assert family._formulas is None
    assert (
        family.add(9)
        and (family.first, family.traces) == (9, [4, 2, 9])
        and family.plans == [(9, 4), (9, 2), (9, 9)]
    )
    monkeypatch.setattr(scaling, "plan_for", lambda one, other: None)
    family._formulas = "kept"
    assert not family.add(3) and (family.first, family.traces, family._formulas) == (
        9,
        [4, 2, 9],
        "kept",
    )
    monkeypatch.setattr(
        scaling, "plan_for", lambda one, other: "plan" if one % 2 == other % 2 else None
    )
    sizes = Sizes()
    for trace in (1, 2, 3, 5, 4):
        sizes.add(trace)
    assert [family.traces for family in sizes._families] == [[1, 3, 5], [2, 4]]


def test_a_family_solves_only_what_all_its_traces_explain(monkeypatch):
    """A trace is one event of 10 bytes; the step wanted has it of 20."""
    frame = pd.DataFrame(
        {"event": ["alloc"], "bytes": [10], "category": ["weights"], "storage": [0]}
    )
    monkeypatch.setattr(scaling, "plan_for", lambda one, other: "plan")
    monkeypatch.setattr(
        scaling,
        "unfold",
        lambda trace, seq, batch: SimpleNamespace(source=[0], storage=[0], loops=("loop",)),
    )
    monkeypatch.setattr(
        scaling.Trace,
        "of",
        lambda frame, *what, **named: (frame["live_bytes"].tolist(), what, named),
    )
    monkeypatch.setattr(
        scaling,
        "highest",
        lambda frame, ranked: 7 if frame["bytes"].tolist() == [10] else 7 + ranked[7],
    )
    family = _Family(_trace(frame=frame, device="d", host_bytes=30))
    family.add(_trace(frame=frame, seq=512, batch=4))

    def solved(ranked: dict, sizes=(20,), crossed=None, place=(256, 2)):
        family.first.ranked = ranked
        family._formulas = SimpleNamespace(bytes=lambda *_: sizes, crossed=lambda *_: crossed or {})
        return family.at(*place)

    live, what, named = solved({}, crossed={"up_bytes": 5})
    assert (live, what) == ([20], (1, {}, 30)) and named.pop("took_s") >= 0
    assert named == {
        "model": "m",
        "regime": "r",
        "seq": 256,
        "batch": 2,
        "world": 1,
        "device": "d",
        "architecture": (8, 0),
        "parts": (0,),
        "crossed": {"up_bytes": 5},
        "work": {},
        "loops": ("loop",),
    }
    assert (
        solved({}, sizes=None) is None
        and solved({}, crossed={"up_bytes": 5, "down_bytes": None}) is None
    )
    assert solved({}, place=(640, 2)) is None
    assert solved({7: 0}) is not None and solved({7: 1}) is None, (
        "another part would be reported at that size"
    )


def test_a_row_solves_what_it_can_and_reads_what_is_kept(monkeypatch):
    """Sizes 1, 4 and 2 of five come first; 4 is kept as traced, 2 as solved, and two traces solve
    the rest."""
    monkeypatch.setattr(
        atlas,
        "traced_step",
        lambda question, cache_dir, counted: traced.append(question.seq) or question.seq,
    )
    monkeypatch.setattr(
        atlas.card_summary, "summarize", lambda step, cards, allocators: {"step": step}
    )
    monkeypatch.setattr(Sizes, "add", lambda self, trace: known.append(trace))
    monkeypatch.setattr(
        Sizes, "at", lambda self, seq, batch: f"solved {seq}" if len(known) > 1 else None
    )
    asked = [Question("tiny", "full", seq, 1) for seq in (1, 2, 3, 4)]
    for kept, count, traces, steps in (
        ({}, 4, [1, 4], [1, "solved 2", "solved 3", 4]),
        ({4: False, 3: True}, 4, [1, 4], [1, "solved 2", None, None]),
        ({1: False}, 2, [2], [None, 2]),
    ):
        traced, known = [], []
        keep = SimpleNamespace(
            cards={},
            allocators=(),
            cache_dir=None,
            write=lambda question, made: made,
            read=lambda question, kept=kept: (
                {"solved": kept[question.seq]} if question.seq in kept else None
            ),
        )
        cells = atlas._summarize_row(asked[:count], keep)
        assert (
            traced == traces
            and [cells[question].get("step") for question in asked[:count]] == steps
        )
        assert all(
            cell["solved"] is str(cell.get("step")).startswith("solved")
            for cell in cells.values()
            if "step" in cell
        )


@pytest.mark.parametrize(
    ("sizes", "cores", "asked", "jobs"),
    [(24, 16, None, 3), (23, 16, None, 2), (7, 16, None, 0), (80, 4, None, 4), (24, 16, 5, 5)],
)
def test_a_process_is_worth_eight_cells(sizes, cores, asked, jobs, monkeypatch):
    def all_of(summarize, due, done, total, progress, jobs):
        seen.append((sum(map(len, due)), done, total, jobs))
        yield {question: "made" for row in due for question in row}

    seen: list = []
    monkeypatch.setattr(atlas, "_summarize_rows", all_of)
    monkeypatch.setattr(atlas.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(
        atlas.SummaryCache, "read", lambda self, question: "kept" if question.seq > sizes else None
    )
    lengths = tuple(range(1, sizes + 4))
    content = atlas.chart(
        Atlas("a", ("tiny",), lengths, (1,), regimes=("full",), cards=("h100",)), None, jobs=asked
    )
    assert seen == [(sizes + 3, 3, sizes + 3, jobs)] and content["cells"] == ["made"] * (sizes + 3)
    assert list(content["cards"]) == ["h100"] and content["cards"]["h100"][
        "compute_capability"
    ] == [9, 0]


def _spread(seqs, batches, fused: bool) -> list[tuple[int, int]]:
    row = SimpleNamespace(head=Fused() if fused else None)
    questions = [
        SimpleNamespace(seq=seq, batch=batch, row=row) for seq in seqs for batch in batches
    ]
    return [(question.seq, question.batch) for question in atlas._solvable_order(questions)]


def test_sizes_that_tell_the_others_come_first():
    assert _spread((1, 2, 3, 4), (1, 2, 3), fused=False) == [
        (1, 1),
        (4, 3),
        (3, 2),  # smallest, largest, one between
        (2, 1),
        (3, 1),
        (2, 3),
        (3, 3),
        (2, 2),  # lengths between, of the fewest and the most rows first
        (1, 3),
        (4, 1),
        (1, 2),
        (4, 2),
    ]
    assert _spread((1, 2, 3, 4), (1, 2, 3), fused=True)[:3] == [(1, 3), (4, 1), (2, 1)]
    assert _spread((1, 2), (1,), fused=False) == [(1, 1), (2, 1)] and _spread(
        (8,), (4,), fused=True
    ) == [(8, 4)]


def test_rows_that_take_long_begin_first():
    """Those that take turns, then those with a fused head, then the larger model."""
    keys = [
        atlas._slow_first([Question(model, regime, 8, 1, axes=axes)])
        for model, regime, axes in (
            ("baichuan2-7b", "badam", ""),
            ("tiny", "badam", ""),
            ("tiny", "badam", '{"head": "plain"}'),
            ("tiny", "full", '{"head": "fused"}'),
            ("baichuan2-7b", "full", ""),
            ("tiny", "full", ""),
        )
    ]
    assert (
        keys
        == sorted(keys)
        == [
            (False, False, -32),
            (False, False, -5),
            (False, True, -5),
            (True, False, -5),
            (True, True, -32),
            (True, True, -5),
        ]
    )


def test_an_atlas_names_everything_that_is_wrong_with_it():
    for change, words in (
        ({"worlds": (0,)}, "has 0: they"),
        ({"world_seq": 0}, "has 0: they"),
        ({"worlds": (1.5,)}, "1.5"),
        ({"models": ()}, "no models given"),
        ({"weights": ()}, "no weights given"),
        ({"seq": ()}, "no seq given"),
    ):
        with pytest.raises(ValueError, match=words):
            Atlas(**{"name": "a", "models": ("tiny",), "seq": (8,), "batch": (1,), **change})
    assert Atlas("a", ("tiny",), (8,), (1,), worlds=(1,), world_seq=1).cards_by_key().keys() > {
        "rtx4090",
        "h100",
    }
    assert list(Atlas("a", ("tiny",), (8,), (1,), cards=("h100",)).cards_by_key()) == ["h100"]


def test_only_some_rows_keep_their_own_storage_type():
    asked = Atlas(
        "a",
        ("tiny",),
        (8, 16),
        (1, 2),
        ("", "bf16"),
        as_written=("lomo",),
        regimes=("full", "lomo", "qlora"),
    )
    assert [question.name for question in asked.questions()][:4] == [
        "lomo",
        "full (bf16)",
        "lomo (bf16)",
        "qlora (bf16)",
    ]
    places = [
        (question.seq, question.batch) for question in asked.questions() if question.name == "lomo"
    ]
    assert places == [(8, 1), (8, 2), (16, 1), (16, 2)]
