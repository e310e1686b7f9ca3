"""Balanced accuracy with intervals: resampled by document, thresholds frozen on validation,
comparisons paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

MODEL_SCORINGS = ("yesno", "likelihood")
BASELINES = ("claim_only", "unigram_overlap", "bigram_overlap", "majority")
RESAMPLES = 2000
LEVEL = 0.95


def choose_threshold(labels, scores) -> float:
    """The threshold with the highest balanced accuracy, midway between two scores; of several, the
    middle one; nan without scores. Only for validation items: chosen on the test items it adds .02
    to .04 to the balanced accuracy."""
    labels, scores = np.asarray(labels) == 1, np.asarray(scores, float)
    if not len(scores):
        return math.nan
    values, index = np.unique(scores, return_inverse=True)
    rejected = np.cumsum(np.bincount(index, weights=~labels)) / max(1, (~labels).sum())
    missed = np.cumsum(np.bincount(index, weights=labels)) / max(1, labels.sum())
    accuracy = rejected + 1 - missed
    best = np.flatnonzero(np.isclose(accuracy, accuracy.max()))
    at = best[len(best) // 2]
    return float((values[at] + values[min(at + 1, len(values) - 1)]) / 2)


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve under each row of item weights, (resamples, items) -> (resamples,).

    It is the chance that a consistent claim scores above an inconsistent one, where a tie counts
    half; nan when a class is missing.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positive, negative = (
        np.add.reduceat(weights[:, order] * members, starts, axis=1)
        for members in (labels[order], ~labels[order])
    )
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def balanced_accuracy(labels: np.ndarray, called: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the two classes' recalls under each row of item weights, (resamples, items) ->
    (resamples,); nan when a class is missing."""
    with np.errstate(invalid="ignore"):
        return (
            weights[:, labels] @ called[labels] / weights[:, labels].sum(1)
            + weights[:, ~labels] @ ~called[~labels] / weights[:, ~labels].sum(1)
        ) / 2


