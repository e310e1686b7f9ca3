"""Axis `head`: how the loss is formed from the last hidden state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..baichuan.model import NormHead
from .fused_head import FusedLoss


@dataclass(frozen=True)
class Plain:
    """All logits at once, from a normalised copy of the head's weight, and the cross-entropy of the logits."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class Fused(Plain):
    """Head and cross-entropy as one function, chunk by chunk, see `fused_head`: no normalised copy of the weight, never all
    logits. Only the loss: a model that is given labels returns no logits."""

    def prepare(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, NormHead):
                module.fused = FusedLoss()
        return model
