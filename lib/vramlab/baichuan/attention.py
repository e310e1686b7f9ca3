"""Causal attention with rotary positions or ALiBi, padding and packed documents.

Shapes: b batch, h heads, q queries, k keys (k - q of them cached), d = head_dim. A 2-D attention
mask (b, k) holds 0 for padding and the number of the document (1, 2, ... from left to right)
elsewhere; the usual mask of ones is one document.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def checked_mask(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask (b, k) of integers. Raises: ValueError, for one of another shape, such as the 4-D
    masks that other models take."""
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != keys):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}: use (batch, {keys}), cached and new tokens,"
            " with 0 for padding and 1 or a document's number elsewhere; generation needs the"
            " dynamic cache, which sends no 4-D mask"
        )
    return mask.long() if mask is not None and mask.dtype == torch.bool else mask


def documents(mask: Tensor | None, position_ids: Tensor | None, cached: int = 0) -> Tensor | None:
    """The mask, with numbered documents if `position_ids` (b or 1, q) mark any: packing without a
    mask begins a document where they do not grow from one real token to the next.

    Reads the data if there are position_ids. Raises: ValueError, when a document begins after
    `cached` tokens, whose document is unknown.
    """
    if position_ids is None or (queries := position_ids.shape[1]) == 1:
        return mask
    own = torch.ones_like(position_ids) if mask is None else mask[:, -queries:]
    edges = own[:, 1:] != own[:, :-1]
    begins = (position_ids[:, 1:] <= position_ids[:, :-1]) & ~edges & (own[:, 1:] != 0)
    if not begins.any():
        return mask
    if cached:
        raise ValueError(
            f"position_ids begin again after {cached} cached tokens: run packed documents without a"
            " cache"
        )
    return F.pad(edges | begins, (1, 0)).cumsum(1).add(1) * (own != 0)


def right_padded(mask: Tensor) -> bool:
    """Whether a 0/1 mask (b, k) has its padding at the right only. Then no real token attends to
    it under causal attention, and no mask is needed. Reads the data, so call it where that is free:
    on the host."""
    return bool(
        ((mask[:, 1:] <= mask[:, :-1]).all() & (mask <= 1).all() & (mask[:, 0] == 1).all()).item()
    )


def positions(mask: Tensor) -> Tensor:
    """Position of each token within its document: (b, k) mask -> (b, k) integers. Padding does not
    count."""
    count = (mask != 0).long().cumsum(1) - 1
    running = mask.cummax(1).values
    starts = torch.ones_like(mask, dtype=torch.bool)
    starts[:, 1:] = running[:, 1:] != running[:, :-1]
    base = torch.where(starts, count, 0).cummax(1).values
    return (count - base).clamp(min=0)


def alibi_slopes(heads: int) -> Tensor:
    """(h,) fp32. A power of two: 2^(-8 i / h). Else that of the power below, then every other one
    of the power above. Press 2022, arXiv:2108.12409."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-8.0 * (i + 1) / (2 * below)) for i in range(0, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def allowed(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool (1 or b, 1, q, k): key j not after query i, in the same document, no padding. A token
    always attends to itself, so that no row is empty and padding rows give no NaN."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    visible = (column <= row)[None, None]
    if mask is not None:
        ids = mask[:, None, None, :]
        own = mask[:, None, keys - queries :, None]
        visible = visible & (ids == own) & (ids != 0) | (column == row)[None, None]
    return visible


def attention_bias(
    config,
    mask: Tensor | None,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    slopes: Tensor | None,
) -> Tensor | None:
    """The term that is added to the attention scores, or, as a bool, the positions that are
    allowed; None when plain causal attention is enough.

    Rotary: None, or bool (1 or b, 1, q, k). ALiBi: slope * (j - i), formed in fp32 and then rounded
    to `dtype`, with -inf where not allowed: (1, h, q, k), or (b, h, q, k) with a mask. The relative
    form is the same in training and evaluation; in bf16 the released evaluation code's slope * j
    rounds neighbouring positions to one value.
    """
    if config.position == "rope" and mask is None and queries == keys:
        return None
    visible = allowed(mask, queries, keys, device)
    if config.position == "rope" or slopes is None:
        return visible
    row = torch.arange(keys - queries, keys, device=device, dtype=torch.float32)[:, None]
    distance = torch.arange(keys, device=device, dtype=torch.float32)[None, :] - row
    bias = slopes[:, None, None] * distance
    return bias[None].to(dtype).masked_fill(~visible, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: (b, h, q, d), (b, h, k, d) x 2 -> (b, h, q, d)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None)


class RotaryEmbedding(nn.Module):
    """cos and sin of position * frequency, in fp32, computed once for all layers. Su 2021,
    arXiv:2104.09864. No checkpoint holds the frequencies; the model initialises this buffer, so
    that it survives loading on `meta`.
    """

    def __init__(self, config):
        super().__init__()
        self.theta, self.dim = config.rope_theta, config.head_dim
        self.inv_freq = nn.Buffer(self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        return 1.0 / self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    def _apply(self, fn, recurse: bool = True):
        """Move the buffer with the model, but never round it: in bf16 neighbouring positions would
        share an angle."""
        moved = super()._apply(fn, recurse)
        if moved.inv_freq.dtype != torch.float32:
            moved.inv_freq = moved.frequencies().to(moved.inv_freq.device)
        return moved

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(b or 1, q) -> cos, sin, each (b or 1, 1, q, d) fp32."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in fp32, rounded back: (b, h, q, d) -> same."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
