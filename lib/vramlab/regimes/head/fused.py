"""NormHead and cross-entropy as one function that holds neither a normalised weight nor all logits.

Normalising the rows of W (V, H) scales the columns of the logits, so the products are formed with W
itself:

    logits = (h W^T) * s,    s_v = 1 / max(|w_v|, eps)                    eps as in F.normalize
    G = dloss/dlogits = (softmax(logits) - onehot) / labelled tokens      with max-z, 2 z max(logit)
                                                                          more at the maximum
    dh = (G s) W
    dw_v = d_v - (d_v . u_v) u_v,    d = (G s)^T h,    u_v = s_v w_v      second term only where
                                                                          |w_v| >= eps

A plain linear head is the same with s = 1 and no second term.

Forward goes over chunks of tokens. It holds the products of a chunk with all rows of W, in the
type in which products are formed. From them come the loss and, while they exist, the chunk's dh and
its part of d. So nothing is formed twice, and what waits for backward is dh (tokens, H) and d,
which backward turns into the gradient in place. (Forming gradients in the forward of a loss is
Liger-Kernel's way, Hsu 2024, arXiv:2410.10989.) A frozen head keeps dh alone.

Where the gradient is taken in rows (see `row_protocol`), forward does not form d. Backward goes
over chunks of rows, forms their logits again from what was kept of each token, the highest logit
and the sum of exponentials, and hands over their gradient: one more product of the head's size for
each sweep. (Recomputation is cut cross-entropy's way, Wijmans 2024, arXiv:2411.09009.) A gradient
in half types is formed in this way too where there are many chunks of tokens, because a sum over
them would be rounded at each.

Not exact: logits and loss are formed in fp32 (fp64 in fp64) from products rounded to their type, as
the plain head's are; the plain head also rounds the normalised weight. Where several logits are the
highest, the first gets the gradient of max-z, while torch's amax shares it among them: in half
types, where that is common, the two differ by chance.

Shapes: n tokens, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..until.row_protocol import TakesRows, feed, spans
from .chunked_logits import ChunkedLogits, Options, gradient_through_norm
from .chunks import MOST_ROUNDINGS, Chunks, Cut, rows_at_once


class FusedHeadLoss(torch.autograd.Function):
    """hidden (n, H), weight (V, H), labels (n,) already moved, -100 where nothing is to be
    predicted -> mean loss, 0-d.

    `leaf` is trained: the weight itself, rows of it that share its storage, or None. Gradients go
    to hidden and leaf.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, leaf: Tensor | None, labels: Tensor, options: Options
    ) -> Tensor:
        head, trains = ChunkedLogits(hidden, weight, labels, options), ctx.needs_input_grad[2]
        cut, ctx.options = Cut(len(weight), weight.shape[1], head.hidden.itemsize), options
        ctx.in_rows = trains and options.row_receiver is not None
        # over many chunks of tokens, a sum that is rounded to the leaf's type at each is worse than
        # one product
        if trains and not ctx.in_rows and leaf is not None and leaf.itemsize < 4:
            cut = replace(cut, rounded_sum_token_limit=MOST_ROUNDINGS * cut.tokens_at_once)
            ctx.in_rows = len(hidden) > cut.rounded_sum_token_limit
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dleaf = torch.empty_like(leaf) if trains and not ctx.in_rows else None
        statistics = head.form(dhidden, dleaf, cut)
        ctx.save_for_backward(
            dhidden,
            dleaf,
            leaf if trains else None,
            head.norm,
            *((hidden, weight, labels, *statistics) if ctx.in_rows else ()),
        )
        return head.mean_loss(*statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        dhidden, dleaf, leaf, norm, *rest = ctx.saved_tensors
        # in place, unless backward may run a second time
        if torch._C._autograd._get_current_graph_task_keep_graph():
            dhidden, dleaf = (grad if grad is None else grad.clone() for grad in (dhidden, dleaf))
        if ctx.in_rows:
            hidden, weight, labels, *statistics = rest
            head = ChunkedLogits(hidden, weight, labels, ctx.options, norm)
            cut = Cut(len(weight), weight.shape[1], head.hidden.itemsize, len(leaf))
            dleaf = _in_rows(
                leaf,
                ctx.options.row_receiver,
                head.row_gradient(leaf, statistics, upstream, cut.spans(len(hidden))),
                Chunks(cut, len(hidden), ctx.options.observer),
            )
        elif dleaf is not None:
            for a, b in spans(len(leaf), rows_at_once(len(leaf), leaf.shape[1], 0)):
                dleaf[a:b] = gradient_through_norm(
                    dleaf[a:b], leaf[a:b], norm, ctx.options.start + a, upstream
                )
        if dhidden is not None:
            dhidden.mul_(upstream)
        return dhidden, None, dleaf, None, None


def _in_rows(
    leaf: Tensor,
    row_receiver: TakesRows | None,
    gradient: Callable[[int, int], Tensor],
    chunks: Chunks,
) -> Tensor | None:
    """The leaf's gradient, formed some rows at a time; None where the receiver got the rows."""
    if row_receiver is not None:
        feed(row_receiver, leaf, chunks, gradient)
        return None
    whole = torch.empty_like(leaf)
    for a, b in chunks:
        whole[a:b] = gradient(a, b)
    return whole
