"""The evaluation of a trained model: it judges claims, and writes some of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd
from torch import nn

from ..factcc import written_claims
from ..factcc.baselines import baseline_scores
from ..factcc.checker import Checker
from ..factcc.items import Item
from ..factcc.scoring import score_items
from ..files import write_table
from ..progress import bar
from .preparation import Prepared

SCORED_TOKENS, WRITTEN_TOKENS = 64 * 256, 32 * 256
"""Most tokens of a batch: beside the 7B's weights about 2 and 5 GiB. Writing keeps the keys and
values of every token, half a MiB each."""


def score(model: nn.Module, prepared: Prepared, progress: bool) -> pd.DataFrame:
    """Both scores of the model and those of every baseline, one row per validation or test item."""
    items, length = prepared.data.val + prepared.data.test, prepared.params["max_length"]
    rows = _batch_rows(SCORED_TOKENS, length)
    with bar("score", len(items), progress) as progress_bar, _computing(prepared):
        frame = score_items(model, prepared.tokenizer, items, rows, length, progress_bar.update)
    return frame.merge(baseline_scores(prepared.data.train, items), on="uid", validate="one_to_one")


def write(model: nn.Module, prepared: Prepared, progress: bool) -> tuple[list[Item], pd.DataFrame]:
    """Items, and the model's claim about the document of each, see
    `written_claims.write_claims`."""
    length = prepared.params["max_length"]
    items = written_claims.documents(prepared.data.test, prepared.params["generate"])
    rows = _batch_rows(WRITTEN_TOKENS, length)
    with bar("write", len(items), progress) as progress_bar, _computing(prepared):
        return items, written_claims.write_claims(
            model, prepared.tokenizer, items, rows, length, progress_bar.update
        )


def _computing(prepared: Prepared) -> AbstractContextManager:
    """Products are computed as in training: in fp32 on a CPU without bf16 units."""
    return prepared.regime.weights.compute(prepared.params["device"].partition(":")[0])


def _batch_rows(tokens: int, length: int) -> int:
    return min(64, max(1, tokens // length))


def judge(
    items: list[Item], frame: pd.DataFrame, params: Mapping, folder: Path, progress: bool
) -> dict:
    """Have the run's checker, if it has one, judge the result of `write`; write
    `generation.parquet`, and return its summary."""
    described = {}
    if params["checker"]:
        checker = Checker.load(params["checker"], params["device"])
        with bar(f"judge by {checker.name}", len(items), progress) as progress_bar:
            frame = written_claims.judge(frame, items, checker, progress_bar.update)
        described = {
            "checker": checker.name,
            "labels": checker.labels,
            "consistent_is": checker.labels[checker.consistent],
        }
    write_table(frame, folder / "generation.parquet")
    return {**described, **written_claims.summary(frame)}
