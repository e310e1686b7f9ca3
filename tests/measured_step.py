"""Steps of a mid-sized model, called in a measured process by test_meter: big enough for a percent
to be visible."""

from __future__ import annotations

import torch

import micro
from vramlab.capture.peak_rss import peak_window
from vramlab.observer import Observer
from vramlab.regimes.regime import read_row
from vramlab.training.trainer import Schedule, Trainer

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def steps(row: dict, observer: Observer, layers: int = 4, count: int = 2) -> Trainer:
    """A model made and trained for `count` steps of 4 x 256 tokens."""
    trainer = Trainer(
        micro.model(**{**SIZES, "num_hidden_layers": layers}),
        read_row("row", row),
        Schedule(1e-3, count),
        observer=observer,
    )
    ids = torch.randint(3, 1000, (4, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for _ in range(count):
        trainer.step([batch])
    return trainer


def measured(payload: dict) -> dict:
    """Called in a child process."""
    torch.set_num_threads(1)
    steps(payload["row"], Observer(), layers=1)
    with peak_window() as peak:
        steps(payload["row"], Observer())
    return {"peak_bytes": peak.delta_bytes, "method": peak.method}
