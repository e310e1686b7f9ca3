"""The search for the largest length or batch that fits: which sizes it tries, in which order, and
where it stops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vramlab.forecast import forecast as predict
from vramlab.forecast.forecast import Question, largest

QUESTION = Question("tiny", "full", 128, 2)


@pytest.fixture
def tries(monkeypatch):
    """(axis, the most that fits, limit) -> (what `largest` answers, the sizes it tried)."""

    def search(axis: str, most: int, limit: int = 1 << 20):
        tried, words = [], []

        def one(question, card, settings):
            other = {"seq": "batch", "batch": "seq"}[axis]
            assert card == "a card" and getattr(question, other) == getattr(QUESTION, other)
            tried.append(getattr(question, axis))
            return SimpleNamespace(fits=tried[-1] <= most, question=question)

        monkeypatch.setattr(predict, "forecast", one)
        value, best = largest(QUESTION, axis, "a card", limit=limit, report=words.append)
        assert words == [
            f"{axis} {size}: {'fits' if size <= most else 'does not fit'}" for size in tried
        ]
        assert (best and getattr(best.question, axis)) == (value or None)
        return value, tried

    return search


@pytest.mark.parametrize(
    ("axis", "most", "value", "tried"),
    [
        ("batch", 0, 0, [1]),
        ("batch", 1, 1, [1, 2]),
        ("batch", 2, 2, [1, 2, 4, 3]),
        ("batch", 3, 3, [1, 2, 4, 3]),
        ("batch", 7, 7, [1, 2, 4, 8, 6, 7]),
        ("batch", 21, 21, [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]),
        ("seq", 63, 0, [64]),
        ("seq", 64, 64, [64, 128]),
        ("seq", 255, 192, [64, 128, 256, 192]),
    ],
)
def test_it_doubles_until_something_does_not_fit_and_then_halves_the_gap(
    tries, axis, most, value, tried
):
    assert tries(axis, most) == (value, tried)


@pytest.mark.parametrize(
    ("axis", "limit", "tried"),
    [
        ("batch", 1, [1]),
        ("batch", 2, [1, 2]),
        ("batch", 3, [1, 2]),
        ("batch", 4, [1, 2, 4]),
        ("batch", 31, [1, 2, 4, 8, 16]),
        ("batch", 32, [1, 2, 4, 8, 16, 32]),
        ("seq", 127, [64]),
        ("seq", 128, [64, 128]),
        ("seq", 511, [64, 128, 256]),
    ],
)
def test_what_fits_without_end_is_doubled_up_to_the_limit_and_never_beyond(
    tries, axis, limit, tried
):
    assert tries(axis, 10**9, limit) == (tried[-1], tried)


@pytest.mark.parametrize(("axis", "count"), [("batch", 21), ("seq", 15)])
def test_the_limit_is_a_million_rows_or_tokens(tries, axis, count):
    value, tried = tries(axis, 10**9)
    assert value == 1 << 20 and len(tried) == count


def test_a_limit_below_what_does_not_fit_does_not_end_the_halving(tries):
    assert tries("batch", 5, limit=8) == (5, [1, 2, 4, 8, 6, 5])
