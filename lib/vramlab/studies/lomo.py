"""LOMO: what its memory is, whether SGD is enough, what its clippings do, and fp16. Lv 2024, arXiv:2306.09782; Lv 2023,
arXiv:2310.10195."""

from __future__ import annotations

import pandas as pd
import torch

from ..axes.until import Updater
from .measurements import _batches, _row, _trainer

SCALED = {"as written": {}, "hooks under GradScaler": {}}


def scaled_updates(model: str, scale: float, seq: int = 64) -> pd.DataFrame:
    """The first step of random weights in fp32 under LOMO: `how`, and `ratio`, how much further the weights move than by plain
    LOMO (norms over all weights). Plain hooks under torch's GradScaler, which scales the loss and means to divide the gradients
    after backward, and our own scaled updates."""
    moved = {"plain": _moved(model, seq, {"backward": {"clip_norm": 1e9}}, None),
             "hooks under GradScaler": _moved(model, seq, "backward", torch.amp.GradScaler("cpu", init_scale=scale)),
             "loss_scale": _moved(model, seq, {"backward": {"clip_norm": 1e9, "loss_scale": scale}}, None)}
    return pd.DataFrame([{"how": how, "ratio": far / moved["plain"]} for how, far in moved.items()])


def _moved(model: str, seq: int, until, scaler: torch.amp.GradScaler | None) -> float:
    """Length of the first step. `scaler` scales the loss as training loops do it."""
