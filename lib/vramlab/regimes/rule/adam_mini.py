"""Adam-mini: Adam with one second moment for each block of weights that learn alike. Adam has one
for each weight.

v is the running mean of g^2 over a block; m stays whole. Zhang 2024, arXiv:2406.16793, with its
blocks, for this network:

    W_pack        its rows are [Q | K | V]: of Q and K one v a head (head_dim rows), of V one a row
    o_proj, MLP, adapters    one a row, which is an output neuron
    embeddings, head         one a row, which is a token
    norms                    one a tensor

The published code knows Q and K by their names, finds neither in a packed projection, and gives the
whole of it one v: the partition that its authors call unstable. State: m as long as the weight, and
4 bytes a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharded import local
from .sliced import LeafContext, RowOptimizer


def _packed_rows(leaf: Tensor, context: LeafContext) -> int:
    """Rows of a leaf in which `head_dim` rows share a v: the Q and K of a packed projection."""
    packed = context.names.get(id(leaf), "").endswith("W_pack.weight")
    return local(leaf).shape[0] // 3 * 2 if packed else 0


def _count_blocks(leaf: Tensor, context: LeafContext) -> int:
    packed = _packed_rows(leaf, context)
    rows = local(leaf).shape[0] - packed + packed // (context.head_dim or 1)
    return rows if leaf.dim() > 1 else 1


class AdamMini(RowOptimizer):
    """Two sweeps: the mean square of each row, which makes v; then the update."""

    sweeps = 2

    def add_state(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        dtype, blocks = (
            self.context.storage.moments_dtype(weight),
            _count_blocks(leaf, self.context),
        )
        entry["exp_avg"] = torch.zeros_like(weight, dtype=dtype)
        entry["exp_avg_sq"] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)

    @staticmethod
    def leaf_bytes(leaf: Tensor, context: LeafContext) -> int:
        weight = local(leaf)
        moments_dtype = context.storage.moments_dtype(weight)
        return weight.numel() * moments_dtype.itemsize + 4 * _count_blocks(leaf, context)

    def new_scratch(self, leaf: Tensor, weight: Tensor, entry: dict) -> dict[str, Any]:
        return {"square": torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)}

    def measure(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        self._scratch[leaf]["square"][rows] = (
            gradient.square().flatten(1).mean(1) if gradient.dim() > 1 else gradient.square()
        )

    def finish_sweep(self, leaf: Tensor, sweep: int) -> None:
        entry, options, scratch = self.state[leaf], self.options, self._scratch[leaf]
        square, packed = scratch["square"], _packed_rows(leaf, self.context)
        head_dim = self.context.head_dim or 1
        if leaf.dim() == 1:
            mean = square.mean(0, keepdim=True)
        else:
            heads = square[:packed].view(-1, head_dim).mean(1)
            mean = torch.cat((heads, square[packed:]))
        entry["exp_avg_sq"].lerp_(mean, 1 - options["beta2"])
        correction = 1 - options["beta2"] ** entry["step"]
        root = entry["exp_avg_sq"].div(correction).sqrt_().add_(options["eps"])
        if leaf.dim() > 1:
            root = torch.cat((root[: len(heads)].repeat_interleave(head_dim), root[len(heads) :]))
        scratch["root"] = root.expand(len(square)).view(-1, *[1] * (leaf.dim() - 1))

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        entry, options = self.state[leaf], self.options
        stored = entry["exp_avg"][rows]
        moment = stored.float().lerp_(gradient, 1 - options["beta1"])  # fp32 ones are not copied
        if stored.dtype != moment.dtype:
            stored.copy_(moment)
        wide.mul_(1 - options["lr"] * options["weight_decay"])
        step_size = options["lr"] / (1 - options["beta1"] ** entry["step"])
        wide.addcdiv_(moment, self._scratch[leaf]["root"][rows], value=-step_size)
