"""Axis `grads`: how a gradient is formed. The default: exactly, by a backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...observer import Observer
from ..until.until import Updater


@dataclass(frozen=True)
class Exact:
    """The gradient, by backward."""

    backward: ClassVar[bool] = True
    """Whether forward has to keep what a backward needs."""

    @property
    def cycle(self) -> int:
        """Steps after which the kinds of steps repeat; the first of them is of the kind that holds
        most bytes."""
        return 1

    def with_short_cycle(self) -> Exact:
        """The same with a cycle of two steps at most, so that every kind of step comes soon."""
        return self

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with the modules that form the gradient added."""
        return model

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
        """The updater of a part's leaves, by name."""
        return place.updater(until, rule, named, lr, model, observer)
