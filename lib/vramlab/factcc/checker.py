"""A published judge of consistency, such as FactCC's own: a sequence classifier in a local folder,
read as it is.

Which of its outputs means consistent is read from `id2label`; two checkpoints of the same name
differ in that order. It sees the pair (document, claim), and of a pair that is too long the
document loses its end. No judge is the truth: of CNN/DM's own highlights FactCC calls some 42 %
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

from .sources import LABELS

BATCH = 16


@dataclass(frozen=True)
class Checker:
    """`consistent` is the output that means consistent; `limit` the tokens of a pair, marks
    included."""

    name: str
    model: nn.Module
    tokenizer: object
    labels: dict[int, str]
    consistent: int
    limit: int

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Checker:
        """The checkpoint in the folder `path`, in fp32. Raises: ValueError, naming what is missing
        or cannot be told."""
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
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
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
        """One row a pair: `called` (consistent, inconsistent, unreadable), `probability` of
        consistent, and `cut`, whether the document lost its end. A claim that is empty or longer
        than half of `limit` is unreadable and is not shown.
        """
        rows = []
        for start in range(0, len(claims), BATCH):
            pairs = list(
                zip(documents[start : start + BATCH], claims[start : start + BATCH], strict=True)
            )
            rows += self._judge(pairs)
            if progress:
                progress(len(pairs))
        return pd.DataFrame(rows, columns=["called", "probability", "cut"])

    def _judge(self, pairs: list[tuple[str, str]]) -> list[dict]:
        readable = [pair for pair in pairs if 0 < self._length(pair[1]) <= self.limit // 2]
        found = iter(self._probabilities(readable) if readable else ())
        rows = []
        for pair in pairs:
            (probability, called), cut = (
                (next(found) if pair in readable else (None, "unreadable")),
                self._length(*pair) > self.limit,
            )
            rows.append({"called": called, "probability": probability, "cut": cut})
        return rows

    def _probabilities(self, pairs: list[tuple[str, str]]) -> list[tuple[float, str]]:
        batch = self.tokenizer(
            *map(list, zip(*pairs, strict=True)),
            truncation="only_first",
            max_length=self.limit,
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        logits = self.model(**batch).logits
        called = [
            "consistent" if best == self.consistent else "inconsistent"
            for best in logits.argmax(-1).tolist()
        ]
        return list(zip(logits.softmax(-1)[:, self.consistent].tolist(), called, strict=True))

    def _length(self, *texts: str) -> int:
        """Tokens of a claim alone, or of a pair with its marks."""
        return len(
            self.tokenizer(*texts, add_special_tokens=len(texts) > 1, verbose=False)["input_ids"]
        )


def consistent_id(labels: dict[int, str], name: str) -> int:
    """The one output whose label says consistent, where all others say inconsistent. Raises:
    ValueError, with the labels."""
    means = {index: LABELS.get(str(label).strip().upper()) for index, label in labels.items()}
    consistent = [index for index, label in means.items() if label == 1]
    if len(consistent) != 1 or None in means.values():
        raise ValueError(
            f"checker {name} has the labels {', '.join(map(str, labels.values()))}: which one means"
            " consistent cannot be told. Known:"
            f" {', '.join(label for label in LABELS if isinstance(label, str))}; write them into"
            " id2label of its config.json, in the order in which it was trained"
        )
    return consistent[0]
