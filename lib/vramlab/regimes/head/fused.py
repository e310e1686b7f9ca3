"""NormHead and cross-entropy as one function that holds neither a normalised weight nor all logits.

Normalising the rows of W (V, H) scales the columns of the logits, so W itself is what is
multiplied:

    logits = (h W^T) * s,    s_v = 1 / max(|w_v|, eps)                    eps as in F.normalize
    G = dloss/dlogits = (softmax(logits) - onehot) / labelled tokens      and 2 z max(logit) more at
      the maximum, for max-z
    dh = (G s) W
    dw_v = d_v - (d_v . u_v) u_v,    d = (G s)^T h,    u_v = s_v w_v      second term only where
                                     |w_v| >= eps

A plain linear head is the same with s = 1 and no second term.

Forward goes over chunks of tokens. The products of one chunk with all rows of W are held, in the
type products are formed in; from them come the loss, then, while they are there, the chunk's dh and
its part of d: so nothing is formed twice, and what waits for backward is dh (tokens, H) and d,
which backward turns into the gradient in place. (Forming gradients in the forward of a loss is
Liger-Kernel's way, Hsu 2024, arXiv:2410.10989.) A frozen head keeps dh alone.

Where the gradient is taken in rows (see `rows`), d is not formed in forward. Backward goes over
chunks of rows, forms their logits again from what was kept of each token, the highest logit and the
sum of exponentials, and hands over their gradient: one more product of the head's size a sweep.
(Recomputation is cut cross-entropy's way, Wijmans 2024, arXiv:2411.09009.) A gradient in half types
goes that way too where there are many chunks of tokens, since a sum over them would be rounded at
each.

Not exact: logits and loss are formed in fp32 (fp64 in fp64) from products rounded to their type, as
the plain head's are; the plain head also rounds the normalised weight. Where several logits are the
highest, the first takes the gradient of max-z, and torch's amax shares it among them: in half
types, where that is common, the two differ by their luck.

Shapes: n tokens, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...observer import Observer
from ..until.row_protocol import Spans, TakesRows, feed, spans
from ..weights import bf16_on_cpu as rounding

EPS = 1e-12
"""Least length a row is divided by: the default of `F.normalize`."""
IGNORED = -100
ROWS = 4096
"""Most rows of the weight in a product: a thirtieth of the published vocabulary."""
LEAST_ROWS, LEAST_PRODUCTS = 64, 4 << 20
"""Rows of a chunk, and products of a chunk of tokens: smaller ones save no bytes worth their
time."""
MOST_ROUNDINGS = 4
"""Over so many chunks of tokens a gradient in half types may be summed up."""
HELD = 0.15
"""Most of the weight's size in bf16 that a chunk's products with all rows may have."""


@dataclass(frozen=True)
class Cut:
    """How a head's tokens, or the rows of its gradient, are cut into chunks, of any number of
    tokens."""

    vocabulary: int
    hidden: int
    itemsize: int
    """Of a product."""
    rows: int = 0
    """Of the gradient; 0: tokens are cut."""
    whole_up_to: int = 0
    """Tokens beyond which the gradient is taken in rows; 0: it is, or is not, whatever their
    number."""

    @property
    def tokens_at_once(self) -> int:
        return max(
            1, int(HELD * 2 * self.hidden / self.itemsize), LEAST_PRODUCTS // self.vocabulary
        )

    def spans(self, tokens: int) -> Spans:
        if not self.rows:
            return spans(tokens, self.tokens_at_once)
        return spans(self.rows, _rows_at_once(self.vocabulary, self.hidden, tokens))


@dataclass(frozen=True)
class Chunks:
    """The chunks that `cut` makes of `tokens` tokens. A loop over them tells `observer` where each
    turn begins and where the loop ends."""

    cut: Cut
    tokens: int
    observer: Observer

    def __iter__(self) -> Iterator[tuple[int, int]]:
        chunks = self.cut.spans(self.tokens)
        for turn, chunk in enumerate(chunks):
            self.observer.begin_chunk(self.cut, self.tokens, turn)
            yield chunk
        self.observer.begin_chunk(self.cut, self.tokens, len(chunks))


Bring = Callable[[Tensor, Spans], Iterator[Tensor]]


def there(weight: Tensor, pieces: Spans) -> Iterator[Tensor]:
    """The rows of a weight that is on the device as a whole."""
    return (weight[a:b] for a, b in pieces)


@dataclass(frozen=True)
class Options:
    """What of the function is not a tensor. `dtype` is the type products are formed in; `start` the
    row of the weight that is the first of the trained leaf; `taker` takes the leaf's gradient in
    rows; `bring` yields the weight's rows, span by span, on the device; `norm`: whether rows are
    normalised."""

    dtype: torch.dtype
    z_loss_weight: float = 0.0
    start: int = 0
    taker: TakesRows | None = None
    bring: Bring = there
    norm: bool = True
    observer: Observer = Observer()
    """Is told where each turn of a loop over chunks begins."""


class FusedHeadLoss(torch.autograd.Function):
    """hidden (n, H), weight (V, H), labels (n,) already moved, -100 where nothing is to be
    predicted -> mean loss, 0-d.

    `leaf` is what trains: the weight itself, rows of it that share its storage, or None. Gradients
    go to hidden and leaf.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, leaf: Tensor | None, labels: Tensor, options: Options
    ) -> Tensor:
        head, trains = _Head(hidden, weight, labels, options), ctx.needs_input_grad[2]
        # a sum over chunks of tokens, rounded to the leaf's type at each, is worse than one
        # product's where they are many
        rounds = trains and options.taker is None and leaf.itemsize < 4
        cut = Cut(*weight.shape, head.hidden.itemsize)
        cut = replace(cut, whole_up_to=MOST_ROUNDINGS * cut.tokens_at_once) if rounds else cut
        ctx.options = options
        ctx.in_rows = (
            len(hidden) > cut.whole_up_to if rounds else trains and options.taker is not None
        )
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dleaf = torch.empty_like(leaf) if trains and not ctx.in_rows else None
        seen = head.look(dhidden, dleaf, cut)
        ctx.save_for_backward(
            dhidden,
            dleaf,
            leaf if trains else None,
            head.norm,
            *((hidden, weight, labels, *seen) if ctx.in_rows else ()),
        )
        return head.mean(*seen)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        dhidden, dleaf, leaf, norm, *rest = ctx.saved_tensors
        # in place, unless someone wants backward a second time
        if torch._C._autograd._get_current_graph_task_keep_graph():
            dhidden, dleaf = (grad if grad is None else grad.clone() for grad in (dhidden, dleaf))
        if ctx.in_rows:
            hidden, weight, labels, *seen = rest
            head = _Head(hidden, weight, labels, ctx.options, norm)
            cut = Cut(*weight.shape, head.hidden.itemsize, len(leaf))
            pieces = cut.spans(len(hidden))
            dleaf = _in_rows(
                leaf,
                ctx.options.taker,
                head.row_gradient(leaf, seen, upstream, pieces),
                Chunks(cut, len(hidden), ctx.options.observer),
            )
        elif dleaf is not None:
            for a, b in spans(len(leaf), _rows_at_once(*leaf.shape, 0)):
                dleaf[a:b] = _through_norm(
                    dleaf[a:b], leaf[a:b], norm, ctx.options.start + a, upstream
                )
        if dhidden is not None:
            dhidden.mul_(upstream)
        return dhidden, None, dleaf, None, None


