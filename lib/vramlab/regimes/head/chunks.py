"""How the fused head cuts its tokens, and the rows of its gradient, into chunks.

The sizes depend on the model and on the number of tokens only, so the chunks of any number of
tokens are known without running the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...observer import Observer
from ..until.row_protocol import Spans, spans

ROWS = 4096
"""Most rows of the weight in a product: a thirtieth of the published vocabulary."""
LEAST_ROWS, LEAST_PRODUCTS = 64, 4 << 20
"""Rows of a chunk, and products of a chunk of tokens: smaller ones save no bytes worth their
time."""
MOST_ROUNDINGS = 4
"""Most chunks of tokens over which a gradient in half types is summed with a rounding at each."""
CHUNK_SHARE = 0.15
"""Most of the weight's size in bf16 that a chunk's products with all rows may have."""


@dataclass(frozen=True)
class Cut:
    """How a head cuts any number of tokens, or the rows of its gradient, into chunks."""

    vocabulary: int
    hidden: int
    itemsize: int
    """Bytes of a product."""
    rows: int = 0
    """Rows of the gradient; 0 where tokens are cut."""
    rounded_sum_token_limit: int = 0
    """Most tokens over which a gradient in half types is summed chunk by chunk, rounded at each.
    With more tokens each row is summed over all of them in one product. 0 where the number of
    tokens does not decide."""

    @property
    def tokens_at_once(self) -> int:
        share = int(CHUNK_SHARE * 2 * self.hidden / self.itemsize)
        return max(1, share, LEAST_PRODUCTS // self.vocabulary)

    def spans(self, tokens: int) -> Spans:
        """(start, stop) of each chunk of `tokens` tokens, or of the rows of their gradient."""
        if not self.rows:
            return spans(tokens, self.tokens_at_once)
        return spans(self.rows, rows_at_once(self.vocabulary, self.hidden, tokens))


@dataclass(frozen=True)
class Chunks:
    """The chunks that `cut` makes of `tokens` tokens. A loop over them reports to `observer` where
    each turn begins and where the loop ends."""

    cut: Cut
    tokens: int
    observer: Observer

    def __iter__(self) -> Iterator[tuple[int, int]]:
        chunks = self.cut.spans(self.tokens)
        for turn, chunk in enumerate(chunks):
            self.observer.begin_chunk(self.cut, self.tokens, turn)
            yield chunk
        self.observer.begin_chunk(self.cut, self.tokens, len(chunks))


def rows_at_once(vocabulary: int, hidden: int, tokens: int) -> int:
    """How many rows of the gradient to form at once: with some fp32 copies of them and of their
    logits they stay within `CHUNK_SHARE`."""
    return max(LEAST_ROWS, int(CHUNK_SHARE * 2 * (vocabulary * hidden) / (16 * (hidden + tokens))))


def product_spans(rows: int) -> Spans:
    """(start, stop) of the rows of each product."""
    return spans(rows, ROWS)
