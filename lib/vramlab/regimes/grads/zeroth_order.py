"""Gradients guessed from two forwards: MeZO, Malladi 2023, arXiv:2305.17333.

With z standard normal, one number for each weight, and g 0-d:

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)            w <- w - lr g z

The expectation of g z is the gradient, up to eps^2; its variance grows with the number of weights,
hence the papers' lr of 1e-6. In bytes: no activation is kept and no gradient formed; z is drawn
again from (seed, step, leaf, slice) wherever it is needed and is never longer than `SLICE` numbers.

How weights are moved, and moved back. The published code adds eps z to every weight, subtracts 2
eps z and adds eps z again. With weights of standard deviation 0.02 and eps 1e-3, a hundred steps of
lr 0 leave weights off by 6e-7 of that in fp32 and by 4e-2 of it in bf16 (root mean square; it grows
as the root of the steps), and in bf16 2 or 3 of 100 weights of a norm, near 1, are moved at all.
Here a leaf is moved when the module that owns it begins its forward, after its bytes have been
copied, and the bytes are put back when that forward ends: exactly, in every type. That costs a copy
of a matrix at a time. A matrix larger than `parked_bytes` (the embeddings and the head of a 7B)
is copied to the host, once a step, and comes back after each forward.

Not exact in bf16: w + eps z and the update are rounded up or down at random, whatever `weights`
says, so that they are right in the mean; where an ulp is above eps, a guess has more variance than
z alone would give it. In fp32 both are rounded to nearest, once. z is drawn on the device that uses
it: a GPU draws other numbers than a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..fields import CountOrNone, Range, Seed
from ..until.until import Updater
from ..weights.storage import random_bits, round_up_or_down
from .exact import Exact
from .keyed_random import normal

SLICE = 16 << 20
"""Most weights that are moved at a time. For each there is z, which becomes the moved weight, and
in bf16 the bits that round it and their intermediate, 4 bytes each."""

NamedLeaves = Mapping[str, nn.Parameter]


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
        place: Any,
        until: Any,
        rule: Any,
        model: nn.Module,
        named: NamedLeaves,
        lr: float,
        observer: Observer,
    ) -> Updater:
        assert not rule.state_bytes(named.values()), (
            "grads: zeroth_order needs a rule without state"
        )
        return ZerothOrderUpdater(self, model, named, observer)


class ZerothOrderUpdater(Updater):
    """Moves leaves by +eps z in the first run of a step and by -eps z in the second, and updates
    them from the difference of the losses."""

    runs = 2

    def __init__(
        self, options: ZerothOrder, model: nn.Module, named: NamedLeaves, observer: Observer
    ):
        super().__init__([])
        self.options, self.named, self.observer = options, named, observer
        self._owners = _owners(model, named)
        self._sign, self._handles, self._unmoved = 0, list[Any](), set[str]()
        self._slope: Any = None
        self._parked: dict[Tensor, Tensor] = {}

    def begin(self, step: int, lr: float) -> None:
        self.step, self.lr, self._slope = step, lr, None
        self._parked.clear()

    def arm(self) -> None:
        for leaf in self.named.values():
            # no graph, and no bf16 copy that autocast would keep for one
            leaf.requires_grad_(False)
        for module, leaves in self._owners.items():
            move, put_back = partial(self._move, leaves), partial(self._put_back, leaves)
            self._handles += [
                module.register_forward_pre_hook(move),
                module.register_forward_hook(put_back, always_call=True),
            ]

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
            "these leaves train, but the module that owns them ran no forward:"
            f" {', '.join(sorted(self._unmoved))}"
        )

    @torch.no_grad()
    def take(self, loss: Tensor) -> None:
        """Adds to g, on the device, this loss (0-d, weighted by its micro-batch's share)."""
        part = loss.detach() * (self._sign / (2 * self.options.eps))
        self._slope = part if self._slope is None else self._slope.add_(part)

    @torch.no_grad()
    def apply(self) -> None:
        for name, leaf in self.named.items():
            self._add(name, leaf, self._slope * -self.lr, "update")
        self._slope = None

    def _add(self, name: str, leaf: Tensor, factor: Tensor | float, purpose: str) -> None:
        """w <- w + factor z, a slice at a time. In bf16 both runs round with the same numbers,
        which lowers the variance of their difference."""
        for start in range(0, leaf.numel(), SLICE):
            piece = leaf.detach().view(-1)[start : start + SLICE]
            key = (self.options.seed, self.step, name, start)
            moved = normal(piece.shape, leaf.device, *key).mul_(factor).add_(piece)
            if piece.dtype is torch.bfloat16:
                bits = random_bits(piece.numel(), start, repr((*key, purpose)), leaf.device)
                moved = round_up_or_down(moved, bits)
            piece.copy_(moved)

    @torch.no_grad()
    def _move(self, leaves: NamedLeaves, *_) -> None:
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
    def _put_back(self, leaves: NamedLeaves, *_) -> None:
        for leaf in leaves.values():
            if leaf in self._parked:
                leaf.copy_(self._parked[leaf], non_blocking=leaf.is_cuda)
                if leaf.nbytes <= self.options.parked_bytes:
                    del self._parked[leaf]  # the host's copies serve the second run as well


def _owners(model: nn.Module, named: NamedLeaves) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """module -> its own leaves: its parameters, or rows that share a parameter's storage."""
    by_storage = {
        p.untyped_storage()._cdata: module
        for module in model.modules()
        for p in module.parameters(recurse=False)
    }
    owners: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for name, leaf in named.items():
        owners.setdefault(by_storage[leaf.untyped_storage()._cdata], {})[name] = leaf
    return owners
