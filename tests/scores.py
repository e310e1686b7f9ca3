"""Scores of one model on plain lists, by the library's weighted ones."""

from __future__ import annotations

import numpy as np

from vramlab.factcc import statistics


def balanced_accuracy(labels, scores, threshold: float) -> float:
    called = np.asarray(scores, float) > threshold
    return float(
        statistics.balanced_accuracy(np.asarray(labels) == 1, called, np.ones((1, len(called))))[0]
    )


def auc(labels, scores) -> float:
    scores = np.asarray(scores, float)
    return float(statistics.auc(np.asarray(labels) == 1, scores, np.ones((1, len(scores))))[0])