def _in_rows(
    leaf: Tensor,
    taker: TakesRows | None,
    gradient: Callable[[int, int], Tensor],
    chunks: Chunks,
) -> Tensor | None:
    """The leaf's gradient, formed some rows at a time: whole, unless someone takes the rows."""
    if taker is not None:
        return feed(taker, leaf, chunks, gradient)
    whole = torch.empty_like(leaf)
    for a, b in chunks:
        whole[a:b] = gradient(a, b)
    return whole


def _rows_at_once(vocabulary: int, hidden: int, tokens: int) -> int:
    """How many rows to form the gradient of at once: some fp32 copies of them, and of their
    logits."""
    return max(LEAST_ROWS, int(HELD * 2 * (vocabulary * hidden) / (16 * (hidden + tokens))))


def _through_norm(
    d: Tensor, rows: Tensor, norm: Tensor | None, first: int, upstream: Tensor
) -> Tensor:
    """d (R, H), the gradient of the normalised rows divided by their length -> upstream * the
    gradient of the rows, wide. `norm` (V,) of all rows, of which these begin with number `first`;
    None where they are not normalised.
    """
    if norm is None:
        return d.to(upstream.dtype) * upstream
    norm = norm[first : first + len(d)]
    unit = rows.to(norm.dtype) / norm.clamp_min(EPS)[:, None]
    d = d.to(norm.dtype)
    radial = torch.linalg.vecdot(d, unit) * (norm >= EPS)
    return unit.mul_(radial[:, None]).sub_(d).mul_(-upstream)


