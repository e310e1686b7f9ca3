"""What clipping inside backward hands on of a gradient that comes in rows: how often, when, and how
much, by value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from micro import train
from vramlab.regimes.until import clipping
from vramlab.regimes.until.clipping import ByValue, LastNorm, NormOfAll, ScaledNorm, Unclipped
from vramlab.regimes.until.row_protocol import feed

FIRST, SECOND = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
"""Rows of a gradient whose norm is 5."""


class Recorder:
    """An optimizer that takes rows in two sweeps, and writes down what it is called with."""

    sweeps = 2

    def __init__(self):
        self.calls = []

    def begin_rows(self, leaf):
        self.calls.append("begin")

    def rows(self, leaf, start, stop, grad, sweep):
        self.calls.append((sweep, start, grad.flatten().tolist()))

    def end_rows(self, leaf):
        self.calls.append("end")


def one_step(clipper, scale=1.0):
    """What the optimizer is called with in one step, run by run."""
    clipper.begin()
    leaf, runs = nn.Parameter(torch.zeros(2, 2)), []
    for number in range(clipper.runs):
        recorder = Recorder()
        with clipper.run(number):
            feed(
                clipper.wrap(recorder),
                leaf,
                [(0, 1), (1, 2)],
                lambda start, stop: scale * (FIRST, SECOND)[start],
            )
        runs.append(recorder.calls)
    return runs


def seen(factor):
    """The calls of one update whose rows are multiplied by `factor`."""
    rows = [
        [
            (sweep, 0, pytest.approx([3.0 * factor, 0.0])),
            (sweep, 1, pytest.approx([0.0, 4.0 * factor])),
        ]
        for sweep in range(2)
    ]
    return ["begin", *rows[0], *rows[1], "end"]


def test_an_optimizer_that_is_not_clipped_is_called_once():
    assert one_step(Unclipped()) == [seen(1.0)]


def test_clipping_by_value_cuts_each_number():
    sweeps = [[(sweep, 0, [2.0, 0.0]), (sweep, 1, [0.0, 2.0])] for sweep in range(2)]
    assert one_step(ByValue(2.0)) == [["begin", *sweeps[0], *sweeps[1], "end"]]


@pytest.mark.parametrize(("largest", "factor"), [(1.0, 1 / (5 + 1e-6)), (10.0, 1.0)])
def test_the_look_for_a_norm_calls_no_optimizer_and_the_update_calls_it_once(largest, factor):
    clipper = NormOfAll(largest)
    for _ in range(2):
        assert one_step(clipper) == [[], seen(factor)]


def test_the_last_steps_norm_needs_a_look_at_the_first_step_only():
    clipper = LastNorm(1.0)
    assert one_step(clipper) == [[], seen(0.2)]
    assert one_step(clipper, 2.0) == [seen(2.0 / 5)]
    assert one_step(clipper) == [seen(1.0 / 10)]


def test_a_scaled_loss_divides_the_learning_rate_and_leaves_the_gradient_alone():
    clipper = ScaledNorm(1.0, 8.0)
    assert one_step(clipper, 8.0) == [[], seen(8.0)]
    assert clipper.lr_factor == pytest.approx(1 / (5 + 1e-6) / 8) and clipper.scale == 8.0
    large = ScaledNorm(100.0, 8.0)
    one_step(large, 8.0)
    assert large.lr_factor == 1 / 8


def test_an_overflow_calls_no_optimizer_and_halves_the_scale():
    clipper = ScaledNorm(1.0, 8.0)
    assert (
        one_step(clipper, math.inf) == [[], []]
        and clipper.lr_factor == 0.0
        and clipper.scale == 8.0
    )
    assert one_step(clipper, 4.0) == [[], seen(4.0)] and clipper.scale == 4.0


def test_a_scale_doubles_after_so_many_good_steps_in_a_row(monkeypatch):
    monkeypatch.setattr(clipping, "GROWS_AFTER", 3)
    clipper, scales = ScaledNorm(1.0, 8.0), []
    for gradient in [1.0] * 8 + [math.inf] + [1.0] * 5:
        one_step(clipper, gradient)
        scales.append(clipper.scale)
    assert scales == [8.0] * 3 + [16.0] * 3 + [32.0] * 3 + [16.0] * 3 + [32.0] * 2


@pytest.mark.parametrize(("rule", "weights"), [("adamw", "fp32"), ("adafactor", "master")])
def test_clipping_inside_backward_is_clipping_at_its_end_for_rules_that_remember(rule, weights):
    """A look that reached the optimizer would count a step, or leave half of one behind."""
    inside, ended = (
        {"rule": rule, "weights": weights, "head": "fused", **how}
        for how in ({"until": {"backward": {"clip_norm": 0.05}}}, {"clip": 0.05})
    )
    losses, _, trainer = train(inside, lr=1e-3)
    wanted, _, other = train(ended, lr=1e-3)
    assert losses == pytest.approx(wanted, rel=1e-3)
    steps = [
        {
            float(entry["step"])
            for optimizer in turn.updater.optimizers
            for entry in optimizer.state.values()
        }
        for trained in (trainer, other)
        for turn in trained._turns.values()
    ]
    assert steps == [{4.0}, {4.0}]
