"""Adam-mini: Adam with one second moment a block of weights that learn alike, in place of one a
weight.

v is the running mean of g^2 over a block; m stays whole. Zhang 2024, arXiv:2406.16793, with its
blocks, for this network:

    W_pack        its rows are [Q | K | V]: of Q and K one v a head (head_dim rows), of V one a row
    o_proj, MLP, adapters    one a row, which is an output neuron
    embeddings, head         one a row, which is a token
    norms                    one a tensor

The published code knows Q and K by their names, finds none in a packed projection, and gives the
whole of it one v: the partition its authors call unstable. State: m as long as the weight, and 4
bytes a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharded import local
from .sliced import Fit, RowWise


def packed_rows(leaf: Tensor, fit: Fit) -> int:
    """Rows of a leaf in which `head_dim` rows share a v: the Q and K of a packed projection."""
    packed = fit.names.get(id(leaf), "").endswith("W_pack.weight")
    return local(leaf).shape[0] // 3 * 2 if packed else 0


def blocks(leaf: Tensor, fit: Fit) -> int:
    weight, packed = local(leaf), packed_rows(leaf, fit)
    return (
        weight.shape[0] - packed + (packed // fit.head_dim if packed else 0)
        if weight.dim() > 1
        else 1
    )


class AdamMini(RowWise):
    """Two sweeps: the mean square of each row, which makes v; then the update."""

    sweeps = 2

    def start(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        entry["exp_avg"] = torch.zeros_like(weight, dtype=self.fit.storage.moments_dtype(weight))
        entry["exp_avg_sq"] = torch.zeros(
            blocks(leaf, self.fit), dtype=torch.float32, device=weight.device
        )

    def scratch(self, leaf: Tensor, weight: Tensor, entry: dict) -> dict[str, Any]:
        return {"square": torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)}

    def look(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        self._scratch[leaf]["square"][rows] = (
            gradient.square().flatten(1).mean(1) if gradient.dim() > 1 else gradient.square()
        )

    def settle(self, leaf: Tensor, sweep: int) -> None:
        entry, options, square, packed = (
            self.state[leaf],
            self.options,
            self._scratch[leaf]["square"],
            packed_rows(leaf, self.fit),
        )
        if leaf.dim() == 1:
            mean = square.mean(0, keepdim=True)
        else:
            heads = square[:packed].view(-1, self.fit.head_dim or 1).mean(1)
            mean = torch.cat((heads, square[packed:]))
        entry["exp_avg_sq"].lerp_(mean, 1 - options["beta2"])
        root = (
            entry["exp_avg_sq"]
            .div(1 - options["beta2"] ** entry["step"])
            .sqrt_()
            .add_(options["eps"])
        )
        if leaf.dim() > 1:
            root = torch.cat(
                (root[: len(heads)].repeat_interleave(self.fit.head_dim or 1), root[len(heads) :])
            )
        self._scratch[leaf]["root"] = root.expand(len(square)).view(-1, *[1] * (leaf.dim() - 1))

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        entry, options = self.state[leaf], self.options
        kept = entry["exp_avg"][rows]
        moment = kept.float().lerp_(
            gradient, 1 - options["beta1"]
        )  # the kept one itself where it is fp32
        if kept.dtype != moment.dtype:
            kept.copy_(moment)
        wide.mul_(1 - options["lr"] * options["weight_decay"])
        wide.addcdiv_(
            moment,
            self._scratch[leaf]["root"][rows],
            value=-options["lr"] / (1 - options["beta1"] ** entry["step"]),
        )
