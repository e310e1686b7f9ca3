"""Structured gradient approximation, construction A: the seed paper's equations as they are written
(Zhu 2024).

    g = G(H),  theta' = theta - eta g,  H' = H + P theta',  logits = head(H')

H is what the final norm gives (the paper's LayerNorm(H) is that norm, so that the base is the
starting point), theta a code of p numbers, P (H, p) and G an MLP of 1 to 5 layers. All three train
by the task's loss; the backbone is frozen. Nothing below H requires a gradient, so forward keeps
nothing of the backbone and backward touches the head side alone.

That is a conditional adapter on the last hidden state, exactly differentiated: nothing in the loss
asks that g be the gradient it is called. `grads: amortised` measures how near it comes. eta = 0 is
the adapter without condition: one learned bias P theta.

Shapes: b batch, t tokens, H hidden, p code, w width. H (b, t, H); g, theta' (b, t, p); theta (p).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ...baichuan.model import decoder
from ...observer import Observer
from ..fields import CountOrNone, Range, Width
from ..trains.leaves import Leaf
from ..trains.parts import All, Part
from ..until.until import Updater
from .exact import Exact
from .probes import Again, Probes, drop_ratio


@dataclass(frozen=True)
class UpdateHead(All):
    """The code, its projection and the module that updates it for each token; starts as the
    identity. Zhu 2024."""

    depth: Annotated[int, Range(1, 100)] = 3
    """Layers of G."""
    code: Width = 64
    """p, numbers of theta."""
    width: Width = 256
    """w, of G's inner layers."""
    eta: Annotated[float, Range(0, 1000)] = 1.0

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        stack = decoder(model)
        like = stack.norm.weight
        with torch.random.fork_rng(), like.device:
            torch.manual_seed(seed)
            stack.norm = UpdatedNorm(stack.norm, self.depth, self.code, self.width, self.eta).to(
                like.dtype
            )
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        frozen = {id(param) for param in decoder(model).norm.norm.parameters()}
        inside = {id(param) for param in decoder(model).norm.parameters()} - frozen
        return [
            tuple(
                Leaf(name, 0, len(param), len(param))
                for name, param in model.named_parameters()
                if id(param) in inside
            )
        ]


class UpdatedNorm(nn.Module):
    """In place of the final norm: H' from the stream (b, t, H)."""

    def __init__(self, norm: nn.Module, depth: int, code: int, width: int, eta: float):
        super().__init__()
        size, self.eta = norm.weight.shape[0], eta
        self.norm, self.theta = norm, nn.Parameter(torch.zeros(code))
        widths = [size, *[width] * (depth - 1), code]
        layers = [
            layer
            for a, b in zip(widths, widths[1:], strict=False)
            for layer in (nn.Linear(a, b), nn.SiLU())
        ][:-1]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.approximator, self.project = nn.Sequential(*layers), nn.Linear(code, size, bias=False)
        self.tap: Callable[[Tensor, Tensor], Tensor] | None = None
        """(theta, g) -> the code to go on with, for who wants another than theta'."""

    def forward(self, stream: Tensor) -> Tensor:
        hidden = self.norm(stream)
        guess = self.approximator(hidden)
        code = self.theta - self.eta * guess if self.tap is None else self.tap(self.theta, guess)
        return hidden + self.project(code)


@dataclass(frozen=True)
class Amortised(Exact):
    """Exact gradients for all that trains; G's output is held against the gradient it stands for,
    token by token: that of the loss at theta, which is to be updated (site `all`), and at theta'
    (site `updated`). The second goes to zero in the mean as G learns, whatever it has learnt, and
    tells only that it has; the first tells whether g is a gradient.
    """

    probe: CountOrNone = 0
    """Steps from probe to probe, the first step being one; 0 is never. A probe is two forwards and
    the head's backward twice."""
    drop: bool = False
    """Whether a probe also measures how far the loss falls along the guess: three forwards more."""

    @property
    def cycle(self) -> int:
        return max(1, self.probe)

    def hurried(self) -> Amortised:
        return dataclasses.replace(self, probe=min(self.probe, 2))

    def updater(
        self,
        place,
        until,
        rule,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        lr: float,
        observer: Observer,
    ) -> Updater:
        inner = super().updater(place, until, rule, model, named, lr, observer)
        return _Probed(self, model, inner, observer) if self.probe else inner


class _Probed(Updater):
    """Updates as `inner` does, at the end of a step, and probes before that."""

    def __init__(self, value: Amortised, model: nn.Module, inner: Updater, observer: Observer):
        super().__init__(inner.optimizers)
        self.inner, self.value, self.head, self.observer = (
            inner,
            value,
            decoder(model).norm,
            observer,
        )
        self.again, self._before, self._after = Again(model, observer), Probes(), Probes()

    def begin(self, step: int, lr: float) -> None:
        self.inner.begin(step, lr)
        self.step = step

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if self.step % self.value.probe:
            yield
            return
        with self.again.watching():
            yield
            self._probe()

    def _probe(self) -> None:
        guess, true = self._gradient(updated=False)
        ratio = (
            drop_ratio(self._loss_after, {"code": guess}, {"code": true})
            if self.value.drop
            else None
        )
        self._before.add(self.step, {"code": guess}, {"code": true}, ratio)
        self._after.add(self.step, {"code": guess}, {"code": self._gradient(updated=True)[1]})

    def _gradient(self, updated: bool) -> tuple[Tensor, Tensor]:
        """g, and the gradient of the loss by the code of each token, at theta or at theta'."""
        seen = {}

        def tap(theta: Tensor, guess: Tensor) -> Tensor:
            seen["guess"] = guess.detach()
            seen["code"] = (theta - self.head.eta * guess * updated).detach().requires_grad_()
            return seen["code"]

        loss = self._tapped(tap)
        with self.observer.phase("backward"):
            return seen["guess"], torch.autograd.grad(loss, seen["code"])[0]

    @torch.no_grad()
    def _loss_after(self, change: Mapping[str, Tensor]) -> Tensor:
        return self._tapped(lambda theta, guess: theta.expand_as(guess) - change.get("code", 0))

    def _tapped(self, tap: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.head.tap = tap
        try:
            return self.again.loss()
        finally:
            self.head.tap = None

    def apply(self) -> None:
        self.inner.apply()

    def probes(self) -> list[dict]:
        return [
            {**row, "site": site}
            for site, probes in (("all", self._before), ("updated", self._after))
            for row in probes.rows()
            if row["site"] == "all"
        ]
