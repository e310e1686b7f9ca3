"""What the head says at each step: the highest logit, and the cross-entropy without the max-z term.

Beside the loss a step returns, since a loss with a max-z term is not the loss of one without, and
logits grow before a loss shows it. Needs the logits, so a plain `head`; one more look at each of
them a step, which is in the step's time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..baichuan.head import NormHead


class LogitWatch:
    """Watches a model's head while it trains; `take` is asked once a step."""

    def __init__(self, model: nn.Module, z_loss_weight: float):
        self.z_loss_weight, self._seen = z_loss_weight, []
        head = next(module for module in model.modules() if isinstance(module, NormHead))
        if head.fused is not None:
            raise ValueError(
                "watch_logits is on, and head: fused never has all logits: use head: plain, or"
                " leave it off"
            )
        self._handle = head.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, head: NormHead, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        (loss, logits), labelled = output, inputs[1] != -100
        highest = logits.detach().float().amax(-1)
        z_loss = self.z_loss_weight * (highest.square() * labelled).sum() / labelled.sum()
        self._seen.append(
            (float(highest[labelled].max()), float(loss - z_loss), int(labelled.sum()))
        )

    def take(self) -> dict[str, float]:
        """`highest_logit`, over the labelled tokens of the step; `cross_entropy`, their mean. NaN
        where nothing was looked at."""
        seen, self._seen = self._seen, []
        tokens = sum(count for _, _, count in seen)
        if not tokens:
            return {"highest_logit": math.nan, "cross_entropy": math.nan}
        return {
            "highest_logit": max(highest for highest, _, _ in seen),
            "cross_entropy": sum(entropy * count for _, entropy, count in seen) / tokens,
        }

    def stop(self) -> None:
        self._handle.remove()
