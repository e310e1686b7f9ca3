"""Axis `rule`: what an update computes, and what it remembers between two updates.

A rule is told what it updates (`fitted`) before it makes an optimizer or counts its bytes. Those
that are `row_wise` update slices of rows in fp32, see `rowwise`, and leave it to `storage` how a
weight is read and written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..fields import Decay, Eps, Range, WeightDecay
from ..sharded import is_sharded, local
from ..weights.storage import Nearest
from . import adam_mini, factored
from . import quantized_moments as moment_codes
from .sliced import Fit, RowAdamW, RowSgd


class Rule:
    """What every rule is."""

    row_wise: ClassVar[bool] = False
    """Whether it can update weights that are stored in another way than rounded to nearest."""
    pieces: ClassVar[bool] = True
    """Whether the update of a part of a matrix is that part of the matrix' update, so that ranks
    may each do theirs."""

    def load(self) -> None:
        """Imports the library the rule is made of, if there is one. Raises: ImportError."""

    def fitted(self, fit: Fit) -> Rule:
        """The rule for these leaves."""
        return self

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        """Bytes of state after a first update of `params`, of sharded ones this rank's."""
        raise NotImplementedError


class RowRule(Rule):
    """A rule that has to know how weights are stored, or which leaf is which."""

    row_wise = True

    def fitted(self, fit: Fit) -> Rule:
        return Fitted(self, fit)

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return self.optimizer(list(params), lr, Fit())

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return self.fitted(Fit()).state_bytes(params)

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        raise NotImplementedError

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        """State of one leaf, what its storage needs aside."""
        raise NotImplementedError


class _AdamW(torch.optim.AdamW):
    """torch's, which also takes a gradient in rows, see `rows`: each weight's update is its own
    affair."""

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


class _Sgd(torch.optim.SGD):
    """torch's, which also takes a gradient in rows. Of one tensor the kernel itself: inside
    backward, where each tensor has an optimizer, what torch does around it takes longer than a
    small update."""

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
        pass

    @torch.no_grad()
    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        (group,) = self.param_groups
        if group["weight_decay"]:
            leaf[start:stop].mul_(1 - group["lr"] * group["weight_decay"])
        leaf[start:stop].add_(grad, alpha=-group["lr"])

    def end_rows(self, leaf: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Fitted(Rule):
    """A rule that has been told."""

    rule: RowRule
    fit: Fit

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return self.rule.optimizer(list(params), lr, self.fit)

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return sum(
            self.rule.leaf_bytes(leaf, self.fit) + self.fit.storage.state_bytes(local(leaf))
            for leaf in params
        )


@dataclass(frozen=True)
class AdamW(RowRule):
    """m and v beside every trained weight, in the weight's type (fp32 where there is a master), and
    one fp32 step count a tensor. Loshchilov 2019, arXiv:1711.05101. torch's fused kernel: no
    list-sized temporaries."""

    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Eps = 1e-8
    weight_decay: WeightDecay = 0.0

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        if _torch_stores(fit):
            return _AdamW(
                params,
                lr=lr,
                betas=(self.beta1, self.beta2),
                eps=self.eps,
                weight_decay=self.weight_decay,
                fused=True,
            )
        return RowAdamW(params, lr, fit, **vars(self))

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        """The step count of slices is a plain number."""
        weight = local(leaf)
        moments = 2 * weight.numel() * fit.storage.moments_dtype(weight).itemsize
        return moments + 4 * _torch_stores(fit)


@dataclass(frozen=True)
class Sgd(RowRule):
    """w <- w - lr * g, formed in fp32, remembering nothing: no state at all. torch's fused kernel
    where it has one that is right: not for sharded weights, and not for bf16, of which its CPU
    kernel skips all but the last few (pytorch issue 191763, up to 2.13). There tensor by tensor, in
    place too.

    With `weight_decay` a weight shrinks by lr * weight_decay of itself before its update, as in
    lomo-optim, whose default is 0 too; the paper has none. Inside backward that is LOMO's, and what
    clipping leaves of a gradient does not change it.
    """

    weight_decay: WeightDecay = 0.0

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        if _torch_stores(fit):
            fused = all(p.dtype == torch.float32 and not is_sharded(p) for p in params)
            return _Sgd(params, lr=lr, weight_decay=self.weight_decay, fused=fused, foreach=False)
        return RowSgd(params, lr, fit, **vars(self))

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        return 0


def _torch_stores(fit: Fit) -> bool:
    return type(fit.storage) is Nearest


@dataclass(frozen=True)
class Adafactor(RowRule):
    """fp32 row and column means of the squared gradient; the step is relative to the weight's RMS,
    at most lr and at most 1/sqrt(t) of it, see `factored`. Shazeer 2018, arXiv:1804.04235, as torch
    has it for fp32: the paper, and transformers, add 1e-30 to each square and take 1e-2 for lr.
    `weight_decay` is of lr as it is given, whatever the weight's size.
    """

    pieces = False
    bounds: ClassVar[dict] = {
        "added": 0.0,
        "least_mean": 2.0**-23,
        "most_root": 2.0**23,
        "relative": True,
    }
    """2^-23 is fp32's eps."""
    decay: Annotated[float, Range(-10, 0)] = -0.8
    least_rms: Annotated[float, Range(0, 1000)] = 1e-3
    most_rms: Annotated[float, Range(1e-6, 1e6)] = 1.0
    weight_decay: WeightDecay = 0.0

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        return factored.Factored(params, lr, fit, **vars(self), **self.bounds)

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        return factored.state_bytes(local(leaf))


@dataclass(frozen=True)
class AdaLomo(Adafactor):
    """Adafactor with lr as it is given, and 1e-30 added to each square in place of other bounds,
    see `factored`. Lv 2023, arXiv:2310.10195; its memory needs until: backward. As lomo-optim
    computes it, but for its loss scale of 2^10, a power of two that changes nothing; its
    `weight_decay`, too, is of lr times the weight's size."""

    bounds = {
        "added": 1e-30,
        "least_mean": torch.finfo(torch.float32).tiny,
        "most_root": float("inf"),
        "relative": False,
    }


@dataclass(frozen=True)
class AdamMini(AdamW):
    """AdamW with one second moment a head, neuron, token or norm, see `adam_mini`. Zhang 2024,
    arXiv:2406.16793."""

    pieces = False

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        return adam_mini.AdamMini(params, lr, fit, **vars(self))

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        weight = local(leaf)
        return weight.numel() * fit.storage.moments_dtype(weight).itemsize + 4 * adam_mini.blocks(
            leaf, fit
        )


@dataclass(frozen=True)
class Adam4bit(AdamW):
    """AdamW with both moments in 4 bits, see `moment_codes`. Li 2023, arXiv:2309.01507."""

    pieces = False

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        return moment_codes.Adam4bit(params, lr, fit, **vars(self))

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        return moment_codes.state_bytes_4bit(local(leaf), fit)


@dataclass(frozen=True)
class Adam8bit(Rule):
    """AdamW with both moments in 8 bits, by bitsandbytes, see `moment_codes`. Dettmers 2021,
    arXiv:2110.02861."""

    pieces = False
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Eps = 1e-8
    weight_decay: WeightDecay = 0.0

    def load(self) -> None:
        moment_codes.library()

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return moment_codes.adam8bit(params, lr, **vars(self))

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return sum(moment_codes.state_bytes_8bit(leaf) for leaf in params)


@dataclass(frozen=True)
class NoRule(Rule):
    """No update: for a regime that trains nothing."""

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        raise AssertionError("a regime that trains nothing never makes an optimizer")

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        return 0
