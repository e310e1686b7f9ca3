"""Axis `grads`: how a gradient is formed: exactly, by a backward, or guessed from two forwards.

`zeroth_order` is MeZO: Malladi 2023, arXiv:2305.17333. With z standard normal, one number for each
weight, and g 0-d:

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)            w <- w - lr g z

The expectation of g z is the gradient, up to eps^2; its variance grows with the number of weights,
hence the papers' lr of 1e-6. In bytes: no activation is kept and no gradient formed; z is drawn
again from (seed, step, leaf, slice) wherever it is needed and is never longer than `SLICE` numbers.

How weights are moved, and moved back. The published code adds eps z to every weight, takes off 2
eps z and adds eps z again: of weights of standard deviation 0.02 and at eps 1e-3, a hundred steps
of lr 0 leave weights off by 6e-7 of that in fp32 and by 4e-2 of it in bf16 (root mean square; it
grows as the root of the steps), and in bf16 2 or 3 of 100 weights of a norm, near 1, are moved at
all. Here a leaf is moved when the module that owns it begins its forward, after its bytes have been
copied, and the bytes are put back when that forward ends: exactly, in every type. It costs a copy
of one matrix at a time; one larger than `parked_bytes` (the embeddings and the head of a 7B) is
copied to the host, once a step, and comes back after each forward.

Not exact in bf16: w + eps z and the update are rounded up or down at random, whatever `weights`
says, so that they are right in the mean: where an ulp is above eps, a guess has more variance than
z alone would give it. In fp32 both are rounded to nearest, once. z is drawn on the device it is
used on: a GPU draws other numbers than a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..fields import CountOrNone, Range, Seed
from ..until.until import Updater
from ..weights.storage import random_bits, round_up_or_down
from .keyed_random import generator, normal

SLICE = 16 << 20
"""Most weights that are moved at a time: z, which becomes the moved weight, and in bf16 the bits it
is rounded by and what they are made of, 4 bytes each."""


@dataclass(frozen=True)
class Exact:
    """The gradient, by backward."""

    backward: ClassVar[bool] = True
    """Whether forward has to keep what a backward needs."""

    @property
    def cycle(self) -> int:
        """Steps after which the kinds of steps repeat; the first of them is of the kind that holds
        most."""
        return 1

    def hurried(self) -> Exact:
        """The same with a cycle of two steps at most, for who wants to see every kind of step
        soon."""
        return self

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """Adds to the model what forming the gradient needs."""
        return model

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
        """The updater of one part's leaves, by name."""
        return place.updater(until, rule, named, lr, model, observer)


@dataclass(frozen=True)
class ZerothOrder(Exact):
    """g z from two forwards, see above. No state at all."""

    backward: ClassVar[bool] = False
    eps: Annotated[float, Range(1e-12, 1)] = 1e-3
    seed: Seed = 0
    parked_bytes: CountOrNone = 256 << 20
    """A leaf with more bytes waits on the host, not on the device, while it is moved."""

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
        assert not rule.state_bytes(named.values()), (
            "a guess goes with a rule that remembers nothing"
        )
        return Guess(self, model, named, observer)


class Guess(Updater):
    """Moves leaves by +eps z in the first run of a step and by -eps z in the second, and updates
    them by what that did."""

    runs = 2

    def __init__(
        self,
        options: ZerothOrder,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        observer: Observer,
    ):
        super().__init__([])
        self.options, self.named, self.observer = options, named, observer
        self._owners = _owners(model, named)
        self._handles: list = []
        self._sign, self._slope, self._unmoved = 0, None, set()
        self._parked: dict[Tensor, Tensor] = {}

    def begin(self, step: int, lr: float) -> None:
        self.step, self.lr, self._slope = step, lr, None
        self._parked.clear()

    def arm(self) -> None:
        for leaf in self.named.values():
            leaf.requires_grad_(
                False
            )  # no graph, and no bf16 copy that autocast would keep for one
        for module, leaves in self._owners.items():
            self._handles.append(
                module.register_forward_pre_hook(lambda *_, leaves=leaves: self._move(leaves))
            )
            self._handles.append(
                module.register_forward_hook(
                    lambda *_, leaves=leaves: self._put_back(leaves), always_call=True
                )
            )

    def disarm(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        self._sign, self._unmoved = 1 - 2 * number, set(self.named)
        try:
            yield
        finally:
            self._sign = 0
        if number == self.runs - 1:
            self._parked.clear()
        assert not self._unmoved, (
            "trained, but no forward of the module that owns it was seen:"
            f" {', '.join(sorted(self._unmoved))}"
        )

    @torch.no_grad()
    def take(self, loss: Tensor) -> None:
        """Adds what this loss (0-d, weighted by its micro-batch's share) says about g, on the
        device."""
        part = loss.detach() * (self._sign / (2 * self.options.eps))
        self._slope = part if self._slope is None else self._slope.add_(part)

    @torch.no_grad()
    def apply(self) -> None:
        for name, leaf in self.named.items():
            self._add(name, leaf, self._slope * -self.lr, "update")
        self._slope = None

    def _add(self, name: str, leaf: Tensor, factor: Tensor | float, purpose: str) -> None:
        """w <- w + factor z, a slice at a time. Where weights are bf16, both runs round with the
        same numbers, which leaves their difference less to vary by."""
        for start in range(0, leaf.numel(), SLICE):
            piece, key = (
                leaf.detach().view(-1)[start : start + SLICE],
                (
                    self.options.seed,
                    self.step,
                    name,
                    start,
                ),
            )
            moved = normal(piece.shape, generator(leaf.device, *key)).mul_(factor).add_(piece)
            if piece.dtype is torch.bfloat16:
                bits = random_bits(piece.numel(), start, repr((*key, purpose)), leaf.device)
                moved = round_up_or_down(moved, bits)
            piece.copy_(moved)

    @torch.no_grad()
    def _move(self, leaves: Mapping[str, Tensor]) -> None:
        for name, leaf in leaves.items() if self._sign else ():
            self._park(leaf)
            self._unmoved.discard(name)
            self._add(name, leaf, self._sign * self.options.eps, "move")

    def _park(self, leaf: Tensor) -> None:
        if leaf in self._parked:
            return
        if leaf.nbytes <= self.options.parked_bytes:
            self._parked[leaf] = leaf.detach().clone()
            return
        with self.observer.region("host"):
            host = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
        self._parked[leaf] = host.copy_(leaf, non_blocking=leaf.is_cuda)

    @torch.no_grad()
    def _put_back(self, leaves: Mapping[str, Tensor]) -> None:
        for leaf in leaves.values():
            if leaf in self._parked:
                leaf.copy_(self._parked[leaf], non_blocking=leaf.is_cuda)
                if leaf.nbytes <= self.options.parked_bytes:
                    del self._parked[leaf]  # the host's copies serve the second run as well


def _owners(
    model: nn.Module, named: Mapping[str, nn.Parameter]
) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """module -> its own leaves: parameters of it, or rows that share a parameter's storage."""
    by_storage = {
        p.untyped_storage()._cdata: module
        for module in model.modules()
        for p in module.parameters(recurse=False)
    }
    owners: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for name, leaf in named.items():
        owners.setdefault(by_storage[leaf.untyped_storage()._cdata], {})[name] = leaf
    return owners
