"""Axis `head`: how the loss is formed from the last hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...baichuan.head import NormHead
from ..until.row_protocol import TakesRows
from .fused import Bring, FusedHeadLoss, Options, there


@dataclass(frozen=True)
class Plain:
    """All logits at once, from a normalised copy of the head's weight, and the cross-entropy of the
    logits."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class Fused(Plain):
    """Head and cross-entropy as one function, chunk by chunk, see `fused_head`: no normalised copy
    of the weight, never all logits. Only the loss: a model that is given labels returns no
    logits."""

    def prepare(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, NormHead):
                module.fused = FusedLoss()
        return model


class FusedLoss:
    """What a `NormHead` calls in place of forming logits. `leaf`, `start`, `taker`: what trains,
    see `Options`; without a leaf it is the weight, if that trains. `bring`: where the weight's rows
    come from."""

    def __init__(self, bring: Bring = there):
        self._bring = bring
        self.trains(None)

    def trains(self, leaf: Tensor | None, start: int = 0, taker: TakesRows | None = None) -> None:
        self.leaf, self.start, self.taker = leaf, start, taker

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight: float, norm: bool
    ) -> Tensor:
        """hidden (b, t, H), weight (V, H), labels (b, t) already moved -> mean loss, fp32. `norm`:
        whether rows are normalised."""
        device_type, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        leaf = weight if self.leaf is None and weight.requires_grad else self.leaf
        if not torch.is_grad_enabled():
            hidden, leaf = hidden.detach(), None
        with torch.autocast(device_type, enabled=False):
            return FusedHeadLoss.apply(
                hidden.flatten(0, -2),
                weight.detach(),
                leaf,
                labels.flatten(),
                Options(dtype, z_loss_weight, self.start, self.taker, self._bring, norm),
            )
