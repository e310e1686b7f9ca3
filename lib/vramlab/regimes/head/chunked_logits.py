"""The logits of a head over a set of tokens, formed chunk by chunk, and the gradients of the loss
that come from them. What is computed, and why, is described in `fused`.

Shapes: n tokens, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...observer import Observer
from ..until.row_protocol import Spans, TakesRows
from ..weights import bf16_on_cpu
from .chunks import Chunks, Cut, product_spans

EPS = 1e-12
"""Least length that a row is divided by: the default of `F.normalize`."""
IGNORED = -100
LoadRows = Callable[[Tensor, Spans], Iterator[Tensor]]
"""(weight, spans) -> the rows of the weight on the device, span by span."""


def rows_on_device(weight: Tensor, pieces: Spans) -> Iterator[Tensor]:
    """The rows of a weight that is on the device as a whole."""
    return (weight[a:b] for a, b in pieces)


@dataclass(frozen=True)
class Options:
    """The arguments of the fused head that are no tensors."""

    dtype: torch.dtype
    """The type in which products are formed."""
    z_loss_weight: float = 0.0
    start: int = 0
    """The row of the weight that is the first of the trained leaf."""
    row_receiver: TakesRows | None = None
    """Receives the leaf's gradient in rows, in place of autograd."""
    load_rows: LoadRows = rows_on_device
    norm: bool = True
    """Whether the rows of the weight are normalised."""
    observer: Observer = Observer()
    """Is notified where each turn of a loop over chunks begins."""


