"""torch's AdamW and SGD, which here also take a gradient in rows, see `row_protocol`: the update of
a weight depends on that weight alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class TorchAdamW(torch.optim.AdamW):
    """torch's fused AdamW, which also takes rows."""

    sweeps = 1

    def begin_rows(self, leaf: Tensor) -> None:
        state = self.state[leaf]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=leaf.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(leaf), torch.zeros_like(leaf)

    @torch.no_grad()
    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        state, (group,) = self.state[leaf], self.param_groups
        beta1, beta2 = group["betas"]
        # the kernel advances the step count, which belongs to all rows: it gets a copy
        adamw(
            [leaf[start:stop]],
            [grad],
            [state["exp_avg"][start:stop]],
            [state["exp_avg_sq"][start:stop]],
            [],
            [state["step"].clone()],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def end_rows(self, leaf: Tensor) -> None:
        self.state[leaf]["step"] += 1


class TorchSgd(torch.optim.SGD):
    """torch's SGD, which also takes rows. A single tensor is updated by `rows` directly: inside
    backward each tensor has an optimizer, and what torch does around its kernel takes longer than
    a small update."""

    sweeps = 1

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        if len(group["params"]) > 1 or closure is not None:
            return super().step(closure)
        (leaf,) = group["params"]
        if leaf.grad is not None:
            self.rows(leaf, 0, len(leaf), leaf.grad, 0)

    def begin_rows(self, leaf: Tensor) -> None:
        """SGD has no state to make."""

    @torch.no_grad()
    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        (group,) = self.param_groups
        if group["weight_decay"]:
            leaf[start:stop].mul_(1 - group["lr"] * group["weight_decay"])
        leaf[start:stop].add_(grad, alpha=-group["lr"])

    def end_rows(self, leaf: Tensor) -> None:
        """SGD counts no steps."""
