"""Axis `rule`: what an update computes, and what it remembers between two updates.

A rule is bound to the leaves that it will update (`bind`) before it makes an optimizer or counts
its bytes. Rules that are `row_wise` update slices of rows in fp32, see `sliced`, and leave to the
storage how a weight is read and written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..fields import Decay, Eps, Range, WeightDecay
from ..sharded import is_sharded, local
from ..weights.storage import Nearest
from . import adam_mini, factored, quantized_moments
from .sliced import LeafContext, RowAdamW, RowSgd, SlicedOptimizer
from .torch_optimizers import TorchAdamW, TorchSgd


class Rule:
    """What all rules share."""

    row_wise: ClassVar[bool] = True
    """Whether the rule can update weights that are stored in another way than rounded to
    nearest."""
    pieces: ClassVar[bool] = True
    """Whether the update of a part of a matrix is that part of the matrix's update, so that each
    rank can update its own part."""
    sliced: ClassVar[type[SlicedOptimizer]]
    """The optimizer that updates slices of rows."""
    constants: ClassVar[dict[str, Any]] = {}
    """Options of `sliced` that are no fields."""

    def load(self) -> None:
        """Imports the library that the rule needs, if any. Raises: ImportError."""

    def bind(self, context: LeafContext = LeafContext()) -> BoundRule:  # noqa: B008, frozen
        """The rule bound to the leaves that it will update."""
        return BoundRule(self, context)

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        return self.sliced(params, lr, context, **vars(self), **self.constants)

    def leaf_bytes(self, leaf: Tensor, context: LeafContext) -> int:
        """Bytes of a leaf's state, without what its storage adds."""
        return self.sliced.leaf_bytes(leaf, context)


@dataclass(frozen=True)
class BoundRule:
    """A rule bound to the leaves that it will update."""

    rule: Rule
    context: LeafContext

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """An optimizer of `params`."""
        return self.rule.optimizer(list(params), lr, self.context)

    def state_bytes(self, params: Iterable[Tensor]) -> int:
        """Bytes of state after a first update of `params`; of sharded ones this rank's."""
        return sum(
            self.rule.leaf_bytes(leaf, self.context) + self.context.storage.state_bytes(local(leaf))
            for leaf in params
        )


def _torch_stores(context: LeafContext) -> bool:
    """Whether torch's own optimizers write weights as they are stored: rounded to nearest."""
    return type(context.storage) is Nearest


@dataclass(frozen=True)
class _Adam(Rule):
    """The fields of Adam."""

    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Eps = 1e-8
    weight_decay: WeightDecay = 0.0


@dataclass(frozen=True)
class AdamW(_Adam):
    """m and v beside every trained weight, in the weight's type (fp32 where there is a master), and
    one fp32 step count a tensor. Loshchilov 2019, arXiv:1711.05101. torch's fused kernel: no
    temporaries as long as the list of parameters."""

    sliced = RowAdamW

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        if not _torch_stores(context):
            return super().optimizer(params, lr, context)
        return TorchAdamW(
            params,
            lr=lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def leaf_bytes(self, leaf: Tensor, context: LeafContext) -> int:
        # torch's step count is a tensor, ours a plain number
        return super().leaf_bytes(leaf, context) + 4 * _torch_stores(context)


@dataclass(frozen=True)
class Sgd(Rule):
    """w <- w - lr * g, formed in fp32, with no state at all.

    torch's fused kernel where that is right: not for sharded weights, and not for bf16, of which
    its CPU kernel skips all but the last few (pytorch issue 191763, up to 2.13). Those are updated
    tensor by tensor, in place too.

    With `weight_decay` a weight shrinks by lr * weight_decay of itself before its update, as in
    lomo-optim, whose default is 0 too; the paper has none. Inside backward that is LOMO's decay,
    and clipping the gradient does not change it.
    """

    sliced = RowSgd
    weight_decay: WeightDecay = 0.0

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        if not _torch_stores(context):
            return super().optimizer(params, lr, context)
        fused = all(p.dtype == torch.float32 and not is_sharded(p) for p in params)
        return TorchSgd(params, lr=lr, weight_decay=self.weight_decay, fused=fused, foreach=False)


@dataclass(frozen=True)
class Adafactor(Rule):
    """fp32 row and column means of the squared gradient; the step is relative to the weight's RMS,
    at most lr and at most 1/sqrt(t) of it, see `factored`. Shazeer 2018, arXiv:1804.04235, as torch
    has it for fp32: the paper, and transformers, add 1e-30 to each square and take 1e-2 for lr.
    `weight_decay` is of lr alone, whatever the weight's size.
    """

    pieces = False
    sliced = factored.Factored
    constants = {"added": 0.0, "least_mean": 2.0**-23, "most_root": 2.0**23, "relative": True}
    """2^-23 is fp32's eps."""
    decay: Annotated[float, Range(-10, 0)] = -0.8
    least_rms: Annotated[float, Range(0, 1000)] = 1e-3
    most_rms: Annotated[float, Range(1e-6, 1e6)] = 1.0
    weight_decay: WeightDecay = 0.0


@dataclass(frozen=True)
class AdaLomo(Adafactor):
    """Adafactor with an lr that does not shrink, and with 1e-30 added to each square in place of
    other bounds, see `factored`. Lv 2023, arXiv:2310.10195; its memory needs until: backward.

    As lomo-optim computes it, but for its loss scale of 2^10, a power of two that changes nothing.
    Its `weight_decay`, too, is of lr times the weight's size.
    """

    constants = {
        "added": 1e-30,
        "least_mean": torch.finfo(torch.float32).tiny,
        "most_root": float("inf"),
        "relative": False,
    }


@dataclass(frozen=True)
class AdamMini(_Adam):
    """AdamW with one second moment a head, neuron, token or norm, see `adam_mini`. Zhang 2024,
    arXiv:2406.16793."""

    pieces = False
    sliced = adam_mini.AdamMini


@dataclass(frozen=True)
class Adam4bit(_Adam):
    """AdamW with both moments in 4 bits, see `quantized_moments`. Li 2023, arXiv:2309.01507."""

    pieces = False
    sliced = quantized_moments.Adam4bit


@dataclass(frozen=True)
class Adam8bit(_Adam):
    """AdamW with both moments in 8 bits, by bitsandbytes, see `quantized_moments`. Dettmers 2021,
    arXiv:2110.02861."""

    row_wise = False
    pieces = False

    def load(self) -> None:
        quantized_moments.library()

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        return quantized_moments.adam8bit(params, lr, **vars(self))

    def leaf_bytes(self, leaf: Tensor, context: LeafContext) -> int:
        return quantized_moments.state_bytes_8bit(leaf)


@dataclass(frozen=True)
class NoRule(Rule):
    """No update: for a regime that trains nothing."""

    row_wise = False

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        raise AssertionError("a regime that trains nothing never makes an optimizer")

    def leaf_bytes(self, leaf: Tensor, context: LeafContext) -> int:
        return 0
