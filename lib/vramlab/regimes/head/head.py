"""Axis `head`: how the loss is formed from the last hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...baichuan.head import NormHead
from ...observer import Observer
from ..until.row_protocol import TakesRows
from .chunked_logits import LoadRows, Options, rows_on_device
from .fused import FusedHeadLoss


@dataclass(frozen=True)
class Plain:
    """All logits at once, from a normalised copy of the head's weight, and their cross-entropy."""

    def prepare(self, model: nn.Module, observer: Observer | None = None) -> nn.Module:
        """The model with its loss formed in this way."""
        return model


@dataclass(frozen=True)
class Fused(Plain):
    """Head and cross-entropy as one function, chunk by chunk, see `fused`: no normalised copy of
    the weight, never all logits. Forms the loss alone: a model that gets labels returns no
    logits."""

    def prepare(self, model: nn.Module, observer: Observer | None = None) -> nn.Module:
        for module in model.modules():
            if isinstance(module, NormHead):
                module.fused = FusedLoss(observer=observer)
        return model


class FusedLoss:
    """A `NormHead` calls it instead of forming logits.

    `load_rows` yields the weight's rows on the device. `trains` sets the trained leaf, the row of
    the weight where it begins, and the receiver of its gradient in rows, or None. Without a leaf
    the whole weight trains, if it requires a gradient.
    """

    def __init__(self, load_rows: LoadRows = rows_on_device, observer: Observer | None = None):
        self._load_rows, self._observer = load_rows, observer or Observer()
        self.trains(None)

    def trains(
        self, leaf: Tensor | None, start: int = 0, row_receiver: TakesRows | None = None
    ) -> None:
        self.leaf, self.start, self.row_receiver = leaf, start, row_receiver

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
        options = Options(
            dtype=dtype,
            z_loss_weight=z_loss_weight,
            start=self.start,
            row_receiver=self.row_receiver,
            load_rows=self._load_rows,
            norm=norm,
            observer=self._observer,
        )
        with torch.autocast(device_type, enabled=False):
            return FusedHeadLoss.apply(
                hidden.flatten(0, -2), weight.detach(), leaf, labels.flatten(), options
            )
