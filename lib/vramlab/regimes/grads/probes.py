"""Guessed gradients compared with true ones, on the same batch, while training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...observer import Observer
from ..until.until import Updater

Direction = Mapping[str, Tensor]
"""Site -> a tensor of the shape that trains there, for example its gradient."""


class Probes:
    """Guessed directions compared with the true gradient on the same batch. Results stay on the
    device until `rows` reads them."""

    def __init__(self):
        self._by_step: dict[int, tuple[list[str], Tensor, Tensor | None]] = {}

    def add(
        self, step: int, guessed: Direction, true: Direction, drop_ratio: Tensor | None = None
    ) -> None:
        """One probe: both directions by site, of equal shapes; `drop_ratio` is of all sites
        together. Replaces the probe of an earlier micro-batch of the step."""
        pairs = ((guessed[site].detach().float(), true[site].detach().float()) for site in true)
        sums = torch.stack(
            [torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]) for a, b in pairs]
        )
        self._by_step[step] = list(true), sums, drop_ratio

    def rows(self) -> list[dict]:
        """One row for each probe and site, and one for all sites together, called `all`.

        Columns: `step`, `site`, `cosine`, `norm_ratio` (guessed over true) and `drop_ratio`: how
        far the loss falls along the guess, over how far along the true gradient, by a step of the
        same length; NaN where it was not measured. A guess of zero has cosine 0.
        """
        return [row for step, probe in self._by_step.items() for row in _rows(step, *probe)]


def _rows(step: int, sites: list[str], sums: Tensor, drop_ratio: Tensor | None) -> list[dict]:
    drop = math.nan if drop_ratio is None else float(drop_ratio)
    return [
        {
            "step": step,
            "site": site,
            "cosine": dot / max((guess * true) ** 0.5, 1e-30),
            "norm_ratio": (guess / max(true, 1e-30)) ** 0.5,
            "drop_ratio": drop if site == "all" else math.nan,
        }
        for site, (dot, guess, true) in zip(
            [*sites, "all"], [*sums.tolist(), sums.sum(0).tolist()], strict=True
        )
    ]


class ProbingUpdater(Updater):
    """Updates as `inner` does, and compares guessed gradients with true ones before the update.

    `options` has the field `drop`. `recorded` keeps the arguments and the autocast of a
    micro-batch's forward, so that the same forward can be repeated.
    """

    def __init__(self, options: Any, model: nn.Module, inner: Updater, observer: Observer):
        super().__init__(inner.optimizers)
        self.options, self.model, self.inner, self.observer = options, model, inner, observer

    def begin(self, step: int, lr: float) -> None:
        self.inner.begin(step, lr)
        self.step = step

    def apply(self) -> None:
        self.inner.apply()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the forward; from then to its end `repeated_loss` can be used."""
        handle = self.model.register_forward_pre_hook(self._record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._kwargs: Any = None

    def _record(self, _, __, kwargs: dict) -> None:
        self._kwargs, device = kwargs, kwargs["input_ids"].device.type
        enabled = torch.is_autocast_enabled(device)
        self._autocast = (device, torch.get_autocast_dtype(device)) if enabled else None

    def repeated_loss(self) -> Tensor:
        """The loss of the recorded forward, which runs again with the weights of now."""
        autocast = torch.autocast(*self._autocast) if self._autocast else nullcontext()
        with self.observer.phase("forward"), autocast:
            return self.model(**self._kwargs).loss

    def loss_after(self, change: Direction) -> Tensor:
        """The repeated loss after `change` has been subtracted from what is trained."""
        raise NotImplementedError

    def drop_ratio(self, guessed: Direction, true: Direction) -> Tensor | None:
        """(fall of the loss along the guess) / (fall along the true gradient), 0-d, on the device;
        None without `options.drop`.

        Both by a step so long that along the true gradient the loss would fall by one percent if it
        were linear. Takes three forwards; of several micro-batches, the last one's.
        """
        if not self.options.drop:
            return None
        loss = self.loss_after({})
        length = 0.01 * loss / _norm(true)
        falls = [
            loss
            - self.loss_after(
                {site: part * (length / _norm(direction)) for site, part in direction.items()}
            )
            for direction in (guessed, true)
        ]
        return falls[0] / falls[1]


def _norm(direction: Direction) -> Tensor:
    return (
        torch.stack([part.float().square().sum() for part in direction.values()])
        .sum()
        .sqrt()
        .clamp_min(1e-30)
    )
