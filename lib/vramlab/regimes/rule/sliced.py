"""Optimizers that walk a parameter in slices of rows, so that no fp32 temporary has a parameter's
size.

A step goes over the gradient's rows in one or more sweeps. The last sweep updates the weight; those
before it measure, for rules whose update depends on the whole gradient (row and column means,
norms). `step` walks `.grad`. Code that forms a gradient some rows at a time, and again for each
sweep, hands the rows to a `RowOptimizer` instead, see `row_protocol`. But for the order of sums,
the result does not depend on where the slices are cut.

Shapes: leaf (O, ...); gradient and the weight's fp32 slice (rows, ...).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sharded import first_row, local
from ..weights.storage import Nearest

SLICE_BYTES = 64 << 20
"""Most bytes of one fp32 temporary, of which a step has a handful at a time. Smaller ones cost more
kernel launches, and make a forecast slower."""


@dataclass(frozen=True)
class LeafContext:
    """What a rule has to know about the leaves that it updates."""

    storage: Nearest = field(default_factory=Nearest)
    """How their weights are stored."""
    names: Mapping[int, str] = field(default_factory=dict)
    """id of a leaf -> its name."""
    head_dim: int = 0
    """Rows of one attention head; needed by rules that treat heads apart."""


def slices(shape: torch.Size, grain: int = 1) -> Iterator[slice]:
    """Cuts the first dimension into runs of at most `SLICE_BYTES` of fp32, in multiples of `grain`
    rows, but at least `grain`."""
    each = SLICE_BYTES // 4 // max(1, math.prod(shape[1:])) // grain * grain or grain
    return (slice(start, min(start + each, shape[0])) for start in range(0, shape[0], each))


class TypedStateOptimizer(torch.optim.Optimizer):
    """Loads state in the type in which it was saved. torch casts it to the weight's type, which the
    fp32 state of a bf16 weight would not survive."""

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        leaves = [leaf for group in self.param_groups for leaf in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for leaf, number in zip(leaves, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[leaf][key] = value.detach().to(leaf.device, copy=True)


class SlicedOptimizer(TypedStateOptimizer):
    """The walk over slices. `state[leaf]` holds `step`, a plain number, and the rule's tensors."""

    sweeps = 1

    def __init__(self, params: Iterable[Tensor], lr: float, context: LeafContext, **options):
        super().__init__(params, {"lr": lr, **options})
        self.context = context
        self._scratch: dict[Tensor, dict[str, Any]] = {}

    @property
    def options(self) -> dict:
        """`lr` and the rule's own options."""
        return self.param_groups[0]

    # what a rule defines --------------------------------------------------------------------------

    def add_state(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        """Adds the tensors of a leaf's state to `entry`, before its first update."""

    @staticmethod
    def leaf_bytes(leaf: Tensor, context: LeafContext) -> int:
        """Bytes of the tensors that `add_state` adds."""
        return 0

    def new_scratch(self, leaf: Tensor, weight: Tensor, entry: dict) -> dict[str, Any]:
        """What one step passes on from sweep to sweep; small, and dropped at the step's end."""
        return {}

    def measure(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        """One slice of any sweep but the last; `gradient` is fp32."""

    def finish_sweep(self, leaf: Tensor, sweep: int) -> None:
        """Every slice has been measured in this sweep."""

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        """One slice of the last sweep: changes `wide`, the weight's slice in fp32, in place.
        `gradient` is fp32."""

    def grain(self, weight: Tensor) -> int:
        """A slice holds a multiple of this many rows."""
        return 1

    # how a step goes ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for leaf in (leaf for leaf in self.options["params"] if leaf.grad is not None):
            gradient, weight = local(leaf.grad), local(leaf)
            self.begin_rows(leaf)
            for sweep in range(self.sweeps):
                for rows in slices(weight.shape, self.grain(weight)):
                    self.visit(leaf, rows.start, rows.stop, gradient[rows], sweep)
            self.end_rows(leaf)

    @torch.no_grad()
    def begin_rows(self, leaf: Tensor) -> None:
        """An update of `leaf` begins."""
        entry, weight = self.state[leaf], local(leaf)
        if not entry:
            entry["step"] = 0
            self.context.storage.begin(weight, entry)
            self.add_state(leaf, weight, entry)
        entry["step"] += 1
        self._scratch[leaf] = {"sweep": 0, **self.new_scratch(leaf, weight, entry)}

    @torch.no_grad()
    def visit(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        """Rows `start:stop` of the gradient: all of them in ascending order, the same ones in each
        of `sweeps`."""
        scratch, rows = self._scratch[leaf], slice(start, stop)
        if sweep != scratch["sweep"]:
            self.finish_sweep(leaf, scratch["sweep"])
            scratch["sweep"] = sweep
        gradient = grad.float()
        if sweep < self.sweeps - 1:
            self.measure(leaf, sweep, rows, gradient)
            return
        storage, weight, entry = self.context.storage, local(leaf), self.state[leaf]
        wide = storage.read(weight, entry, rows)
        self.update(leaf, rows, gradient, wide)
        # random numbers are a function of leaf, step and, of a sharded leaf, the piece
        name = self.context.names.get(id(leaf), "")
        storage.write(weight, entry, rows, wide, f"{name}/{entry['step']}/{first_row(leaf)}")

    def end_rows(self, leaf: Tensor) -> None:
        """Every row has been visited in every sweep."""
        del self._scratch[leaf]


class RowOptimizer(SlicedOptimizer):
    """A sliced optimizer that also takes its gradient in rows, wherever they are cut: it has the
    methods of `row_protocol`."""

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        """Rows `start:stop` of the gradient, see `visit`. `grad` lives until the update is over."""
        self.visit(leaf, start, stop, grad, sweep)


class RowSgd(RowOptimizer):
    """w <- (1 - lr weight_decay) w - lr g, formed in fp32."""

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        if self.options["weight_decay"]:
            wide.mul_(1 - self.options["lr"] * self.options["weight_decay"])
        wide.add_(gradient, alpha=-self.options["lr"])


class RowAdamW(RowOptimizer):
    """AdamW by torch's fused kernel, on fp32 slices of weight, gradient and moments."""

    def add_state(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.zeros_like(weight, dtype=self.context.storage.moments_dtype(weight))

    @staticmethod
    def leaf_bytes(leaf: Tensor, context: LeafContext) -> int:
        weight = local(leaf)
        return 2 * weight.numel() * context.storage.moments_dtype(weight).itemsize

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        entry, options = self.state[leaf], self.options
        stored = [entry["exp_avg"][rows], entry["exp_avg_sq"][rows]]
        moments = [tensor.float() for tensor in stored]  # fp32 ones are not copied
        steps = torch.full((), float(entry["step"]), device=wide.device)
        torch._fused_adamw_(
            [wide],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [steps],
            lr=options["lr"],
            beta1=options["beta1"],
            beta2=options["beta2"],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
        )
        for tensor, moment in zip(stored, moments, strict=True):
            if tensor.dtype != moment.dtype:
                tensor.copy_(moment)
