"""Adafactor and AdaLomo: a second moment of rows + columns numbers instead of rows x columns.

Of a matrix's squared gradient only the means of rows and of columns are kept, in fp32, and their
product over the mean of all stands for it: v_ij = r_i c_j / mean(r). The update u = g / sqrt(v) is
divided by max(1, RMS(u)), so that no matrix moves by more than one unit of its own scale, and the
step is lr * max(1e-3, RMS(w)): relative to the weight's size. Vectors keep all of v. Memory of the
past fades as 1 - t^-0.8. Shazeer 2018, arXiv:1804.04235 (Adafactor); Lv 2023, arXiv:2310.10195
(AdaLomo).

Three sweeps over the gradient: r and c; then RMS(u), which needs all of them; then the update. All
in fp32. So a bf16 run differs from torch's Adafactor, which forms all this in bf16 and bounds
sqrt(v) by that type's 2^-7, far above a language model's gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharded import local
from ..weights.storage import MASTER
from .sliced import LeafContext, RowOptimizer


class Factored(RowOptimizer):
    """Options: `decay`; `added` to each squared gradient; `least_mean`, the least mean of r to
    divide by; `most_root`, the bound of 1 / sqrt(v); `least_rms` of a weight; `most_rms` of an
    update; `relative`, whether lr is at most 1 / sqrt(t), and `weight_decay` of lr alone."""

    sweeps = 3

    def add_state(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        matrix = {"row_var": weight.shape[:1], "col_var": weight.shape[1:]}
        vector = {"variance": weight.shape}
        for name, shape in (matrix if weight.dim() > 1 else vector).items():
            entry[name] = torch.zeros(shape, dtype=torch.float32, device=weight.device)

    @staticmethod
    def leaf_bytes(leaf: Tensor, context: LeafContext) -> int:
        return 4 * (sum(local(leaf).shape) if leaf.dim() > 1 else local(leaf).numel())

    def new_scratch(self, leaf: Tensor, weight: Tensor, entry: dict) -> dict[str, Any]:
        columns = {"columns": torch.zeros_like(entry["col_var"])} if "col_var" in entry else {}
        square = torch.zeros((), dtype=torch.float32, device=weight.device)
        return {**columns, "update_square": square, "new": entry["step"] ** self.options["decay"]}

    def measure(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        entry, scratch = self.state[leaf], self._scratch[leaf]
        if sweep == 1:
            scratch["update_square"].add_(self._direction(leaf, rows, gradient).square_().sum())
            return
        square = gradient.square()
        if self.options["added"]:
            square.add_(self.options["added"])
        if "variance" in entry:
            entry["variance"][rows].lerp_(square, scratch["new"])
        else:
            entry["row_var"][rows].lerp_(square.mean(-1), scratch["new"])
            scratch["columns"].add_(square.sum(0))

    def finish_sweep(self, leaf: Tensor, sweep: int) -> None:
        entry, scratch, options = self.state[leaf], self._scratch[leaf], self.options
        if sweep == 1:
            self._set_factor(leaf, scratch, options)
        elif "variance" in entry:
            scratch["root"] = entry["variance"].rsqrt().clamp_(max=options["most_root"])
        else:
            entry["col_var"].lerp_(scratch.pop("columns").div_(leaf.shape[0]), scratch["new"])
            scratch["row_root"] = (
                entry["row_var"] / entry["row_var"].mean().clamp_(min=options["least_mean"])
            ).rsqrt_()
            scratch["col_root"] = entry["col_var"].rsqrt()

    def _set_factor(self, leaf: Tensor, scratch: dict[str, Any], options: dict) -> None:
        """The factor of the direction in the update, and the share of the weight that decay
        leaves."""
        entry = self.state[leaf]
        lr = min(options["lr"], entry["step"] ** -0.5) if options["relative"] else options["lr"]
        # summed in fp32 while it is read: no fp32 copy of the weight
        weight_rms = torch.linalg.vector_norm(
            entry.get(MASTER, local(leaf)), dtype=torch.float32
        ).div_(leaf.numel() ** 0.5)
        update_rms = (scratch["update_square"] / leaf.numel()).sqrt_()
        scratch["factor"] = (
            lr
            * weight_rms.clamp_(min=options["least_rms"])
            / (update_rms / options["most_rms"]).clamp_(min=1)
        )
        if options["weight_decay"]:
            scratch["kept"] = 1 - options["weight_decay"] * (
                options["lr"] if options["relative"] else lr * weight_rms
            )

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        if self.options["weight_decay"]:
            wide.mul_(self._scratch[leaf]["kept"])
        wide.sub_(self._direction(leaf, rows, gradient).mul_(self._scratch[leaf]["factor"]))

    def _direction(self, leaf: Tensor, rows: slice, gradient: Tensor) -> Tensor:
        """g / sqrt(v) of a slice. Multiplies two roots, because the product of r and c could
        underflow."""
        scratch = self._scratch[leaf]
        if "root" in scratch:
            return scratch["root"][rows] * gradient
        root = scratch["row_root"][rows][:, None] * scratch["col_root"]
        return root.clamp_(max=self.options["most_root"]).mul_(gradient)
