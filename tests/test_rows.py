"""What every row of params/regimes.yml has to obey; a new row is tried by all of it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from micro import batch, model, ranks
from vramlab.regimes.regime import read_regimes
from vramlab.runs.passes import _watched
from vramlab.training.trainer import Schedule, Trainer

ROWS = {name: _watched(row) for name, row in read_regimes().items()}
STEPS, STOP = 7, 3  # with turns of two steps at most, the stop lies inside one


def _trainer(row) -> Trainer:
    return Trainer(model(num_hidden_layers=4), row, Schedule(row.lr, STEPS))


def _steps(trainer, first: int, last: int) -> list[float]:
    return [float(trainer.step([batch(step)])) for step in range(first, last)]


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not(name):
    with ranks(ROWS[name]):
        whole = _trainer(ROWS[name])
        losses = _steps(whole, 0, STEPS)
        first, second = _trainer(ROWS[name]), _trainer(ROWS[name])
        halves = _steps(first, 0, STOP)
        saved = copy.deepcopy(first.state_dict())
        with torch.no_grad():  # nothing of the first may be needed any more
            [tensor.zero_() for tensor in first.model.state_dict().values()]
        second.load_state_dict(saved)
        assert halves + _steps(second, STOP, STEPS) == losses
        expected, found = whole.finish().state_dict(), second.finish().state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ROWS)
def test_state_is_what_is_promised_and_no_gradient_outlives_its_step(name):
    with ranks(ROWS[name]):
        trainer = _trainer(ROWS[name])
        _steps(trainer, 0, 2)
        promised = sum(
            trainer.regime.rule_for(trainer.model, turn.leaves.named).state_bytes(
                turn.leaves.named.values()
            )
            for turn in trainer._turns.values()
        )
        assert trainer.optimizer_state_bytes() == promised
        assert not any(
            leaf.grad is not None
            for turn in trainer._turns.values()
            for leaf in turn.leaves.named.values()
        )
        assert not any(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_it_does_and_where_it_is_from(name):
    assert ROWS[name].says.endswith(".") and ROWS[name].source


def test_a_state_is_not_loaded_over_steps():
    trainer = _trainer(ROWS["full"])
    state = copy.deepcopy(trainer.state_dict())
    _steps(trainer, 0, 1)
    with pytest.raises(ValueError, match="1 steps are done"):
        trainer.load_state_dict(state)
    assert dataclasses.asdict(trainer.schedule)["steps"] == STEPS
