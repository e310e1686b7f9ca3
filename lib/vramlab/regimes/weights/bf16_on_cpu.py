"""Products in half types on a CPU: operands and results in bf16 or fp16, each product formed in
fp32 and rounded once.

Tensor cores do the same: they add up in fp32 and round the result. For bf16 this stands in where
the CPU has no bf16 units, and is 10 to 50 times faster than torch's kernels there. For fp16 it is
always used, because a CPU's fp16 units may add up in fp16. Autograd saves operands in their half
type; the fp32 operands are temporaries of a call.

The patch covers the two functions with which the model multiplies, `F.linear` and
`F.scaled_dot_product_attention`, and only inside the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
_native_linear, _native_attention = F.linear, F.scaled_dot_product_attention


class RoundedLinear(torch.autograd.Function):
    """y = round(x W^T), dx = round(dy W), dW = round(dy^T x), each formed in `wide` from operands
    in their own type.

    Shapes: x (..., I), weight (O, I) -> (..., O). Saves x and weight in their own type.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = wide
        return _native_linear(x.to(wide), weight.to(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        wide_dy = dy.to(ctx.wide)
        dx = (wide_dy @ weight.to(ctx.wide)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = (
            (wide_dy.flatten(0, -2).mT @ x.to(ctx.wide).flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return dx, dweight, None


class RoundedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + mask) v formed in `wide` and rounded once.

    Saves q, k and v in their own type and forms the attention again in backward, as flash attention
    does. The mask gets no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        wide: torch.dtype,
    ):
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal, ctx.wide = is_causal, wide
        return _wide_attention(query, key, value, mask, is_causal, wide).to(query.dtype)

    @staticmethod
    def backward(ctx, dout: Tensor):
        query, key, value, mask = ctx.saved_tensors
        leaves = [t.detach().to(ctx.wide).requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            out = _wide_attention(leaves[0], leaves[1], leaves[2], mask, ctx.is_causal, ctx.wide)
        grads = torch.autograd.grad(out, leaves, dout.to(ctx.wide))
        return (*(grad.to(query.dtype) for grad in grads), None, None, None)


def _wide_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    wide: torch.dtype,
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(wide)
    return _native_attention(
        query.to(wide), key.to(wide), value.to(wide), attn_mask=mask, is_causal=is_causal
    )


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """The operands as autocast would cast them for the product. Unlike autocast it keeps no copies
    of weights."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = _as_autocast(x, weight)
    if x.dtype not in HALVES or weight.dtype != x.dtype or bias is not None:
        return _native_linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return RoundedLinear.apply(x, weight, torch.float32)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs
) -> Tensor:
    query, key, value = _as_autocast(query, key, value)
    if query.dtype not in HALVES or dropout_p or kwargs:
        return _native_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return RoundedAttention.apply(query, key, value, attn_mask, is_causal, torch.float32)


def active() -> bool:
    """Whether products of half types are formed in fp32 now."""
    return F.linear is _linear


@contextmanager
def halves_formed_in_fp32() -> Iterator[None]:
    """Inside, `F.linear` and attention of half types on the CPU are formed in fp32 and rounded, in
    forward and in backward."""
    before = F.linear, F.scaled_dot_product_attention
    F.linear, F.scaled_dot_product_attention = _linear, _attention
    try:
        yield
    finally:
        F.linear, F.scaled_dot_product_attention = before