class ChunkedLogits:
    """One head over one set of tokens: hidden (n, H), weight (V, H), labels (n,). `norm` (V,): the
    lengths of the rows, where they are known already."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: Options,
        norm: Tensor | None = None,
    ):
        self.hidden, self.weight = hidden.to(options.dtype), weight
        self.labels, self.options = labels, options
        self.wide = torch.promote_types(options.dtype, torch.float32)
        # products are formed with the weight itself, unless its rows have to be loaded or copied to
        # another type first
        self.copies = (
            options.load_rows is not rows_on_device
            or weight.dtype != options.dtype
            or (bf16_on_cpu.active() and options.dtype in bf16_on_cpu.HALVES)
        )
        self.row_spans = product_spans(len(weight))
        self.norm = self._norms() if norm is None and options.norm else norm
        self.length = (
            self.hidden.new_ones(len(weight), dtype=self.wide)
            if self.norm is None
            else self.norm.clamp_min(EPS)
        )
        self.labelled = labels != IGNORED
        # without labels the loss is 0, and so is every gradient
        self.count = self.labelled.sum().clamp_(min=1)

    def form(self, dhidden: Tensor | None, dleaf: Tensor | None, cut: Cut) -> tuple[Tensor, ...]:
        """Fills the gradients that are not None.

        Returns four statistics, each (n,): the highest logit, the sum of exp(logit - highest), the
        label's logit, and the column of the highest (0 without max-z, which alone needs it).
        """
        statistics = []
        for first, last in Chunks(cut, len(self.hidden), self.options.observer):
            tokens = slice(first, last)
            products = self._all_products(self.hidden[tokens])
            statistics.append(self._statistics(products, self.labels[tokens]))
            if dhidden is not None or dleaf is not None:
                self._form_gradients(tokens, products, statistics[-1], dhidden, dleaf)
            del products  # before the next chunk's
        return tuple(torch.cat(parts) for parts in zip(*statistics, strict=True))

    def mean_loss(self, highest: Tensor, total: Tensor, label: Tensor, column: Tensor) -> Tensor:
        """The mean loss, 0-d, from the statistics of `form`."""
        each = highest - label + total.log()
        if self.options.z_loss_weight:
            each += self.options.z_loss_weight * highest.square()
        return each.mul(self.labelled).sum() / self.count

    def row_gradient(
        self, leaf: Tensor, statistics: Sequence[Tensor], upstream: Tensor, pieces: Spans
    ) -> Callable[[int, int], Tensor]:
        """(a, b) -> rows a:b of the leaf's gradient, from products formed again. To be called for
        `pieces`, in their order, any number of times."""
        start, loaded = self.options.start, iter(list[tuple[int, int, Tensor]]())

        def gradient(a: int, b: int) -> Tensor:
            nonlocal loaded
            if a == 0:  # a sweep begins
                loaded = self._rows([(start + first, start + last) for first, last in pieces])
            _, _, rows = next(loaded)
            dproducts = self._dproducts(
                self._products(self.hidden, rows), start + a, slice(None), statistics
            )
            d = self._matmul(dproducts.mT, self.hidden)
            return gradient_through_norm(d, rows, self.norm, start + a, upstream).to(leaf.dtype)

        return gradient

    # products -------------------------------------------------------------------------------------

    def _norms(self) -> Tensor:
        return torch.cat(
            [
                torch.linalg.vector_norm(rows, dim=1, dtype=self.wide)
                for _, _, rows in self._rows(self.row_spans)
            ]
        )

    def _rows(self, pieces: Spans) -> Iterator[tuple[int, int, Tensor]]:
        loaded = self.options.load_rows(self.weight, pieces)
        return ((a, b, rows) for (a, b), rows in zip(pieces, loaded, strict=True))

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, both rounded to the type of products first; the result is not rounded where
        it is formed in fp32."""
        left, right = left.to(self.options.dtype), right.to(self.options.dtype)
        return left.to(self.wide) @ right.to(self.wide) if bf16_on_cpu.active() else left @ right

    def _products(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """h W^T for some rows, rounded to the type of products, by F.linear, which `bf16_on_cpu`
        may replace."""
        return F.linear(hidden, rows.to(self.options.dtype))

    def _all_products(self, hidden: Tensor) -> Tensor:
        if not self.copies:
            return self._products(hidden, self.weight)
        products = hidden.new_empty(len(hidden), len(self.weight))
        for a, b, rows in self._rows(self.row_spans):
            products[:, a:b] = self._products(hidden, rows)
        return products

    # loss -----------------------------------------------------------------------------------------

    def _statistics(self, products: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        highest = torch.full_like(labels, -torch.inf, dtype=self.wide)
        total, label = torch.zeros_like(highest), torch.zeros_like(highest)
        column = torch.zeros_like(labels)
        for a, b in self.row_spans:
            logits = products[:, a:b] / self.length[a:b]
            local, inside = _in_columns(labels, a, b)
            label += logits.gather(1, local)[:, 0] * inside
            top = logits.amax(1)
            if self.options.z_loss_weight:
                column = torch.where(top > highest, a + logits.argmax(1), column)
            before, highest = highest, highest.maximum(top)
            total = total * (before - highest).exp() + logits.sub_(highest[:, None]).exp_().sum(1)
        return highest, total, label, column

    # gradients ------------------------------------------------------------------------------------

    def _dproducts(
        self, products: Tensor, a: int, tokens: slice, statistics: Sequence[Tensor]
    ) -> Tensor:
        """Products (n, R) with rows from a on -> the gradient of the loss with respect to them,
        wide."""
        highest, total, _, column = statistics
        b, labelled = a + products.shape[1], self.labelled[tokens].to(self.wide)
        # softmax, and 0 where nothing is to be predicted
        grad = (
            torch.addcdiv(highest.neg()[:, None], products, self.length[a:b])
            .exp_()
            .mul_((labelled / total)[:, None])
        )
        local, inside = _in_columns(self.labels[tokens], a, b)
        grad.scatter_add_(1, local, inside.to(self.wide).neg()[:, None])
        if self.options.z_loss_weight:
            local, inside = _in_columns(column, a, b)
            grad.scatter_add_(
                1, local, (2 * self.options.z_loss_weight * highest * labelled * inside)[:, None]
            )
        return grad.mul_((self.length[a:b] * self.count).reciprocal())

    def _form_gradients(
        self,
        tokens: slice,
        products: Tensor,
        statistics: Sequence[Tensor],
        dhidden: Tensor | None,
        dleaf: Tensor | None,
    ) -> None:
        """The chunk's own dh, and its part of d. Overwrites `products` with their gradient."""
        for a, b in self.row_spans:
            products[:, a:b] = self._dproducts(products[:, a:b], a, tokens, statistics)
        if dhidden is not None:
            dhidden[tokens] = self._dhidden(products)
        if dleaf is not None:
            self._add_to(dleaf, products, tokens)

    def _dhidden(self, dproducts: Tensor) -> Tensor:
        if not self.copies:
            return dproducts @ self.weight
        shape, device = (len(dproducts), self.weight.shape[1]), dproducts.device
        summed = torch.zeros(shape, dtype=self.wide, device=device)
        for a, b, rows in self._rows(self.row_spans):
            summed += self._matmul(dproducts[:, a:b], rows)
        return summed

    def _add_to(self, dleaf: Tensor, dproducts: Tensor, tokens: slice) -> None:
        hidden, first = self.hidden[tokens], tokens.start == 0
        dproducts = dproducts[:, self.options.start : self.options.start + len(dleaf)].mT
        if not self.copies:  # one rounding a chunk
            dleaf.addmm_(dproducts, hidden, beta=0 if first else 1)
            return
        for a, b in product_spans(len(dleaf)):
            part = self._matmul(dproducts[a:b], hidden)
            dleaf[a:b] = part if first else part + dleaf[a:b]


def gradient_through_norm(
    d: Tensor, rows: Tensor, norm: Tensor | None, first: int, upstream: Tensor
) -> Tensor:
    """d (R, H), the gradient with respect to the normalised rows divided by their length ->
    upstream * the gradient with respect to the rows, wide. `norm` (V,) of all rows, of which these
    begin with number `first`; None where they are not normalised.
    """
    if norm is None:
        return d.to(upstream.dtype) * upstream
    norm = norm[first : first + len(d)]
    unit = rows.to(norm.dtype) / norm.clamp_min(EPS)[:, None]
    d = d.to(norm.dtype)
    radial = torch.linalg.vecdot(d, unit) * (norm >= EPS)
    return unit.mul_(radial[:, None]).sub_(d).mul_(-upstream)


def _in_columns(labels: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """The column among a:b of each label (n, 1), and whether the label is in a:b at all (n,)."""
    local = labels - a
    return local.clamp(0, b - a - 1)[:, None], (local >= 0) & (local < b - a)