def resample(
    groups: Sequence, labels: Sequence, count: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """How often each item is drawn in each resample, (count, items).

    Documents (`groups`) are drawn with replacement, as many of each kind (all claims consistent,
    all inconsistent, both) as there are. Claims of one document stay together.
    """
    codes, names = pd.factorize(np.asarray(groups, object))
    consistent = np.bincount(codes, weights=np.asarray(labels) == 1)
    kinds = (consistent > 0).astype(int) + (consistent == np.bincount(codes))
    return _document_draws(tuple(kinds.tolist()), count, seed)[:, codes].astype(float)


@lru_cache(maxsize=16)
def _document_draws(kinds: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """How often each document is drawn, (count, documents). Cached, since many models are scored on
    the same documents."""
    kind, rng = np.array(kinds), np.random.default_rng(seed)
    draws = np.zeros((count, len(kind)), np.int16)
    for value in np.unique(kind):
        members = np.flatnonzero(kind == value)
        shares = np.full(len(members), 1 / len(members))
        draws[:, members] = rng.multinomial(len(members), shares, size=count)
    return draws


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The central interval that holds LEVEL of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _test_cells(frame: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame, np.ndarray, np.ndarray]]:
    """(names, rows, labels, weights) of the test items of each domain and shift; the first row of
    weights counts each item once, the others are resamples."""
    tested = frame[frame["split"] != "val"]
    for (domain, shift), cell in tested.groupby(["domain", "shift"], sort=False):
        weights = np.vstack([np.ones(len(cell)), resample(cell["group"], cell["label"])])
        names = {"domain": domain, "shift": shift}
        yield names, cell, cell["label"].to_numpy() == 1, weights


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores -> one row for each domain, shift, scoring and metric, with a 95 % percentile interval
    over documents.

    Thresholds come from rows whose split is `val`; all others are test items. The interval is over
    items only: it does not hold what another training seed would change. Columns: domain, shift,
    scoring, metric (balanced_accuracy, balanced_accuracy_at_0, auc, accuracy), value, low, high, n,
    n_consistent, threshold. `accuracy`, BoolQ's metric, is the share judged right at 0; it is given
    for the model's yes/no answers and for the majority of the training items, its floor.
    """
    val = frame[frame["split"] == "val"]
    scorings = [name for name in (*MODEL_SCORINGS, *BASELINES) if name in frame]
    thresholds = {name: choose_threshold(val["label"], val[name]) for name in scorings}
    rows = []
    for names, cell, labels, weights in _test_cells(frame):
        for scoring in scorings:
            scores = cell[scoring].to_numpy(float)
            metrics = {"balanced_accuracy": thresholds[scoring], "auc": math.nan}
            metrics |= {"balanced_accuracy_at_0": 0.0} if scoring == "yesno" else {}
            metrics |= {"accuracy": 0.0} if scoring in ("yesno", "majority") else {}
            for metric, threshold in metrics.items():
                values = _metric_values(metric, labels, scores, threshold, weights)
                low, high = _interval(values[1:])
                rows.append(
                    {
                        **names,
                        "scoring": scoring,
                        "metric": metric,
                        "value": float(values[0]),
                        "low": low,
                        "high": high,
                        "n": len(cell),
                        "n_consistent": int(labels.sum()),
                        "threshold": threshold,
                    }
                )
    return pd.DataFrame(rows)


def _metric_values(
    metric: str, labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray
) -> np.ndarray:
    """The metric under each row of item weights, (resamples, items) -> (resamples,)."""
    if metric == "auc":
        return auc(labels, scores, weights)
    called = scores > threshold
    if metric == "accuracy":
        return weights @ (called == labels) / weights.sum(1)
    if math.isnan(threshold):
        return np.full(len(weights), math.nan)
    return balanced_accuracy(labels, called, weights)


def compare(scores: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Compare two models on the same items: balanced accuracy of `scores` minus that of `other`,
    each at its own validation threshold.

    The interval resamples documents, the same for both; `mcnemar_p` is exact, on items that only
    one of them gets right. Holm's correction belongs to the family of comparisons, see `holm`.
    Raises: ValueError, when the items differ.
    """
    keys = ["uid", "domain", "split", "shift", "group", "label"]
    both = scores.merge(other, on=keys, suffixes=("", "_other"))
    if not len(both) == len(scores) == len(other):
        raise ValueError(
            f"{len(scores)} and {len(other)} items, {len(both)} of them the same: only runs on the"
            " same items compare"
        )
    val, rows = both[both["split"] == "val"], []
    for scoring in MODEL_SCORINGS:
        columns = (scoring, f"{scoring}_other")
        cuts = {column: choose_threshold(val["label"], val[column]) for column in columns}
        for names, cell, labels, weights in _test_cells(both):
            calls = [cell[column].to_numpy() > cut for column, cut in cuts.items()]
            right = [call == labels for call in calls]
            values = [balanced_accuracy(labels, call, weights) for call in calls]
            differences = values[0] - values[1]
            low, high = _interval(differences[1:])
            first, second = right[0] & ~right[1], right[1] & ~right[0]
            rows.append(
                {
                    **names,
                    "scoring": scoring,
                    "difference": float(differences[0]),
                    "low": low,
                    "high": high,
                    "n": len(cell),
                    "mcnemar_p": mcnemar_exact(int(first.sum()), int(second.sum())),
                }
            )
    return pd.DataFrame(rows)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share `count / n` of independent items; nan without items.
    Wilson 1927, doi:10.2307/2276774."""
    if not n:
        return math.nan, math.nan
    from scipy.stats import binomtest

    low, high = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p of the discordant counts when either side is equally likely; 1 without
    any."""
    from scipy.stats import binomtest

    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p of a family of tests, in the given order."""
    p, order = np.asarray(p_values, float), np.argsort(p_values, kind="stable")
    steps = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()
