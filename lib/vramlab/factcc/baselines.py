"""What a judge without a model reaches on the same items: the bars that every model has to beat."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import pandas as pd

from .items import Item


def baseline_scores(train: Sequence[Item], items: Sequence[Item]) -> pd.DataFrame:
    """One row per item, higher for consistent. Columns: uid;

    claim_only: log-odds of the claim's uni- and bigrams under naive Bayes fitted on `train`,
    without the document; unigram_overlap, bigram_overlap: share of the claim's n-grams that occur
    in the document; majority: the same for every item, above zero when most of `train` is
    consistent.
    """
    claim_only = _claim_only(train)
    majority = 1.0 if 2 * sum(item.label for item in train) > len(train) else -1.0
    return pd.DataFrame(
        [
            {
                "uid": item.uid,
                "claim_only": claim_only(item.claim),
                "unigram_overlap": overlap(item, 1),
                "bigram_overlap": overlap(item, 2),
                "majority": majority,
            }
            for item in items
        ]
    )


def overlap(item: Item, n: int) -> float:
    """Share of the claim's n-grams that occur in the document; 0 for a claim of fewer than n
    words."""
    claim, document = _grams(item.claim, n), set(_grams(item.doc, n))
    return sum(gram in document for gram in claim) / len(claim) if claim else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _claim_only(items: Sequence[Item]) -> Callable[[str], float]:
    """The log-odds of a claim under multinomial naive Bayes, with one added to every count."""
    counts: tuple[Counter, Counter] = (Counter(), Counter())
    for item in items:
        counts[item.label].update(_grams(item.claim, 1) + _grams(item.claim, 2))
    kinds = len(counts[0] | counts[1]) + 1
    totals = [count.total() + kinds for count in counts]

    def log_share(gram: tuple[str, ...], label: int) -> float:
        return math.log((counts[label][gram] + 1) / totals[label])

    def log_odds(claim: str) -> float:
        grams = _grams(claim, 1) + _grams(claim, 2)
        return sum(log_share(gram, 1) - log_share(gram, 0) for gram in grams)

    return log_odds
