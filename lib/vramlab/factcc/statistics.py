"""Balanced accuracy with intervals: resampled by document, thresholds frozen on validation,
comparisons paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import pandas as pd

MODEL_SCORINGS = ("yesno", "likelihood")
BASELINES = ("claim_only", "unigram_overlap", "bigram_overlap", "majority")
RESAMPLES = 2000
LEVEL = 0.95


def balanced_accuracy(labels, scores, threshold: float) -> float:
    """Mean of the two classes' recalls when `score > threshold` is called consistent; nan when a
    class is missing."""
    labels, called = np.asarray(labels) == 1, np.asarray(scores, float) > threshold
    if labels.all() or not labels.any():
        return math.nan
    return float((called[labels].mean() + (~called[~labels]).mean()) / 2)


def choose_threshold(labels, scores) -> float:
    """The cut with the highest balanced accuracy, midway between two scores; of several, the middle
    one. Only ever on validation items: choosing it on test adds .02 to .04 of accuracy that is not
    there."""
    labels, scores = np.asarray(labels) == 1, np.asarray(scores, float)
    if not len(scores):
        return math.nan
    values, index = np.unique(scores, return_inverse=True)
    below = (
        np.cumsum(np.bincount(index, weights=~labels)),
        np.cumsum(np.bincount(index, weights=labels)),
    )
    accuracy = below[0] / max(1, (~labels).sum()) + 1 - below[1] / max(1, labels.sum())
    best = np.flatnonzero(np.isclose(accuracy, accuracy.max()))
    at = best[len(best) // 2]
    return float((values[at] + values[min(at + 1, len(values) - 1)]) / 2)


def auc(labels, scores) -> float:
    """Area under the ROC curve: the chance that a consistent claim scores above an inconsistent
    one, ties half."""
    return float(
        _weighted_auc(
            np.asarray(labels) == 1, np.asarray(scores, float), np.ones((1, len(labels)))
        )[0]
    )


def _weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC under each row of item weights, (resamples, items) -> (resamples,)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positive, negative = (
        np.add.reduceat(weights[:, order] * of, starts, axis=1)
        for of in (labels[order], ~labels[order])
    )
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def resample(
    groups: Sequence, labels: Sequence, count: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """How often each item is drawn in each resample, (count, items): documents drawn with
    replacement, as many of each kind (all consistent, all inconsistent, both) as there are. Claims
    of one document stay together.
    """
    codes, names = pd.factorize(np.asarray(groups, object))
    consistent = np.bincount(codes, weights=np.asarray(labels) == 1)
    kinds = (consistent > 0).astype(int) + (consistent == np.bincount(codes))
    return _drawn(tuple(kinds.tolist()), count, seed)[:, codes].astype(float)


@lru_cache(maxsize=16)
def _drawn(kinds: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """How often each document is drawn, (count, documents). Remembered, as many models are scored
    on the same documents."""
    kind, rng = np.array(kinds), np.random.default_rng(seed)
    drawn = np.zeros((count, len(kind)), np.int16)
    for value in np.unique(kind):
        members = np.flatnonzero(kind == value)
        drawn[:, members] = rng.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=count
        )
    return drawn


def _recalls(labels: np.ndarray, called: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Balanced accuracy under each row of item weights."""
    with np.errstate(invalid="ignore"):
        return (
            weights[:, labels] @ called[labels] / weights[:, labels].sum(1)
            + weights[:, ~labels] @ ~called[~labels] / weights[:, ~labels].sum(1)
        ) / 2


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores -> one row for each domain, shift, scoring and metric, with a 95 % percentile interval
    over documents.

    Thresholds come from rows whose split is `val`; the rest is test. The interval is over items
    only: it does not hold what another training seed would change. Columns: domain, shift, scoring,
    metric (balanced_accuracy, balanced_accuracy_at_0, auc, accuracy), value, low, high, n,
    n_consistent, threshold. `accuracy` is the share judged right at 0, BoolQ's metric, of the
    answer's logits and of the answer that training items have more often, its floor.
    """
    val = frame[frame["split"] == "val"]
    scorings = [name for name in (*MODEL_SCORINGS, *BASELINES) if name in frame]
    thresholds = {name: choose_threshold(val["label"], val[name]) for name in scorings}
    rows = []
    for (domain, shift), cell in frame[frame["split"] != "val"].groupby(
        ["domain", "shift"], sort=False
    ):
        labels, weights = cell["label"].to_numpy() == 1, resample(cell["group"], cell["label"])
        for name in scorings:
            scores = cell[name].to_numpy(float)
            metrics = {"balanced_accuracy": thresholds[name], "auc": math.nan}
            metrics |= {"balanced_accuracy_at_0": 0.0} if name == "yesno" else {}
            metrics |= {"accuracy": 0.0} if name in ("yesno", "majority") else {}
            for metric, threshold in metrics.items():
                value, (low, high) = _metric(metric, labels, scores, threshold, weights)
                rows.append(
                    {
                        "domain": domain,
                        "shift": shift,
                        "scoring": name,
                        "metric": metric,
                        "value": value,
                        "low": low,
                        "high": high,
                        "n": len(cell),
                        "n_consistent": int(labels.sum()),
                        "threshold": threshold,
                    }
                )
    return pd.DataFrame(rows)


def _metric(
    metric: str, labels, scores, threshold: float, weights
) -> tuple[float, tuple[float, float]]:
    if metric == "auc":
        return auc(labels, scores), _interval(_weighted_auc(labels, scores, weights))
    if metric == "accuracy":
        right = (scores > threshold) == labels
        return float(right.mean()), _interval(weights @ right / weights.sum(1))
    if math.isnan(threshold):
        return math.nan, (math.nan, math.nan)
    return balanced_accuracy(labels, scores, threshold), _interval(
        _recalls(labels, scores > threshold, weights)
    )


def compare(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two models on the same items: balanced accuracy of `one` minus `other`'s, each at its own
    validation threshold.

    The interval resamples documents, the same for both; `mcnemar_p` is exact, on items that only
    one of them gets right. Holm's correction belongs to the family of comparisons, see `holm`.
    Raises: ValueError, when the items differ.
    """
    both = one.merge(
        other, on=["uid", "domain", "split", "shift", "group", "label"], suffixes=("", "_other")
    )
    if not len(both) == len(one) == len(other):
        raise ValueError(
            f"{len(one)} and {len(other)} items, {len(both)} of them the same: only runs on the"
            " same items compare"
        )
    val, rows = both[both["split"] == "val"], []
    for name in MODEL_SCORINGS:
        cuts = [choose_threshold(val["label"], val[column]) for column in (name, f"{name}_other")]
        for (domain, shift), cell in both[both["split"] != "val"].groupby(
            ["domain", "shift"], sort=False
        ):
            labels, weights = cell["label"].to_numpy() == 1, resample(cell["group"], cell["label"])
            calls = [
                cell[column].to_numpy() > cut
                for column, cut in zip((name, f"{name}_other"), cuts, strict=True)
            ]
            right = [call == labels for call in calls]
            values = [_recalls(labels, call, weights) for call in calls]
            point = [_recalls(labels, call, np.ones((1, len(cell))))[0] for call in calls]
            low, high = _interval(values[0] - values[1])
            rows.append(
                {
                    "domain": domain,
                    "shift": shift,
                    "scoring": name,
                    "difference": float(point[0] - point[1]),
                    "low": low,
                    "high": high,
                    "n": len(cell),
                    "mcnemar_p": mcnemar_exact(
                        int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
                    ),
                }
            )
    return pd.DataFrame(rows)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share `count / n` of independent items; nan for none. Wilson
    1927, doi:10.2307/2276774."""
    if not n:
        return math.nan, math.nan
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), count / n
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return (low if count else 0.0), (
        high if count < n else 1.0
    )  # exact there, where rounding is not


def mcnemar_exact(only_one: int, only_other: int) -> float:
    """Two-sided exact p of the discordant counts under "each is as likely": twice the smaller
    binomial tail, at most 1."""
    n, k = only_one + only_other, min(only_one, only_other)
    if not n:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p of a family of tests, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted
