"""NormHead and cross-entropy as one function that holds neither a normalised weight nor all logits.

Normalising the rows of W (V, H) scales the columns of the logits, so W itself is what is multiplied:

    logits = (h W^T) * s,    s_v = 1 / max(|w_v|, eps)                    eps as in F.normalize
    G = dloss/dlogits = (softmax(logits) - onehot) / labelled tokens      and 2 z max(logit) at the maximum, for max-z
    dh = (G s) W
    dw_v = d_v - (d_v . u_v) u_v,    d = (G s)^T h,    u_v = s_v w_v      second term only where |w_v| >= eps

Forward goes over chunks of tokens. The products of one chunk with all rows of W are held, in the type products are formed
in; from them come the loss, then, while they are there, the chunk's dh and its part of d: so nothing is formed twice, and
what waits for backward is dh (tokens, H) and d, which backward turns into the gradient in place. (Forming gradients in the
forward of a loss is Liger-Kernel's way, Hsu 2024, arXiv:2410.10989.) A frozen head keeps dh alone.

Where the gradient is taken in rows (see `rows`), d is not formed in forward. Backward goes over chunks of rows, forms
their logits again from the kept log-sum-exp, and hands over their gradient: one more product of the head's size a sweep.
The recomputation from log-sum-exp is that of cut cross-entropy, Wijmans 2024, arXiv:2411.09009.

Not exact: in half types d is rounded once for each chunk of tokens. Logits and loss are formed in fp32 (fp64 in fp64) from
products rounded to their type, as the plain head's are; the plain head also rounds the normalised weight.

Shapes: n tokens, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rows import TakesRows, feed, spans

EPS = 1e-12
"""Least length a row is divided by: the default of `F.normalize`."""
IGNORED = -100
ROWS_BYTES = 64 << 20
"""Most bytes of a chunk of rows of the weight in fp32."""
LEAST_ROWS, LEAST_PRODUCTS = 64, 4 << 20
"""Rows of a chunk, and products of a chunk of tokens: smaller ones save no bytes worth their time."""
HELD = 0.15
"""Most of the weight's size in bf16 that a chunk's products with all rows may have."""


@dataclass(frozen=True)
class Options:
    """What of the function is not a tensor. `dtype` is the type products are formed in; `start` the row of the weight that
    is the first of the trained leaf; `taker` takes the leaf's gradient in rows."""

    dtype: torch.dtype
    z_loss_weight: float = 0.0
    start: int = 0
    taker: TakesRows | None = None


class FusedHeadLoss(torch.autograd.Function):
    """hidden (n, H), weight (V, H), labels (n,) already moved, -100 where nothing is to be predicted -> mean loss, 0-d.

    `leaf` is what trains: the weight itself, rows of it that share its storage, or None. Gradients go to hidden and leaf.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, leaf: Tensor | None, labels: Tensor, options: Options) -> Tensor:
        ctx.options, ctx.hidden_dtype = options, hidden.dtype
        ctx.in_rows = ctx.needs_input_grad[2] and options.taker is not None
        head = _Head(hidden, weight, labels, options)
        dhidden = torch.zeros_like(hidden, dtype=head.wide) if ctx.needs_input_grad[0] else None
        dleaf = torch.empty_like(leaf) if ctx.needs_input_grad[2] and not ctx.in_rows else None
        seen = head.look(dhidden, dleaf)
        ctx.save_for_backward(dhidden, dleaf, None if dleaf is None and not ctx.in_rows else leaf, head.norm,
                              *((hidden, weight, labels, *seen) if ctx.in_rows else ()))
        return head.mean(*seen)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        dhidden, dleaf, leaf, norm, *rest = ctx.saved_tensors
        if ctx.in_rows:
            hidden, weight, labels, *seen = rest
            _Head(hidden, weight, labels, ctx.options, norm).hand_over(leaf, seen, upstream)
        if dleaf is not None:
            if torch._C._autograd._get_current_graph_task_keep_graph():  # someone wants backward a second time
                dleaf = dleaf.clone()
            start = ctx.options.start
            for a, b in spans(len(leaf), _rows_at_once(leaf, 0)):
                dleaf[a:b] = _through_norm(dleaf[a:b], leaf[a:b], norm[start + a : start + b], upstream)
        if dhidden is not None:
            dhidden = dhidden.mul(upstream).to(ctx.hidden_dtype)
        return dhidden, None, dleaf, None, None


def _rows_at_once(weight: Tensor, tokens: int) -> int:
    """How many rows to form the gradient of at once: some fp32 copies of them, and of their logits."""
    return max(LEAST_ROWS, int(HELD * 2 * weight.numel() / (16 * (weight.shape[-1] + tokens))))


def _through_norm(d: Tensor, rows: Tensor, norm: Tensor, upstream: Tensor | float = 1.0) -> Tensor:
    """d (R, H), the gradient of the normalised rows divided by their length -> the gradient of the rows, in d's type."""
    wide = norm.dtype
    unit = rows.to(wide) * _inverse(norm)[:, None]
    grad = d.to(wide)
    radial = torch.linalg.vecdot(grad, unit) * (norm >= EPS)
    return unit.mul_(radial[:, None]).sub_(grad).mul_(-upstream).to(d.dtype)


def _inverse(norm: Tensor) -> Tensor:
    return norm.clamp_min(EPS).reciprocal()


class _Head:
    """One head over one set of tokens: what forward and backward both compute."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, options: Options, norm: Tensor | None = None):
        self.hidden, self.weight, self.labels, self.options = hidden.to(options.dtype), weight, labels, options
        self.wide = torch.promote_types(options.dtype, torch.float32)
        self.row_spans = spans(len(weight), max(LEAST_ROWS, ROWS_BYTES // (4 * weight.shape[1])))
        self.norm = self._norms() if norm is None else norm
        self.scale = _inverse(self.norm)
        labelled = labels != IGNORED
        self.share = labelled.to(self.wide) / labelled.sum()

    def _norms(self) -> Tensor:
        parts = [torch.linalg.vector_norm(self.weight[a:b], dim=1, dtype=self.wide) for a, b in self.row_spans]
        return torch.cat(parts)

    def _products(self, hidden: Tensor, a: int, b: int) -> Tensor:
        """h W^T for rows a:b, rounded to the type of products. F.linear, which a CPU may have replaced, see `rounding`."""
        return F.linear(hidden, self.weight[a:b].to(self.options.dtype))

    def _tokens_at_once(self) -> int:
        vocabulary, hidden_size = self.weight.shape
        return max(int(HELD * 2 * hidden_size / self.hidden.itemsize), LEAST_PRODUCTS // vocabulary)

    def look(self, dhidden: Tensor | None, dleaf: Tensor | None) -> tuple[Tensor, ...]:
        """Fills the gradients that are wanted. Returns, each (n,): log-sum-exp and the label's logit, and with max-z the
        highest logit and how many share it."""
        seen = []
        for first, last in spans(len(self.hidden), self._tokens_at_once()):
            tokens = slice(first, last)
            products = None
            if dhidden is not None or dleaf is not None:
                products = self.hidden.new_empty(last - first, len(self.weight))
            seen.append(self._look_at(tokens, products))
            if products is not None:
                self._form(tokens, products, seen[-1], dhidden, dleaf)
        return tuple(torch.cat(parts) for parts in zip(*seen, strict=True))

    def _look_at(self, tokens: slice, products: Tensor | None) -> tuple[Tensor, ...]:
        """One chunk of tokens against all rows; keeps the products if there is room for them."""
        hidden, labels = self.hidden[tokens], self.labels[tokens]
        lse = torch.full_like(labels, -torch.inf, dtype=self.wide)
        highest, ties, wanted = lse, torch.zeros_like(lse), torch.zeros_like(lse)
        for a, b in self.row_spans:
            formed = self._products(hidden, a, b)
            if products is not None:
                products[:, a:b] = formed
            logits = formed * self.scale[a:b]
            column, here = _column(labels, a, b)
            wanted += logits.gather(1, column[:, None])[:, 0] * here
            lse = torch.logaddexp(lse, logits.logsumexp(1))
            if self.options.z_loss_weight:
                highest, ties = _highest(highest, ties, logits)
        return (lse, wanted, highest, ties) if self.options.z_loss_weight else (lse, wanted)

    def mean(self, lse: Tensor, wanted: Tensor, highest: Tensor | None = None, ties: Tensor | None = None) -> Tensor:
        loss = (lse - wanted).mul(self.share).sum()
        return loss if highest is None else loss + self.options.z_loss_weight * highest.square().mul(self.share).sum()

    def _dproducts(self, formed: Tensor, a: int, labels: Tensor, seen: tuple[Tensor, ...], share: Tensor) -> Tensor:
        """Products (n, R) with rows from a on -> the gradient of the loss by them, in their type."""
        lse, _, *maximum = seen
        scale = self.scale[a : a + formed.shape[1]]
        logits = formed * scale
        extra = None
        if maximum:  # the maximum's gradient is shared between equals, as amax shares it
            extra = (logits == maximum[0][:, None]) * (2 * self.options.z_loss_weight * maximum[0] / maximum[1])[:, None]
        grad = logits.sub_(lse[:, None]).exp_()
        column, here = _column(labels, a, a + formed.shape[1])
        grad.scatter_add_(1, column[:, None], -here.to(grad.dtype)[:, None])
        if extra is not None:
            grad += extra
        return grad.mul_(share[:, None]).mul_(scale).to(formed.dtype)

    def _form(self, tokens: slice, products: Tensor, seen: tuple[Tensor, ...], dhidden: Tensor | None,
              dleaf: Tensor | None) -> None:
        hidden, labels, share, start = self.hidden[tokens], self.labels[tokens], self.share[tokens], self.options.start
        for a, b in self.row_spans:
            d = self._dproducts(products[:, a:b], a, labels, seen, share)
            if dhidden is not None:
                dhidden[tokens] += F.linear(d, self.weight[a:b].to(d.dtype).mT)
            low, high = (max(a, start), min(b, start + len(dleaf))) if dleaf is not None else (0, 0)
            if low < high:
                rows, part = dleaf[low - start : high - start], F.linear(d[:, low - a : high - a].mT, hidden.mT)
                rows.copy_(part) if tokens.start == 0 else rows.add_(part)

    def hand_over(self, leaf: Tensor, seen: list[Tensor], upstream: Tensor) -> None:
        """The leaf's gradient, some rows at a time, to whoever takes them."""
        share, start = self.share * upstream, self.options.start

        def gradient(a: int, b: int) -> Tensor:
            formed = self._products(self.hidden, start + a, start + b)
            d = self._dproducts(formed, start + a, self.labels, seen, share)
            rows = F.linear(d.mT, self.hidden.mT).to(leaf.dtype)
            return _through_norm(rows, leaf[a:b], self.norm[start + a : start + b])

        feed(self.options.taker, leaf, spans(len(leaf), _rows_at_once(self.weight, len(self.hidden))), gradient)


def _column(labels: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Where in columns a:b each label is, and whether it is there at all."""
    local = labels - a
    return local.clamp(0, b - a - 1), (local >= 0) & (local < b - a)


def _highest(highest: Tensor, ties: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit so far and how many are as high."""
    here = logits.amax(1)
    count = (logits == here[:, None]).sum(1)
    above, equal = here > highest, here == highest
    return here.maximum(highest), torch.where(above, count, ties + count * equal)


class FusedLoss:
    """What a `NormHead` calls in place of forming logits. `leaf`, `start`, `taker`: what trains, see `Options`; without a
    leaf it is the weight, if that trains."""

    def __init__(self):
        self.trains(None)

    def trains(self, leaf: Tensor | None, start: int = 0, taker: TakesRows | None = None) -> None:
        self.leaf, self.start, self.taker = leaf, start, taker

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight: float) -> Tensor:
        """hidden (b, t, H), weight (V, H), labels (b, t) already moved -> mean loss, fp32."""
        device_type, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        leaf = weight if self.leaf is None and weight.requires_grad else self.leaf
        if not torch.is_grad_enabled():
            hidden, leaf = hidden.detach(), None
        with torch.autocast(device_type, enabled=False):
            return FusedHeadLoss.apply(hidden.flatten(0, -2), weight.detach(), leaf, labels.flatten(),
                                       Options(dtype, z_loss_weight, self.start, self.taker))
