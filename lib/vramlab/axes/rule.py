"""Axis `rule`: what an update computes, and what it remembers between two updates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .place import is_sharded, local


@dataclass(frozen=True)
class AdamW:
    """m and v beside every trained weight, in the weight's type. State: 2 x itemsize bytes a trained weight, and one
    fp32 step count a tensor. Loshchilov 2019, arXiv:1711.05101. `fused`: no list-sized temporaries."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps,
                                 weight_decay=self.weight_decay, fused=True)

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return sum(2 * local(p).nbytes + 4 for p in params)


@dataclass(frozen=True)
class Sgd:
    """w <- w - lr * g, remembering nothing: no state at all. Fused, except on sharded weights, for which torch has no fused
    SGD: there tensor by tensor, in place too."""

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD(params, lr=lr, fused=not any(is_sharded(p) for p in params))

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return 0


@dataclass(frozen=True)
class NoRule:
    """No update: for a regime that trains nothing."""

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        raise AssertionError("a regime that trains nothing never makes an optimizer")

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return 0
