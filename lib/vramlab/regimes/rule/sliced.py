"""Optimizers that walk a parameter in slices of rows, so that no fp32 temporary has a parameter's
size.

A step goes over the gradient's rows in one or more sweeps: the last updates the weight, those
before it look, when an update depends on all of a gradient (row and column means, norms). `step`
walks `.grad`; whoever forms a gradient some rows at a time, and again for each sweep, hands them
over instead: `begin_rows`, `rows`, `end_rows`. But for the order of sums, what comes out does not
depend on where the slices are cut.

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
from ..weights.storage import MASTER, Nearest

SLICE_BYTES = 64 << 20
"""Of one fp32 temporary; a step has a handful at a time. Smaller ones cost launches, and a forecast
its seconds."""


@dataclass(frozen=True)
class Fit:
    """What a rule is told about the leaves it will update."""

    storage: Nearest = field(default_factory=Nearest)
    names: Mapping[int, str] = field(default_factory=dict)
    """id of a leaf -> its name."""
    head_dim: int = 0
    """Rows of one attention head; needed by rules that treat heads apart."""


def slices(shape: torch.Size, grain: int = 1) -> Iterator[slice]:
    """Cuts the first dimension into runs of at most `SLICE_BYTES` of fp32, in multiples of `grain`
    rows, one at least."""
    each = SLICE_BYTES // 4 // max(1, math.prod(shape[1:])) // grain * grain or grain
    return (slice(start, min(start + each, shape[0])) for start in range(0, shape[0], each))


class Walking(torch.optim.Optimizer):
    """What such rules share. `state[leaf]` holds `step`, a plain number, and the rule's tensors."""

    sweeps = 1

    def __init__(self, params: Iterable[Tensor], lr: float, fit: Fit, **options):
        super().__init__(params, {"lr": lr, **options})
        self.fit = fit
        self._scratch: dict[Tensor, dict[str, Any]] = {}

    @property
    def options(self) -> dict:
        """`lr` and whatever the rule was made with."""
        return self.param_groups[0]

    # what a rule fills in -------------------------------------------------------------------------

    def start(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        """Makes the state of a leaf in `entry`."""

    def scratch(self, leaf: Tensor, weight: Tensor, entry: dict) -> dict[str, Any]:
        """What one step hands on from sweep to sweep; small, and dropped at its end."""
        return {}

    def look(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        """Every sweep but the last: one slice, in fp32."""

    def settle(self, leaf: Tensor, sweep: int) -> None:
        """Every slice has been looked at in this sweep."""

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        """The last sweep: changes `wide`, the weight's slice in fp32, in place. `gradient` is
        fp32."""
        raise NotImplementedError

    def grain(self, weight: Tensor) -> int:
        """How many rows a slice holds a multiple of."""
        return 1

    # how a step goes ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for leaf in self.options["params"]:
            if leaf.grad is None:
                continue
            gradient, weight = local(leaf.grad), local(leaf)
            self._begin(leaf)
            for sweep in range(self.sweeps):
                for rows in slices(weight.shape, self.grain(weight)):
                    self._visit(leaf, sweep, rows, gradient[rows])
            del self._scratch[leaf]

    def _begin(self, leaf: Tensor) -> None:
        entry, weight = self.state[leaf], local(leaf)
        if not entry:
            entry["step"] = 0
            self.fit.storage.begin(weight, entry)
            self.start(leaf, weight, entry)
        entry["step"] += 1
        self._scratch[leaf] = {"sweep": 0, **self.scratch(leaf, weight, entry)}

    def _visit(self, leaf: Tensor, sweep: int, rows: slice, gradient: Tensor) -> None:
        scratch = self._scratch[leaf]
        if sweep != scratch["sweep"]:
            self.settle(leaf, scratch["sweep"])
            scratch["sweep"] = sweep
        gradient = gradient.float()
        if sweep < self.sweeps - 1:
            self.look(leaf, sweep, rows, gradient)
            return
        wide = self.read(leaf, rows)
        self.update(leaf, rows, gradient, wide)
        self.fit.storage.write(local(leaf), self.state[leaf], rows, wide, self._label(leaf))

    def exact(self, leaf: Tensor) -> Tensor:
        """The whole weight as it is updated, in whatever type."""
        return self.state[leaf].get(MASTER, local(leaf))

    def read(self, leaf: Tensor, rows: slice) -> Tensor:
        return self.fit.storage.read(local(leaf), self.state[leaf], rows)

    def _label(self, leaf: Tensor) -> str:
        """Names leaf, step and, of a sharded leaf, the piece: random numbers are a function of
        these alone."""
        return f"{self.fit.names.get(id(leaf), '')}/{self.state[leaf]['step']}/{first_row(leaf)}"

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch does, but state keeps its own type: torch casts it to the weight's, which a bf16
        weight's fp32 state would not survive."""
        super().load_state_dict(state_dict)
        restore_types(self, state_dict)


def restore_types(optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Tensors of state as they were saved, on their leaf's device, in place of what torch's loading
    has cast."""
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    for leaf, number in zip(leaves, saved, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[leaf][key] = value.detach().to(leaf.device, copy=True)


class RowWise(Walking):
    """A rule that also takes a gradient in rows, wherever they are cut."""

    def begin_rows(self, leaf: Tensor) -> None:
        """An update of `leaf` begins."""
        with torch.no_grad():
            self._begin(leaf)

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        """Rows `start:stop` of the gradient: all of them in ascending order, the same ones in each
        of `sweeps`."""
        with torch.no_grad():
            self._visit(leaf, sweep, slice(start, stop), grad)

    def end_rows(self, leaf: Tensor) -> None:
        """Every row has been seen in every sweep."""
        del self._scratch[leaf]


class RowSgd(RowWise):
    """w <- (1 - lr weight_decay) w - lr g, formed in fp32."""

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        if self.options["weight_decay"]:
            wide.mul_(1 - self.options["lr"] * self.options["weight_decay"])
        wide.add_(gradient, alpha=-self.options["lr"])


class RowAdamW(RowWise):
    """AdamW by torch's fused kernel, on fp32 slices of weight, gradient and moments."""

    def start(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.zeros_like(weight, dtype=self.fit.storage.moments_dtype(weight))

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        entry, options = self.state[leaf], self.options
        kept = [entry["exp_avg"][rows], entry["exp_avg_sq"][rows]]
        moments = [
            tensor.float() for tensor in kept
        ]  # the kept ones themselves where they are fp32
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
        for tensor, moment in zip(kept, moments, strict=True):
            if tensor.dtype != moment.dtype:
                tensor.copy_(moment)
