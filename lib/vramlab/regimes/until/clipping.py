"""What becomes of a gradient inside backward before it is used.

A norm of all gradients is known only when the last is formed, and inside backward the first has
then long been used. The ways out:

    NormOfAll     looks twice: a forward and a backward for the norm, another for the update. The
                  same as clipping at the end
                  of a step. LOMO's own, Lv 2024, arXiv:2306.09782; about twice the time.
    LastNorm      the norm that the step before had; only the first step, which has none before it,
                  looks twice. No time, and
                  not the same: a step whose gradients are suddenly large is not cut, the one after
                    it is.
    ByValue       each number by itself, to at most `value` either way. No norm and no time, and not
                  the same: where numbers are
                  cut the gradient has another direction.

`ScaledNorm` is NormOfAll of a loss that is multiplied, so that gradients of fp16 do not vanish
(below 6e-8 there is none): Micikevicius 2018, arXiv:1710.03740. Every gradient is then `scale`
times too large *inside* backward, where no one comes after the hooks who could divide it; the
step's learning rate is divided instead. Where the norm is not finite the step is left out and the
scale halved; after `GROWS_AFTER` good steps it is doubled. The look that measures the norm is thus
also what keeps an overflow from being half applied, which one look could not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .row_protocol import TakesRows

GROWS_AFTER = 1000
"""Steps without an overflow after which a scale is tried that is twice as large."""


class Unclipped:
    """Every gradient as it is."""

    runs = 1
    """How often a step forms its gradients."""
    hands_on = True
    """Whether gradients of this run are used, or only looked at."""

    def begin(self) -> None:
        """A step begins."""

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        """Around one of `runs`."""
        yield

    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        """Clips a gradient, or some rows of one in one of their sweeps, in place; False where it is
        only looked at."""
        return True

    def taker(self, taker: TakesRows) -> TakesRows:
        """Who takes rows of a gradient that are meant for `taker`."""
        return taker


class ByValue(Unclipped):
    """Every number to at most `value` either way."""

    def __init__(self, value: float):
        self._value = value

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        grad.clamp_(-self._value, self._value)
        return True

    def taker(self, taker: TakesRows) -> TakesRows:
        return _ClippedRows(self, taker)


class NormOfAll(ByValue):
    """The first run measures each gradient and drops it, the second hands on what clipping leaves
    of it. The norm stays on the device."""

    runs = 2

    def __init__(self, norm: float):
        self._largest = norm
        self._norms: list[Tensor] = []
        self._factor: Tensor | None = None

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if number == 1:
            self._factor = self._of(self._seen())
        yield
        if number == 1:
            self._factor = None

    def _seen(self) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms.clear()
        return norm

    def _of(self, norm: Tensor) -> Tensor:
        return (self._largest / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does it

    @property
    def hands_on(self) -> bool:
        return self._factor is not None

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        if self._factor is None:
            self._measure(grad)
            return False
        grad.mul_(self._factor)
        return True

    def _measure(self, grad: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))


class LastNorm(NormOfAll):
    """Clips by the norm of the step before, and measures this one's for the next."""

    runs = 1

    def begin(self) -> None:
        if self._norms:
            self._factor = self._of(self._seen())
        self.runs = 1 if self._factor is not None else 2

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if number == 1:
            self._factor = self._of(self._seen())
        yield

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        if sweep == 0:
            self._measure(grad)
        if self._factor is None:
            return False
        grad.mul_(self._factor)
        return True


class ScaledNorm(NormOfAll):
    """Clips by the norm of all, of a loss multiplied by `scale`. Gradients are not touched: what
    clipping and scale divide is `lr_factor`, so that nothing of them is lost to fp16 again."""

    def __init__(self, norm: float, scale: float):
        super().__init__(norm)
        self.scale = scale
        self.lr_factor = 1.0
        self._looking = self._usable = True
        self._good = 0

    def begin(self) -> None:
        if not self._usable:
            self.scale /= 2
        elif self._good == GROWS_AFTER:
            self.scale, self._good = self.scale * 2, 0

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        self._looking = number == 0
        if number == 1:
            norm = (
                float(self._seen()) / self.scale
            )  # the host waits: whether there is a step at all depends on it
            self._usable = math.isfinite(norm)
            self._good = self._good + 1 if self._usable else 0
            self.lr_factor = (
                min(1.0, self._largest / (norm + 1e-6)) / self.scale if self._usable else 0.0
            )
        yield

    @property
    def hands_on(self) -> bool:
        return self._usable and not self._looking

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        if self._looking:
            self._measure(grad)
        return self.hands_on


class _ClippedRows:
    """Takes rows of a gradient in place of an optimizer: looks at them, or hands on what clipping
    leaves of them."""

    def __init__(self, clipper: Unclipped, taker: TakesRows):
        self._clipper, self._taker = clipper, taker

    @property
    def sweeps(self) -> int:
        return self._taker.sweeps if self._clipper.hands_on else 1

    def begin_rows(self, leaf: Tensor) -> None:
        if self._clipper.hands_on:
            self._taker.begin_rows(leaf)

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        if self._clipper.clip(grad, sweep):
            self._taker.rows(leaf, start, stop, grad, sweep)

    def end_rows(self, leaf: Tensor) -> None:
        if self._clipper.hands_on:
            self._taker.end_rows(leaf)
