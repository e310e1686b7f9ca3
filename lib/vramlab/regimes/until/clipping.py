"""Clips gradients inside backward, before they are used.

The norm of all gradients is known only when the last one is formed. Inside backward the first one
has been used long before. There are three ways out:

    NormOfAll   Forms all gradients twice, first for the norm and then for the update. Gives the
                same result as clipping at the end of a step, in about twice the time. LOMO's own
                way, Lv 2024, arXiv:2306.09782.
    LastNorm    Uses the norm of the step before; only the first step forms its gradients twice.
                Takes no time, but is not the same: a step whose gradients are suddenly large is not
                clipped, the step after it is.
    ByValue     Clips each number to at most `value` in either direction. Needs no norm and no time,
                but is not the same: a clipped gradient has another direction.

`ScaledNorm` is NormOfAll with a loss multiplied by a scale, so that fp16 gradients do not vanish
(the smallest is 6e-8): Micikevicius 2018, arXiv:1710.03740. Inside backward every gradient is then
too large by that factor, and nothing could divide it after the hooks have run, so the learning rate
of the step is divided instead. If the norm is not finite, the step is left out and the scale is
halved; after `GROWS_AFTER` good steps it is doubled. Since the first run only measures the norm, no
overflow is ever half applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .row_protocol import TakesRows

GROWS_AFTER = 1000
"""Steps without an overflow after which the scale is doubled."""


class Unclipped:
    """Passes every gradient on as it is."""

    runs = 1
    """How often a step forms its gradients."""

    @property
    def hands_on(self) -> bool:
        """Whether the gradients of the current run are used; else they are only measured."""
        return True

    def begin(self) -> None:
        """A step begins."""

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        """Around each of the `runs`, counted from 0."""
        yield

    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        """Clips in place a gradient, or some rows of one in a sweep. Returns whether to use it."""
        return True

    def wrap(self, receiver: TakesRows) -> TakesRows:
        """A receiver that clips the rows of a gradient before it hands them to `receiver`."""
        return receiver


class ByValue(Unclipped):
    """Clips every number to at most `value` in either direction."""

    def __init__(self, value: float):
        self._value = value

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        grad.clamp_(-self._value, self._value)
        return True

    def wrap(self, receiver: TakesRows) -> TakesRows:
        return _ClippedRows(self, receiver)


class NormOfAll(ByValue):
    """Measures each gradient in the first run, and clips it in the second. The norm stays on the
    device."""

    runs = 2

    def __init__(self, norm: float):
        self._largest = norm
        self._norms: list[Tensor] = []
        self._factor: Tensor | None = None

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if number == 1:
            self._factor = self._clip_factor()
        yield
        if number == 1:
            self._factor = None

    def _measured_norm(self) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms.clear()
        return norm

    def _clip_factor(self) -> Tensor:
        """From the norm of all gradients measured since the last call, as in clip_grad_norm_."""
        norm = self._measured_norm()
        return (self._largest / (norm + 1e-6)).clamp(max=1.0)

    @property
    def hands_on(self) -> bool:
        return self._factor is not None

    def _measures(self, sweep: int) -> bool:
        return self._factor is None

    @torch.no_grad()
    def clip(self, grad: Tensor, sweep: int = 0) -> bool:
        if self._measures(sweep):
            self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))
        if self._factor is not None:
            grad.mul_(self._factor)
        return self.hands_on


class LastNorm(NormOfAll):
    """Clips by the norm of the step before, and measures the norm for the next step."""

    runs = 1

    def begin(self) -> None:
        if self._norms:
            self._factor = self._clip_factor()
        self.runs = 1 if self._factor is not None else 2

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if number == 1:
            self._factor = self._clip_factor()
        yield

    def _measures(self, sweep: int) -> bool:
        return sweep == 0


class ScaledNorm(NormOfAll):
    """Clips by the norm of all gradients of a loss multiplied by `scale`. Gradients are not
    changed, since fp16 would round them again: clipping and scale divide the learning rate
    (`lr_factor`)."""

    def __init__(self, norm: float, scale: float):
        super().__init__(norm)
        self.scale = scale
        self.lr_factor = 1.0
        self._measuring, self._usable = True, True
        self._good_steps = 0

    def begin(self) -> None:
        if not self._usable:
            self.scale /= 2
        elif self._good_steps == GROWS_AFTER:
            self.scale, self._good_steps = self.scale * 2, 0

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        self._measuring = number == 0
        if number == 1:
            # the host waits: whether the step is taken at all depends on the norm
            norm = float(self._measured_norm()) / self.scale
            self._usable = math.isfinite(norm)
            self._good_steps = self._good_steps + 1 if self._usable else 0
            self.lr_factor = (
                min(1.0, self._largest / (norm + 1e-6)) / self.scale if self._usable else 0.0
            )
        yield

    @property
    def hands_on(self) -> bool:
        return self._usable and not self._measuring

    def _measures(self, sweep: int) -> bool:
        return self._measuring


class _ClippedRows:
    """Receives rows of a gradient in place of an optimizer, and measures them or hands them on
    clipped."""

    def __init__(self, clipper: Unclipped, receiver: TakesRows):
        self._clipper, self._receiver = clipper, receiver

    @property
    def sweeps(self) -> int:
        return self._receiver.sweeps if self._clipper.hands_on else 1

    def begin_rows(self, leaf: Tensor) -> None:
        if self._clipper.hands_on:
            self._receiver.begin_rows(leaf)

    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        if self._clipper.clip(grad, sweep):
            self._receiver.rows(leaf, start, stop, grad, sweep)

    def end_rows(self, leaf: Tensor) -> None:
        if self._clipper.hands_on:
            self._receiver.end_rows(leaf)
