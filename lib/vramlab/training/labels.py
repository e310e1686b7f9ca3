"""Counts and checks the labels of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Batch = Mapping[str, Tensor]
"""input_ids, labels, and optionally attention_mask and position_ids: each (batch, tokens),
integers; labels are -100 where nothing is to be learned."""


def count_labels(
    batches: Sequence[Batch], predicted: Callable[[Batch], Tensor], vocabulary: int, step: int
) -> list[int]:
    """How many labels of each batch the loss counts. `predicted` moves the labels of a batch to
    where they are predicted. Counted on the labels' device, unseen by observers of the step.

    Raises: ValueError, if a label that counts is outside the vocabulary.
    """
    with _disable_current_modes():
        labels = [moved[moved != -100] for moved in map(predicted, batches)]
        for counted in labels:
            for label in counted[(counted < 0) | (counted >= vocabulary)][:1]:
                raise ValueError(
                    f"a label of step {step} is {int(label)}, outside the vocabulary of"
                    f" {vocabulary}: use 0 to {vocabulary - 1}, or -100 where nothing is to be"
                    " learned"
                )
        return [len(counted) for counted in labels]
