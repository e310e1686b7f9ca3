"""The statistics by value: each figure against one worked out by hand or from its definition, one
item at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from scores import auc, balanced_accuracy
from vramlab.factcc.baselines import baseline_scores
from vramlab.factcc.items import Item
from vramlab.factcc.statistics import (
    LEVEL,
    RESAMPLES,
    choose_threshold,
    compare,
    holm,
    mcnemar_exact,
    resample,
    summarise,
    wilson,
)


@pytest.mark.parametrize(
    ("labels", "scores", "threshold", "value"),
    [
        ([1, 1, 0, 0], [2, 0, 1, -1], 0.5, 0.5),
        ([1, 1, 1, 0], [1, 1, 0, 0], 0.5, 5 / 6),
        ([1, 0], [0.5, 0.5], 0.5, 0.5),
        ([1, 0], [0.6, 0.5], 0.5, 1.0),
        ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 0, (2 / 3 + 1 / 2) / 2),
        ([1, 1], [1, 0], 0, math.nan),
        ([0, 0], [1, 0], 0, math.nan),
    ],
)
def test_balanced_accuracy_by_hand(labels, scores, threshold, value):
    assert balanced_accuracy(labels, scores, threshold) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("labels", "scores", "cut"),
    [
        ([0, 0, 1, 1], [1, 2, 5, 7], 3.5),
        ([1, 0], [4, 4], 4.0),
        ([0, 1, 0, 1], [1, 2, 3, 4], 3.5),
        ([1, 1], [3, 8], 3.0 + 2.5),
        ([0, 0, 0, 1], [0, 0, 1, 9], 5.0),
        ([1, 0], [1, 2], 2.0),
        ([], [], math.nan),
    ],
)
def test_a_threshold_lies_midway_and_of_several_equals_it_is_the_middle_one(labels, scores, cut):
    assert choose_threshold(labels, scores) == pytest.approx(cut, nan_ok=True)


def test_a_threshold_is_the_best_of_all_cuts_of_unequal_classes():
    rng = np.random.default_rng(3)
    for _ in range(20):
        labels = (rng.random(30) < 0.3).astype(int)
        labels[:2] = 0, 1
        scores = np.round(labels + rng.normal(0, 1, 30), 1)
        cuts = [-9.0, *scores]
        assert balanced_accuracy(labels, scores, choose_threshold(labels, scores)) == pytest.approx(
            max(balanced_accuracy(labels, scores, cut) for cut in cuts)
        )


def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_half():
    rng = np.random.default_rng(5)
    labels, scores = rng.integers(0, 2, 40), rng.integers(0, 9, 40)
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    assert auc(labels, scores) == pytest.approx(
        sum((one > other) + (one == other) / 2 for one, other in pairs) / len(pairs)
    )
    assert math.isnan(auc([1, 1], [0, 1]))


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [  # scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.27753279),
        (1, 10, 0.01787621, 0.40415003),
        (5, 10, 0.23659309, 0.76340691),
        (10, 10, 0.72246721, 1.0),
        (37, 50, 0.60446843, 0.84128473),
        (0, 0, math.nan, math.nan),
    ],
)
def test_wilsons_interval_is_scipys(count, n, low, high):
    assert wilson(count, n) == pytest.approx((low, high), abs=1e-8, nan_ok=True)


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 14 / 64),
        (6, 2, 74 / 256),
        (4, 4, 1.0),
        (0, 10, 2 / 1024),
    ],
)
def test_mcnemars_p_is_twice_the_smaller_tail(one, other, p):
    assert mcnemar_exact(one, other) == mcnemar_exact(other, one) == pytest.approx(p)


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]),
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.001, 0.9, 0.02, 0.02], [0.004, 0.9, 0.06, 0.06]),
    ],
)
def test_holms_steps_by_hand(raw, adjusted):
    assert holm(raw) == pytest.approx(adjusted)


def test_documents_are_drawn_within_their_kind_each_as_often_as_another():
    """Three consistent, two mixed, two inconsistent documents, of one or two claims."""
    groups, labels = list("abcddeefg"), [1, 1, 1, 1, 0, 0, 1, 0, 0]
    weights = resample(groups, labels, count=4000)
    assert (
        weights.shape == (4000, 9)
        and (weights[:, 3] == weights[:, 4]).all()
        and (weights[:, 5] == weights[:, 6]).all()
    )
    for kind, size in (([0, 1, 2], 3), ([3, 5], 2), ([7, 8], 2)):
        assert (weights[:, kind].sum(1) == size).all()
        assert (
            weights[:, kind].mean(0) == pytest.approx([1] * len(kind), abs=0.05)
            and weights[:, kind].std() > 0.5
        )
    assert (resample(groups, labels, 10) == resample(groups, labels, 10)).all()
    assert (resample(groups, labels, 10, seed=1) != resample(groups, labels, 10)).any()
    assert resample(groups, labels).shape[0] == RESAMPLES == 2000


def scored(split: str, labels, scores, likelihood=None, **columns) -> pd.DataFrame:
    names = [f"{split}{number}" for number in range(len(labels))]
    return pd.DataFrame(
        {
            "uid": names,
            "group": names,
            "domain": "news",
            "split": split,
            "shift": "none",
            "label": labels,
            "yesno": scores,
            "likelihood": scores if likelihood is None else likelihood,
            **columns,
        }
    )


def test_a_summary_has_each_scorings_metrics_at_the_validations_threshold():
    val = scored(
        "val", [0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0], likelihood=[-4.0, -3.0, -2.0, -1.0], majority=1.0
    )
    test = scored(
        "test",
        [0, 0, 0, 1, 1],
        [-1.0, 2.4, 2.5, 2.5, 2.6],
        likelihood=[-9.0, -2.0, -2.6, -2.4, -2.2],
        majority=1.0,
    )
    rows = summarise(pd.concat([val, test])).set_index(["scoring", "metric"])
    assert rows["threshold"].dropna().unique().tolist() == [2.5, 0.0, -2.5, 1.0]
    assert rows["value"].to_dict() == pytest.approx(
        {
            ("yesno", "balanced_accuracy"): (1 / 2 + 1) / 2,
            ("yesno", "auc"): 5.5 / 6,
            ("yesno", "accuracy"): 3 / 5,
            ("yesno", "balanced_accuracy_at_0"): (1 + 1 / 3) / 2,
            ("likelihood", "balanced_accuracy"): (1 + 2 / 3) / 2,
            ("likelihood", "auc"): 4 / 6,
            ("majority", "balanced_accuracy"): 1 / 2,
            ("majority", "auc"): 1 / 2,
            ("majority", "accuracy"): 2 / 5,
        }
    )
    assert (
        (rows["n"] == 5).all()
        and (rows["n_consistent"] == 2).all()
        and (rows["low"] <= rows["high"]).all()
    )


def test_an_interval_is_the_middle_95_percent_of_the_resampled_values():
    """Of 40 consistent claims 30 are judged right, and every inconsistent one: 2.5 and 97.5 % of
    that binomial are 24 and 35."""
    n, k = 40, 30
    val = scored("val", [0, 1], [-1.0, 1.0])
    row = summarise(
        pd.concat([val, scored("test", [1] * n + [0] * n, [1.0] * k + [-1.0] * (2 * n - k))])
    ).iloc[0]
    assert (
        row["metric"] == "balanced_accuracy"
        and row["value"] == pytest.approx((k / n + 1) / 2)
        and LEVEL == 0.95
    )
    assert [row["low"], row["high"]] == pytest.approx(
        [(24 / n + 1) / 2, (35 / n + 1) / 2], abs=1.1 / (2 * n)
    )


def test_a_difference_is_the_ones_accuracy_less_the_others_each_at_its_own_threshold():
    labels = [1] * 6 + [0] * 6
    val = scored("val", [0, 1], [0.0, 2.0])
    shifted = scored("val", [0, 1], [10.0, 12.0])
    one = pd.concat([val, scored("test", labels, [2.0] * 5 + [0.0] + [0.0] * 6)])  # 11 of 12 right
    other = pd.concat(
        [shifted, scored("test", labels, [12.0] * 2 + [10.0] * 4 + [12.0] + [10.0] * 5)]
    )  # 7 right
    rows = compare(one, other).set_index("scoring")
    for name in ("yesno", "likelihood"):
        row = rows.loc[name]
        assert (
            row["difference"] == pytest.approx((5 / 6 + 1) / 2 - (2 / 6 + 5 / 6) / 2)
            and row["n"] == 12
        )
        assert (
            row["mcnemar_p"] == pytest.approx(mcnemar_exact(4, 0))
            and row["low"] < row["difference"] < row["high"]
        )
    back = compare(other, one).set_index("scoring").loc["yesno"]
    assert back["difference"] == pytest.approx(-rows.loc["yesno", "difference"])
    assert (back["low"], back["high"]) == pytest.approx(
        (-rows.loc["yesno", "high"], -rows.loc["yesno", "low"])
    )


# judges without a model ---------------------------------------------------------------------------


def item(claim: str, label: int = 1, doc: str = "") -> Item:
    return Item(claim, "generated", "news", "train", doc, claim, label, "", "none", "g")


def test_the_claims_words_alone_are_judged_by_naive_bayes():
    """Consistent: a, b, ab, b: four grams. Inconsistent: A, c, ac: three. Five kinds, and one for
    what was never seen."""
    frame = baseline_scores(
        [item("a b"), item("b"), item("A c", 0)], [item("b"), item("c"), item("a b"), item("new")]
    )
    share = {
        "b": math.log(3 / 10) - math.log(1 / 9),
        "c": math.log(1 / 10) - math.log(2 / 9),
        "a": math.log(2 / 10) - math.log(2 / 9),
        "a b": math.log(2 / 10) - math.log(1 / 9),
    }
    assert frame["claim_only"].tolist() == pytest.approx(
        [
            share["b"],
            share["c"],
            share["a"] + share["b"] + share["a b"],
            math.log(1 / 10) - math.log(1 / 9),
        ]
    )
    assert set(frame["majority"]) == {1.0} and frame["uid"].tolist() == ["b", "c", "a b", "new"]


@pytest.mark.parametrize(
    ("labels", "majority"), [([1, 1, 0], 1.0), ([1, 0], -1.0), ([0, 0, 1], -1.0), ([1], 1.0)]
)
def test_the_majority_has_to_be_more_than_half(labels, majority):
    assert baseline_scores([item("a", label) for label in labels], [item("a")])[
        "majority"
    ].tolist() == [majority]


def test_overlap_is_the_share_of_the_claims_words_and_pairs_that_the_document_has():
    found = baseline_scores(
        [item("a")], [item("The cat, sat", doc="the cat sat"), item("sat", doc="he sat")]
    )
    assert found["unigram_overlap"].tolist() == [3 / 4, 1] and found["bigram_overlap"].tolist() == [
        1 / 3,
        0,
    ]
