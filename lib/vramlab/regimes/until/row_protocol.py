"""Gradients that arrive in rows: how the two largest matrices, embeddings and head, are updated
inside backward without their gradient ever being whole.

With `until: backward`, whoever forms the gradient of such a leaf does not return it to autograd. It
forms some rows, hands them to the leaf's optimizer, drops them, and forms the next:

    taker.begin_rows(leaf)
    for sweep in range(taker.sweeps):
        for start, stop in spans:                            # ascending, together all rows, the
          same in every sweep
            taker.rows(leaf, start, stop, grad, sweep)       # grad (stop - start, ...), in the
              leaf's type, the taker's to change
    taker.end_rows(leaf)

An optimizer can take rows when it has these three methods and `sweeps`; one without them gets the
whole gradient, as ever. A rule that acts on each weight alone needs one sweep. One that first needs
something of the whole matrix (row and column means, the norm of the update) asks for more: the same
rows of the gradient are formed again in each sweep, bit for bit, so the leaf itself must not be
written before the last sweep. State stays in the optimizer's `state`, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor

Spans = list[tuple[int, int]]


@runtime_checkable
class TakesRows(Protocol):
    """An optimizer of one leaf that can be handed its gradient in rows."""

    sweeps: int
    """How often it must see every row."""

    def begin_rows(self, leaf: Tensor) -> None:
        """An update of `leaf` begins: make state that is missing, count the step."""

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        """Rows `start:stop` of the gradient."""

    def end_rows(self, leaf: Tensor) -> None:
        """Every row has been seen in every sweep."""


def feed(
    taker: TakesRows,
    leaf: Tensor,
    spans: Iterable[tuple[int, int]],
    gradient: Callable[[int, int], Tensor],
) -> None:
    """One update of `leaf`; `gradient(start, stop)` forms rows of its gradient. `spans` is iterated
    once for each sweep."""
    taker.begin_rows(leaf)
    for sweep in range(taker.sweeps):
        for start, stop in spans:
            taker.rows(leaf, start, stop, gradient(start, stop), sweep)
    taker.end_rows(leaf)


def spans(rows: int, most: int) -> Spans:
    """`range(rows)` cut into the fewest (start, stop) of at most `most` rows, as equal as can
    be."""
    count = -(-rows // max(1, most))
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return list(zip(edges, edges[1:], strict=False))
