"""What a trained model is asked: to judge claims, and to write some of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd
from torch import nn

from ..factcc import written_claims as generation
from ..factcc.baselines import baseline_scores
from ..factcc.checker import Checker
from ..factcc.items import Item
from ..factcc.scoring import score_items
from ..files import write_table
from ..progress import bar
from .preparation import Prepared

SCORED_TOKENS, WRITTEN_TOKENS = 64 * 256, 32 * 256
"""Of a batch, at most: beside the 7B's weights some 2 and 5 GiB. Writing keeps every token's keys
and values, half a MiB each."""


def score(model: nn.Module, prepared: Prepared, progress: bool) -> pd.DataFrame:
    """Both of the model's scores and every baseline's, one row a validation or test item."""
    items, length = prepared.data.val + prepared.data.test, prepared.params["max_length"]
    with bar("score", len(items), progress) as shown, _products(prepared):
        frame = score_items(
            model, prepared.tokenizer, items, _rows(SCORED_TOKENS, length), length, shown.update
        )
    return frame.merge(baseline_scores(prepared.data.train, items), on="uid", validate="one_to_one")


def write(model: nn.Module, prepared: Prepared, progress: bool) -> tuple[list[Item], pd.DataFrame]:
    """What the model writes about the documents of these items, see `generation.write_claims`."""
    items, length = (
        generation.documents(prepared.data.test, prepared.params["generate"]),
        prepared.params["max_length"],
    )
    with bar("write", len(items), progress) as shown, _products(prepared):
        return items, generation.write_claims(
            model, prepared.tokenizer, items, _rows(WRITTEN_TOKENS, length), length, shown.update
        )


def _products(prepared: Prepared) -> AbstractContextManager:
    """Products are formed as in training: on a CPU without bf16 units in fp32."""
    return prepared.regime.weights.compute(prepared.params["device"].partition(":")[0])


def _rows(tokens: int, length: int) -> int:
    return min(64, max(1, tokens // length))


def judge(
    items: list[Item], frame: pd.DataFrame, params: Mapping, folder: Path, progress: bool
) -> dict:
    """Has the run's checker, if it has one, judge what `write` gave; writes `generation.parquet`,
    and returns its summary."""
    found = {}
    if params["checker"]:
        checker = Checker.load(params["checker"], params["device"])
        with bar(f"judge by {checker.name}", len(items), progress) as shown:
            frame = generation.judge(frame, items, checker, shown.update)
        found = {
            "checker": checker.name,
            "labels": checker.labels,
            "consistent_is": checker.labels[checker.consistent],
        }
    write_table(frame, folder / "generation.parquet")
    return {**found, **generation.summary(frame)}
