"""Watches the logits of a training step: the highest one, and the cross-entropy without the max-z
term.

A loss with a max-z term cannot be compared with a loss without one, and logits grow before a loss
shows it. The watch needs all logits, so a plain `head`. It reads each of them once more in every
step, and that time is part of the step's time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..baichuan.head import NormHead


class LogitWatch:
    """Watches the head of a model while it trains. Call `take` once for each step.

    Raises: ValueError, for a fused head.
    """

    def __init__(self, model: nn.Module, z_loss_weight: float):
        self.z_loss_weight = z_loss_weight
        self._forwards: list[tuple[float, float, int]] = []
        head = next(module for module in model.modules() if isinstance(module, NormHead))
        if head.fused is not None:
            raise ValueError(
                "watch_logits is on, and head: fused never has all logits: use head: plain, or"
                " leave it off"
            )
        self._handle = head.register_forward_hook(self._measure)

    @torch.no_grad()
    def _measure(self, head: NormHead, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        (loss, logits), labelled = output, inputs[1] != -100
        highest = logits.detach().float().amax(-1)
        z_loss = self.z_loss_weight * (highest.square() * labelled).sum() / labelled.sum()
        self._forwards.append(
            (float(highest[labelled].max()), float(loss - z_loss), int(labelled.sum()))
        )

    def take(self) -> dict[str, float]:
        """`highest_logit` and the mean `cross_entropy` over the labelled tokens since the last
        call; NaN where there was no forward."""
        forwards, self._forwards = self._forwards, []
        tokens = sum(count for _, _, count in forwards)
        if not tokens:
            return {"highest_logit": math.nan, "cross_entropy": math.nan}
        return {
            "highest_logit": max(highest for highest, _, _ in forwards),
            "cross_entropy": sum(entropy * count for _, entropy, count in forwards) / tokens,
        }

    def stop(self) -> None:
        self._handle.remove()