class _Head:
    """One head over one set of tokens: what forward and backward both compute."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: Options,
        norm: Tensor | None = None,
    ):
        self.hidden, self.weight, self.labels, self.options = (
            hidden.to(options.dtype),
            weight,
            labels,
            options,
        )
        self.wide = torch.promote_types(options.dtype, torch.float32)
        # the weight is multiplied as it is, unless its rows have to be brought here, or copied to
        # another type, first
        self.copies = (
            options.bring is not there
            or weight.dtype != options.dtype
            or (rounding.active() and options.dtype in rounding.HALVES)
        )
        self.row_spans = spans(len(weight), ROWS)
        self.norm = self._norms() if norm is None and options.norm else norm
        self.length = (
            self.hidden.new_ones(len(weight), dtype=self.wide)
            if self.norm is None
            else self.norm.clamp_min(EPS)
        )
        self.labelled = labels != IGNORED
        self.count = self.labelled.sum().clamp_(
            min=1
        )  # of no labels the loss is 0, and so is every gradient

    def _norms(self) -> Tensor:
        return torch.cat(
            [
                torch.linalg.vector_norm(rows, dim=1, dtype=self.wide)
                for _, _, rows in self._rows(self.row_spans)
            ]
        )

    def _rows(self, pieces: Spans) -> Iterator[tuple[int, int, Tensor]]:
        return (
            (a, b, rows)
            for (a, b), rows in zip(pieces, self.options.bring(self.weight, pieces), strict=True)
        )

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, rounded to the type of products first; the result not rounded where it is
        formed in fp32."""
        left, right = left.to(self.options.dtype), right.to(self.options.dtype)
        return left.to(self.wide) @ right.to(self.wide) if rounding.active() else left @ right

    def _products(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """h W^T for some rows, rounded to the type of products. F.linear, which a CPU may have
        replaced, see `rounding`."""
        return F.linear(hidden, rows.to(self.options.dtype))

    def _all_products(self, hidden: Tensor) -> Tensor:
        if not self.copies:
            return self._products(hidden, self.weight)
        products = hidden.new_empty(len(hidden), len(self.weight))
        for a, b, rows in self._rows(self.row_spans):
            products[:, a:b] = self._products(hidden, rows)
        return products

    def look(self, dhidden: Tensor | None, dleaf: Tensor | None, cut: Cut) -> tuple[Tensor, ...]:
        """Fills the gradients that are wanted. Returns, each (n,): the highest logit, the sum of
        exp(logit - highest), the label's logit, and where the highest is (0 without max-z, where
        nobody asks)."""
        seen = []
        for first, last in Chunks(cut, len(self.hidden), self.options.observer):
            tokens = slice(first, last)
            products = self._all_products(self.hidden[tokens])
            seen.append(self._look_at(products, self.labels[tokens]))
            if dhidden is not None or dleaf is not None:
                self._form(tokens, products, seen[-1], dhidden, dleaf)
            del products  # before the next chunk's
        return tuple(torch.cat(parts) for parts in zip(*seen, strict=True))

    def _look_at(self, products: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        highest = torch.full_like(labels, -torch.inf, dtype=self.wide)
        total, wanted, place = (
            torch.zeros_like(highest),
            torch.zeros_like(highest),
            torch.zeros_like(labels),
        )
        for a, b in self.row_spans:
            logits = products[:, a:b] / self.length[a:b]
            column, here = _column(labels, a, b)
            wanted += logits.gather(1, column)[:, 0] * here
            top = logits.amax(1)
            if self.options.z_loss_weight:
                place = torch.where(top > highest, a + logits.argmax(1), place)
            before, highest = highest, highest.maximum(top)
            total = total * (before - highest).exp() + logits.sub_(highest[:, None]).exp_().sum(1)
        return highest, total, wanted, place

    def mean(self, highest: Tensor, total: Tensor, wanted: Tensor, place: Tensor) -> Tensor:
        each = highest - wanted + total.log()
        if self.options.z_loss_weight:
            each += self.options.z_loss_weight * highest.square()
        return each.mul(self.labelled).sum() / self.count

    def _dproducts(
        self, products: Tensor, a: int, tokens: slice, seen: tuple[Tensor, ...]
    ) -> Tensor:
        """Products (n, R) with rows from a on -> the gradient of the loss by them, wide."""
        highest, total, _, place = seen
        b, labelled = a + products.shape[1], self.labelled[tokens].to(self.wide)
        # softmax, and 0 where nothing is to be predicted
        grad = (
            torch.addcdiv(highest.neg()[:, None], products, self.length[a:b])
            .exp_()
            .mul_((labelled / total)[:, None])
        )
        column, here = _column(self.labels[tokens], a, b)
        grad.scatter_add_(1, column, here.to(self.wide).neg()[:, None])
        if self.options.z_loss_weight:
            column, here = _column(place, a, b)
            grad.scatter_add_(
                1, column, (2 * self.options.z_loss_weight * highest * labelled * here)[:, None]
            )
        return grad.mul_((self.length[a:b] * self.count).reciprocal())

    def _form(
        self,
        tokens: slice,
        products: Tensor,
        seen: tuple[Tensor, ...],
        dhidden: Tensor | None,
        dleaf: Tensor | None,
    ) -> None:
        """The chunk's gradients: its own dh, and its part of d. `products` becomes the gradient by
        itself."""
        for a, b in self.row_spans:
            products[:, a:b] = self._dproducts(products[:, a:b], a, tokens, seen)
        if dhidden is not None:
            dhidden[tokens] = self._dhidden(products)
        if dleaf is not None:
            self._add_to(dleaf, products, tokens)

    def _dhidden(self, dproducts: Tensor) -> Tensor:
        if not self.copies:
            return dproducts @ self.weight
        summed = torch.zeros(
            len(dproducts), self.weight.shape[1], dtype=self.wide, device=dproducts.device
        )
        for a, b, rows in self._rows(self.row_spans):
            summed += self._matmul(dproducts[:, a:b], rows)
        return summed

    def _add_to(self, dleaf: Tensor, dproducts: Tensor, tokens: slice) -> None:
        hidden, first = self.hidden[tokens], tokens.start == 0
        dproducts = dproducts[:, self.options.start : self.options.start + len(dleaf)].mT
        if not self.copies:  # one rounding a chunk
            dleaf.addmm_(dproducts, hidden, beta=0 if first else 1)
            return
        for a, b in spans(len(dleaf), ROWS):
            part = self._matmul(dproducts[a:b], hidden)
            dleaf[a:b] = part if first else part + dleaf[a:b]

    def row_gradient(
        self, leaf: Tensor, seen: list[Tensor], upstream: Tensor, pieces: Spans
    ) -> Callable[[int, int], Tensor]:
        """(a, b) -> rows a:b of the leaf's gradient, from products formed again; asked for
        `pieces`, in their order, any number of times."""
        start, coming = self.options.start, iter(())

        def gradient(a: int, b: int) -> Tensor:
            nonlocal coming
            if a == 0:  # a sweep begins
                coming = self._rows([(start + first, start + last) for first, last in pieces])
            _, _, rows = next(coming)
            dproducts = self._dproducts(
                self._products(self.hidden, rows), start + a, slice(None), seen
            )
            d = self._matmul(dproducts.mT, self.hidden)
            return _through_norm(d, rows, self.norm, start + a, upstream).to(leaf.dtype)

        return gradient


def _column(labels: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Where in columns a:b each label is (n, 1), and whether it is there at all (n,)."""
    local = labels - a
    return local.clamp(0, b - a - 1)[:, None], (local >= 0) & (local < b - a)
