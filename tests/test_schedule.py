"""The learning rate by step, and each micro-batch's share of the labels, by value."""

from __future__ import annotations

import pytest
import torch

import micro
from vramlab.regimes.regime import read_row
from vramlab.training.trainer import Schedule, Trainer


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            Schedule(1.0, 10, warmup=0.2, floor=0.1),
            {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.55, 10: 0.1, 11: 0.1, 99: 0.1},
        ),
        (Schedule(2.0, 100), {0: 2 / 6, 4: 10 / 6, 5: 2.0, 6: 2.0, 53: 2 * 0.55, 100: 0.2}),
        (Schedule(1.0, 8, warmup=0.0, floor=0.0), {0: 1.0, 1: 1.0, 8: 0.0}),
        (Schedule(1.0, 1), {0: 1.0, 1: 1.0, 2: 0.1}),
        (Schedule(3.0, 40, warmup=0.5, floor=1.0), {9: 1.5, 19: 3.0, 20: 3.0, 40: 3.0}),
        (
            Schedule(1.0, 5, warmup=0.2, floor=0.0),
            {1: 1.0, 2: (2 + 2**0.5) / 4, 3: 0.5, 4: (2 - 2**0.5) / 4},
        ),
    ],
)
def test_a_schedule_by_hand(schedule, rates):
    assert {step: schedule.at(step) for step in rates} == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "shares"),
    [
        (((-100, 3, 4, -100), (-100, 5, -100, -100)), [2 / 3, 1 / 3]),
        (
            ((7, 3, 4, 5), (7, 3, -100, -100)),
            [3 / 4, 1 / 4],
        ),  # a row's first token is predicted by nothing
        (((7, -100, -100, 5), (-100, -100, 1, 5)), [1 / 3, 2 / 3]),
    ],
)
def test_a_micro_batchs_share_is_of_the_labels_that_the_loss_counts(labels, shares):
    trainer = Trainer(micro.model(), read_row("row", {"accumulate": 2}), Schedule(1e-3, 2))
    assert trainer._shares([{"labels": torch.tensor([row])} for row in labels]) == pytest.approx(
        shares
    )
