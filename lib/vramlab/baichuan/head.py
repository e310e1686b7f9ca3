"""The language-model head, whose rows are normalised in every forward, and its loss.

Shapes: b batch, t tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormHead(nn.Module):
    """logits = h normalize(W)^T: rows of W (V, H) are normalised to length one in every forward,
    and gradient flows through the normalisation.

    The published head normalises its own weight in place at the first evaluation. Without `norm` it
    is the plain linear head that the paper compares with: logits = h W^T.
    """

    fused: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor] | None = None
    """(hidden, weight, labels, z_loss_weight, norm) -> loss: a replacement that forms no logits."""

    def __init__(self, hidden_size: int, vocab_size: int, norm: bool = True):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.applied = AppliedHead(self)

    def rows(self, weight: Tensor) -> Tensor:
        """Rows of the weight, or all, in the form in which hidden states are multiplied with
        them."""
        return F.normalize(weight) if self.norm else weight

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.rows(self.weight))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, z_loss_weight: float = 0.0):
        """hidden (b, t, H) -> logits (b, t, V); with labels (b, t), already shifted: (loss, logits,
        or None if none were formed)."""
        if labels is None:
            return self.logits(hidden)
        if self.fused is not None:
            return self.fused(hidden, self.weight, labels, z_loss_weight, self.norm), None
        logits = self.logits(hidden)
        return causal_loss(logits, labels, z_loss_weight), logits


class AppliedHead(nn.Module):
    """The output embeddings, for libraries that multiply with the head's weight themselves (TRL's
    losses, peft, assisted generation).

    `weight` (V, H) is the rows as `NormHead` multiplies them, normalised anew at each access;
    gradient flows to the stored weight. It has no parameters of its own and equals the head, so
    peft, which looks for the module that equals the output embeddings, saves the head's parameter.
    """

    head: NormHead
    bias = None
    __hash__ = nn.Module.__hash__

    def __init__(self, head: NormHead):
        super().__init__()
        object.__setattr__(self, "head", head)  # not as a submodule: the head is the parent

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.head

    @property
    def weight(self) -> Tensor:
        return self.head.rows(self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)


def next_labels(
    labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Label of the next token at each position (b, t); -100 where nothing is predicted.

    Nothing is predicted across the edge of a document, where the mask changes or positions do not
    grow. The loss counts these labels, not the given ones. Shifting the labels instead of the
    logits saves a copy of the logits.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    if attention_mask is not None:
        mask = attention_mask[:, -labels.shape[1] :]  # a mask covers cached tokens too
        edge = mask[:, 1:] != mask[:, :-1]
        shifted[:, :-1].masked_fill_(edge, -100)
    if position_ids is not None:
        shifted[:, :-1].masked_fill_(position_ids[:, 1:] <= position_ids[:, :-1], -100)
    return shifted


def causal_loss(logits: Tensor, labels: Tensor, z_loss_weight: float = 0.0) -> Tensor:
    """Mean cross-entropy over labelled positions, plus z_loss_weight * mean(max logit ^ 2) over
    them (paper eq. 1).

    Shapes: logits (b, t, V), labels (b, t), already shifted. In fp32 for logits of any type. At
    weight 0, as released, the max-z term is not built: in backward it would hold one more copy of
    the logits. Not exact: the released code averages the term over padding too. Without labels the
    loss is nan, as torch's is, and every gradient 0.
    """
    flat, targets = logits.flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat.float(), targets, ignore_index=-100)
    if z_loss_weight:
        labelled = targets != -100
        highest = flat.float().amax(-1).pow(2)
        loss = loss + z_loss_weight * (highest * labelled).sum() / labelled.sum().clamp_(min=1)
    return loss
