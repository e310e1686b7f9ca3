"""Axis `rule`: what an update computes, and what it remembers between two updates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .place import is_sharded, local


class _AdamW(torch.optim.AdamW):
    """torch's, which also takes a gradient in rows, see `rows`: each weight's update is its own affair."""

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
        # a copy of the step count, since the kernel moves it on: it belongs to all rows
        adamw([leaf[start:stop]], [grad], [state["exp_avg"][start:stop]], [state["exp_avg_sq"][start:stop]], [],
              [state["step"].clone()], fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)

    @torch.no_grad()
    def end_rows(self, leaf: Tensor) -> None:
        self.state[leaf]["step"] += 1


class _Sgd(torch.optim.SGD):
    """torch's, which also takes a gradient in rows."""

    sweeps = 1

    def begin_rows(self, leaf: Tensor) -> None:
        pass

    @torch.no_grad()
    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        leaf[start:stop].add_(grad, alpha=-self.param_groups[0]["lr"])

    def end_rows(self, leaf: Tensor) -> None:
        pass


@dataclass(frozen=True)
class AdamW:
    """m and v beside every trained weight, in the weight's type. State: 2 x itemsize bytes a trained weight, and one
    fp32 step count a tensor. Loshchilov 2019, arXiv:1711.05101. `fused`: no list-sized temporaries."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return _AdamW(params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True)

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return sum(2 * local(p).nbytes + 4 for p in params)


@dataclass(frozen=True)
class Sgd:
    """w <- w - lr * g, remembering nothing: no state at all. Fused, except on sharded weights, for which torch has no fused
    SGD: there tensor by tensor, in place too."""

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        params = list(params)
        return _Sgd(params, lr=lr, fused=not any(is_sharded(p) for p in params))

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return 0


@dataclass(frozen=True)
class NoRule:
    """No update: for a regime that trains nothing."""

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        raise AssertionError("a regime that trains nothing never makes an optimizer")

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return 0
