"""Guessed gradients held against true ones, on the same batch, while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ...observer import Observer


class Probes:
    """Guessed directions held against the true gradient on the same batch. Kept on the device until
    somebody reads."""

    def __init__(self):
        self._made: dict[int, tuple[list[str], Tensor, Tensor | None]] = {}

    def add(
        self,
        step: int,
        guessed: Mapping[str, Tensor],
        true: Mapping[str, Tensor],
        drop_ratio: Tensor | None = None,
    ) -> None:
        """One probe: both directions by site, of equal shapes; `drop_ratio` is of all sites
        together. Replaces the one that the step has, if micro-batches have added to it."""
        sums = torch.stack(
            [
                torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
                for a, b in (
                    (guessed[site].detach().float(), true[site].detach().float()) for site in true
                )
            ]
        )
        self._made[step] = list(true), sums, drop_ratio

    def rows(self) -> list[dict]:
        """One row a probe and site, and one for all sites together, called `all`: `step`, `site`,
        `cosine`, `norm_ratio` (guessed over true) and `drop_ratio`: how far the loss falls along
        the guess, over how far along the true gradient, by a step of the same length; NaN where not
        asked for. A guess of zero has cosine 0."""
        return [row for step, probe in self._made.items() for row in _rows(step, *probe)]


def _rows(step: int, sites: list[str], sums: Tensor, drop_ratio: Tensor | None) -> list[dict]:
    rows = []
    for site, (dot, guess, true) in zip(
        [*sites, "all"], [*sums.tolist(), sums.sum(0).tolist()], strict=True
    ):
        rows.append(
            {
                "step": step,
                "site": site,
                "cosine": dot / max((guess * true) ** 0.5, 1e-30),
                "norm_ratio": (guess / max(true, 1e-30)) ** 0.5,
                "drop_ratio": (
                    float(drop_ratio) if site == "all" and drop_ratio is not None else float("nan")
                ),
            }
        )
    return rows


def drop_ratio(
    loss_after: Callable[[Mapping[str, Tensor]], Tensor],
    guessed: Mapping[str, Tensor],
    true: Mapping[str, Tensor],
) -> Tensor:
    """(fall of the loss along the guess) / (fall along the true gradient), both by a step so long
    that along the true gradient the loss would fall by one percent were it linear. `loss_after`
    says the loss once its argument has been subtracted from what is trained. 0-d, on the device.
    Three forwards; of several micro-batches, the last one's.
    """
    loss = loss_after({})
    length = 0.01 * loss / _norm(true)
    falls = [
        loss
        - loss_after({site: part * (length / _norm(direction)) for site, part in direction.items()})
        for direction in (guessed, true)
    ]
    return falls[0] / falls[1]


def _norm(direction: Mapping[str, Tensor]) -> Tensor:
    return (
        torch.stack([part.float().square().sum() for part in direction.values()])
        .sum()
        .sqrt()
        .clamp_min(1e-30)
    )


class Again:
    """The forward of the micro-batch that is on, to be run again: same arguments, same autocast."""

    def __init__(self, model: nn.Module, observer: Observer):
        self.model, self.observer = model, observer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward; from then to its end, `loss` may be asked for."""
        handle = self.model.register_forward_pre_hook(self._called, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._kwargs = None

    def _called(self, _, __, kwargs: dict) -> None:
        self._kwargs, kind = kwargs, kwargs["input_ids"].device.type
        self._autocast = (
            (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        )

    def loss(self) -> Tensor:
        with (
            self.observer.phase("forward"),
            torch.autocast(*self._autocast) if self._autocast else nullcontext(),
        ):
            return self.model(**self._kwargs).loss
