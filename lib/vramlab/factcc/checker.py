"""A published judge of consistency, such as FactCC's own: a sequence classifier in a local folder,
used unchanged.

Which of its outputs means consistent is read from `id2label`; two checkpoints of the same name
differ in that order. Its input is the pair (document, claim); the end of the document is cut off
when the pair is too long. No judge is the truth: of CNN/DM's own highlights FactCC calls about 42 %
correct (salesforce/factCC, issue 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .formats import LABELS

BATCH = 16
CHECKER_CALLS = ("consistent", "inconsistent", "unreadable")


@dataclass(frozen=True)
class Checker:
    """`consistent` is the output that means consistent; `limit` is the most tokens of a pair, marks
    included."""

    name: str
    model: nn.Module
    tokenizer: Callable
    labels: dict[int, str]
    consistent: int
    limit: int

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Checker:
        """The checkpoint in the folder `path`, in fp32. Raises: ValueError, naming what is missing
        or ambiguous."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"checker is {str(path)!r}, where there is no config.json: give the folder of a"
                " downloaded sequence-classification checkpoint, or leave it empty"
            )
        labels = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).id2label
        consistent = consistent_id(labels, folder.name)
        logging.disable_progress_bar()
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        if info["missing_keys"]:
            raise ValueError(
                f"checker {folder.name} lacks {', '.join(sorted(info['missing_keys']))}: its"
                " judgements would be random; give a checkpoint that was trained to classify"
            )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        return cls(folder.name, model.eval().to(device), tokenizer, dict(labels), consistent, limit)

    @torch.no_grad()
    def judge(
        self,
        documents: Sequence[str],
        claims: Sequence[str],
        progress: Callable[[int], object] | None = None,
    ) -> pd.DataFrame:
        """One row per pair: `called` (of CHECKER_CALLS), `probability` of consistent, and `cut`,
        whether the document lost its end. A claim that is empty or longer than half of `limit` is
        unreadable and is not judged.
        """
        rows = []
        for start in range(0, len(claims), BATCH):
            batch = slice(start, start + BATCH)
            pairs = list(zip(documents[batch], claims[batch], strict=True))
            readable = [pair for pair in pairs if 0 < self._length(pair[1]) <= self.limit // 2]
            judged = dict(zip(readable, self._judge(readable), strict=True))
            for pair in pairs:
                called, probability = judged.get(pair, ("unreadable", None))
                rows.append((called, probability, self._length(*pair) > self.limit))
            if progress:
                progress(len(pairs))
        return pd.DataFrame(rows, columns=["called", "probability", "cut"])

    def _judge(self, pairs: list[tuple[str, str]]) -> list[tuple[str, float]]:
        """(call, probability of consistent) of each pair."""
        if not pairs:
            return []
        batch = self.tokenizer(
            *map(list, zip(*pairs, strict=True)),
            truncation="only_first",
            max_length=self.limit,
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        logits = self.model(**batch).logits
        probabilities = logits.softmax(-1)[:, self.consistent].tolist()
        calls = [CHECKER_CALLS[best != self.consistent] for best in logits.argmax(-1).tolist()]
        return list(zip(calls, probabilities, strict=True))

    def _length(self, *texts: str) -> int:
        """Tokens of a claim alone, or of a pair with its marks."""
        marks = len(texts) > 1
        return len(self.tokenizer(*texts, add_special_tokens=marks, verbose=False)["input_ids"])


def consistent_id(labels: dict[int, str], name: str) -> int:
    """The output whose label means consistent, when all others mean inconsistent. Raises:
    ValueError, with the labels."""
    means = {index: LABELS.get(str(label).strip().upper()) for index, label in labels.items()}
    consistent = [index for index, label in means.items() if label == 1]
    if len(consistent) != 1 or None in means.values():
        known = ", ".join(label for label in LABELS if isinstance(label, str))
        raise ValueError(
            f"checker {name} has the labels {', '.join(map(str, labels.values()))}: which one means"
            f" consistent cannot be told. Known: {known}; write them into id2label of its"
            " config.json, in the order in which it was trained"
        )
    return consistent[0]
