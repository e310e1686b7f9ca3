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
"""Tokens of a batch, at most: beside the 7B's weights they take some 2 and 5 GiB. Writing keeps the
keys and values of every token, half a MiB each."""


def score(model: nn.Module, prepared: Prepared, progress: bool) -> pd.DataFrame:
    """Both scores of the model and those of every baseline, one row for each validation or test
    item."""
    items, length = prepared.data.val + prepared.data.test, prepared.params["max_length"]
    rows = _rows(SCORED_TOKENS, length)
    with bar("score", len(items), progress) as scored, _products(prepared):
        frame = score_items(model, prepared.tokenizer, items, rows, length, scored.update)
    return frame.merge(baseline_scores(prepared.data.train, items), on="uid", validate="one_to_one")


def write(model: nn.Module, prepared: Prepared, progress: bool) -> tuple[list[Item], pd.DataFrame]:
    """Claims that the model writes about the documents of the items that are returned, see
    `written_claims.write_claims`."""
    items = written_claims.documents(prepared.data.test, prepared.params["generate"])
    tokenizer, length = prepared.tokenizer, prepared.params["max_length"]
    rows = _rows(WRITTEN_TOKENS, length)
    with bar("write", len(items), progress) as done, _products(prepared):
        frame = written_claims.write_claims(model, tokenizer, items, rows, length, done.update)
    return items, frame


def _products(prepared: Prepared) -> AbstractContextManager:
    """Products are formed as in training: in fp32 on a CPU without bf16 units."""
    return prepared.regime.weights.compute(prepared.params["device"].partition(":")[0])


def _rows(tokens: int, length: int) -> int:
    return min(64, max(1, tokens // length))


def judge(
    items: list[Item], frame: pd.DataFrame, params: Mapping, folder: Path, progress: bool
) -> dict:
    """Let the run's checker, if it has one, judge the claims of `write`; write `generation.parquet`
    and return its summary."""
    judge_record = {}
    if params["checker"]:
        checker = Checker.load(params["checker"], params["device"])
        with bar(f"judge by {checker.name}", len(items), progress) as judged:
            frame = written_claims.judge(frame, items, checker, judged.update)
        judge_record = {
            "checker": checker.name,
            "labels": checker.labels,
            "consistent_is": checker.labels[checker.consistent],
        }
    write_table(frame, folder / "generation.parquet")
    return {**judge_record, **written_claims.summary(frame)}
