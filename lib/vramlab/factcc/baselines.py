"""What a judge without a model can do: the bars every model has to beat, on the same items."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from .items import Item


def baseline_scores(train: Sequence[Item], items: Sequence[Item]) -> pd.DataFrame:
    """One row an item, higher for consistent: uid and

    claim_only: log-odds of the claim's uni- and bigrams under naive Bayes fitted on `train`, the
    document unread; unigram_overlap, bigram_overlap: share of the claim's that occur in the
    document; majority: the same for every item, above zero when `train` has more consistent claims
    than others.
    """
    judge, majority = (
        _ClaimOnly(train),
        (1.0 if 2 * sum(item.label for item in train) > len(train) else -1.0),
    )
    return pd.DataFrame(
        [
            {
                "uid": item.uid,
                "claim_only": judge.score(item.claim),
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
    grams, inside = _grams(item.claim, n), set(_grams(item.doc, n))
    return sum(gram in inside for gram in grams) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


class _ClaimOnly:
    """Multinomial naive Bayes with one added to every count."""

    def __init__(self, items: Sequence[Item]):
        self.counts = (Counter(), Counter())
        for item in items:
            self.counts[item.label].update(_grams(item.claim, 1) + _grams(item.claim, 2))
        self.totals = [counts.total() for counts in self.counts]
        self.kinds = len(self.counts[0] | self.counts[1]) + 1

    def score(self, claim: str) -> float:
        return sum(
            self._log_share(gram, 1) - self._log_share(gram, 0)
            for gram in _grams(claim, 1) + _grams(claim, 2)
        )

    def _log_share(self, gram: tuple[str, ...], label: int) -> float:
        return math.log((self.counts[label][gram] + 1) / (self.totals[label] + self.kinds))
