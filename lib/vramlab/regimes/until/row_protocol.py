"""The protocol for gradients that are updated in rows: those of the two largest matrices,
embeddings and head, inside backward, without ever existing as a whole.

With `until: backward`, the function that forms the gradient of such a leaf does not return it to
autograd. It forms some rows, hands them to the leaf's optimizer, drops them, and forms the next:

    receiver.begin_rows(leaf)
    for sweep in range(receiver.sweeps):
        for start, stop in spans:
            receiver.rows(leaf, start, stop, grad, sweep)
    receiver.end_rows(leaf)

The spans are ascending, cover all rows and are the same in every sweep. `grad` is (stop - start,
...) in the leaf's type, and the receiver may change it.

An optimizer can receive rows if it has these three methods and `sweeps`; any other optimizer gets
the whole gradient. A rule that acts on each weight alone needs one sweep. A rule that first needs a
property of the whole matrix (row and column means, the norm of the update) asks for more: each
sweep forms the same rows again, bit for bit, so the leaf itself must not be written before the last
sweep. State stays in the optimizer's `state`, as in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor

Spans = list[tuple[int, int]]


@runtime_checkable
class TakesRows(Protocol):
    """An optimizer of one leaf that can receive its gradient in rows."""

    @property
    def sweeps(self) -> int:
        """How often it needs every row."""

    def begin_rows(self, leaf: Tensor) -> None:
        """An update of `leaf` begins: create missing state and count the step."""

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        """Use the rows `start:stop` of the gradient."""

    def end_rows(self, leaf: Tensor) -> None:
        """Every row has come in every sweep."""


def feed(
    receiver: TakesRows,
    leaf: Tensor,
    spans: Iterable[tuple[int, int]],
    gradient: Callable[[int, int], Tensor],
) -> None:
    """Update `leaf` once: form rows of its gradient by `gradient(start, stop)` and hand them over.
    `spans` is iterated once for each sweep."""
    receiver.begin_rows(leaf)
    for sweep in range(receiver.sweeps):
        for start, stop in spans:
            receiver.rows(leaf, start, stop, gradient(start, stop), sweep)
    receiver.end_rows(leaf)


def spans(rows: int, most: int) -> Spans:
    """`range(rows)` cut into the fewest (start, stop) of at most `most` rows, as equal as
    possible."""
    count = -(-rows // max(1, most))
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return list(itertools.pairwise(edges))
