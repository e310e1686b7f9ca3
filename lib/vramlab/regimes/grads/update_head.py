"""Structured gradient approximation, construction A: the seed paper's equations as they are written
(Zhu 2024).

    g = G(H),  theta' = theta - eta g,  H' = H + P theta',  logits = head(H')

H is the output of the final norm (the paper's LayerNorm(H) is that norm, so that the base model is
the starting point), theta a code of p numbers, P (H, p) and G an MLP of 1 to 5 layers. All three
train by the task's loss; the backbone is frozen. Nothing below H requires a gradient, so forward
keeps nothing of the backbone and backward touches the head side alone.

This is a conditional adapter on the last hidden state, differentiated exactly: nothing in the loss
makes g the gradient that it is called. `grads: amortised` measures how near it comes. With eta = 0
it is the adapter without condition: one learned bias P theta.

Shapes: b batch, t tokens, H hidden, p code, w width. H (b, t, H); g, theta' (b, t, p); theta (p).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...baichuan.model import decoder
from ...observer import Observer
from ..fields import CountOrNone, Range, Width
from ..trains.leaves import Leaf
from ..trains.parts import All, Part
from ..until.until import Updater
from .exact import Exact
from .probes import Direction, Probes, ProbingUpdater


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
            norm = UpdatedNorm(stack.norm, self.depth, self.code, self.width, self.eta)
            stack.norm = norm.to(like.dtype)
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        norm = decoder(model).norm
        frozen = {id(param) for param in norm.norm.parameters()}
        trained = {id(param) for param in norm.parameters()} - frozen
        return [
            tuple(
                Leaf(name, 0, len(param), len(param))
                for name, param in model.named_parameters()
                if id(param) in trained
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
        """(theta, g) -> the code to go on with in place of theta', for probes."""

    def forward(self, stream: Tensor) -> Tensor:
        hidden = self.norm(stream)
        guess = self.approximator(hidden)
        code = self.theta - self.eta * guess if self.tap is None else self.tap(self.theta, guess)
        return hidden + self.project(code)


@dataclass(frozen=True)
class Amortised(Exact):
    """Exact gradients for all that trains. A probe compares G's output, token by token, with the
    gradient it stands for.

    That is the gradient of the loss at theta, before the update (site `all`), and at theta' (site
    `updated`). The first comparison tells whether g is a gradient. The second goes to zero in the
    mean while G learns, whatever it learns, and tells only that it does.
    """

    probe: CountOrNone = 0
    """Steps from probe to probe, the first step being one; 0 is never. A probe is two forwards and
    the head's backward twice."""
    drop: bool = False
    """Whether a probe also measures how far the loss falls along the guess: three forwards more."""

    @property
    def cycle(self) -> int:
        return max(1, self.probe)

    def with_short_cycle(self) -> Amortised:
        return dataclasses.replace(self, probe=min(self.probe, 2))

    def updater(
        self,
        place: Any,
        until: Any,
        rule: Any,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        lr: float,
        observer: Observer,
    ) -> Updater:
        inner = super().updater(place, until, rule, model, named, lr, observer)
        return AmortisedUpdater(self, model, inner, observer) if self.probe else inner


class AmortisedUpdater(ProbingUpdater):
    """Updates as `inner` does, at the end of a step, and probes before that."""

    def __init__(self, options: Amortised, model: nn.Module, inner: Updater, observer: Observer):
        super().__init__(options, model, inner, observer)
        self.head, self._before, self._after = decoder(model).norm, Probes(), Probes()

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if self.step % self.options.probe:
            yield
            return
        with self.recorded():
            yield
            self._probe()

    def _probe(self) -> None:
        guess, true = self._gradient(updated=False)
        ratio = self.drop_ratio({"code": guess}, {"code": true})
        self._before.add(self.step, {"code": guess}, {"code": true}, ratio)
        self._after.add(self.step, {"code": guess}, {"code": self._gradient(updated=True)[1]})

    def _gradient(self, updated: bool) -> tuple[Tensor, Tensor]:
        """g, and the gradient of the loss with respect to the code of each token, at theta or at
        theta'."""
        tapped = {}

        def tap(theta: Tensor, guess: Tensor) -> Tensor:
            tapped["guess"] = guess.detach()
            tapped["code"] = (theta - self.head.eta * guess * updated).detach().requires_grad_()
            return tapped["code"]

        loss = self._loss_through(tap)
        with self.observer.phase("backward"):
            return tapped["guess"], torch.autograd.grad(loss, tapped["code"])[0]

    @torch.no_grad()
    def loss_after(self, change: Direction) -> Tensor:
        return self._loss_through(
            lambda theta, guess: theta.expand_as(guess) - change.get("code", 0)
        )

    def _loss_through(self, tap: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.head.tap = tap
        try:
            return self.repeated_loss()
        finally:
            self.head.tap = None

    def probes(self) -> list[dict]:
        return [
            {**row, "site": site}
            for site, probes in (("all", self._before), ("updated", self._after))
            for row in probes.rows()
            if row["site"] == "all"
        ]
