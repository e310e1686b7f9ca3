"""MeZO: weights are put back bit for bit, the guess is the slope along z, and z need never be
kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from micro import batch, model
from vramlab.capture.meter import Meter
from vramlab.observer import Observer
from vramlab.regimes.grads.keyed_random import normal
from vramlab.regimes.grads.zeroth_order import ZerothOrder, ZerothOrderUpdater
from vramlab.regimes.regime import read_row
from vramlab.training.trainer import Schedule, Trainer


def _trainer(lr, steps=1, tiny=None, observer=None, **row):
    row = {"grads": "zeroth_order", "rule": "sgd", **row}
    return Trainer(
        tiny or model(), read_row("row", row), Schedule(lr, steps, warmup=0), observer=observer
    )


@pytest.mark.parametrize("parked_bytes", [0, 1 << 20])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("trains", ["all", {"chunks": {"count": 3}}], ids=str)
def test_weights_are_put_back_bit_for_bit(weights, parked_bytes, trains):
    trainer = _trainer(
        0.0,
        weights=weights,
        trains=trains,
        grads={"zeroth_order": {"eps": 0.1, "parked_bytes": parked_bytes}},
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    losses, forward = [], trainer._forward
    trainer._forward = lambda one: losses.append(forward(one)) or losses[-1]
    trainer.step([batch(1)])
    assert losses[0] != losses[1]  # they did move
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()
    )


def _z(trainer):
    named = trainer.model.named_parameters()
    return {name: normal((p.numel(),), p.device, 0, 0, name, 0).view_as(p) for name, p in named}


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_the_guess_is_the_slope_along_z(head):
    tiny, lr = model(), 0.1
    tiny(**batch(1)).loss.backward()
    gradient = {name: p.grad for name, p in tiny.named_parameters()}
    trainer = _trainer(lr, grads={"zeroth_order": {"eps": 3e-4}}, head=head)
    before, z = (
        {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        _z(trainer),
    )
    trainer.step([batch(1)])
    slope = sum((gradient[name] * z[name]).sum() for name in z)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(
            p.detach(),
            before[name] - lr * slope * z[name],
            rtol=5e-3,
            atol=5e-3 * lr * abs(float(slope)),
        )


def test_micro_batches_add_up_to_the_large_batch():
    small, large = batch(1, rows=1), batch(2, rows=3)
    together = {key: torch.cat([small[key], large[key]]) for key in small}
    one, two = _trainer(0.1), _trainer(0.1, accumulate=2)
    one.step([together])
    two.step([small, large])
    for name, p in one.model.named_parameters():
        torch.testing.assert_close(
            dict(two.model.named_parameters())[name], p, rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not(weights):
    whole = _trainer(0.1, 4, weights=weights)
    for step in range(4):
        whole.step([batch(step)])
    first = _trainer(0.1, 4, weights=weights)
    for step in range(2):
        first.step([batch(step)])
    second = _trainer(0.1, 4, tiny=first.finish(), weights=weights)
    second.steps_done = 2
    for step in range(2, 4):
        second.step([batch(step)])
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True)
    )


def test_bf16_weights_near_one_feel_a_small_eps_in_the_mean():
    ones = nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
    owner = nn.Module()
    owner.weight = ones
    guess = ZerothOrderUpdater(ZerothOrder(), owner, {"weight": ones}, Observer())
    guess.begin(0, 0.0)
    z = normal((200_000,), ones.device, 0, 0, "weight", 0)
    assert (
        not (torch.ones(200_000) + 1e-3 * z).bfloat16().ne(1).float().mean() > 0.1
    )  # to nearest, hardly any would
    guess._add("weight", ones, 1e-3, "move")
    moved = ((ones.detach().float() - 1) * z).mean() / z.square().mean()
    assert moved == pytest.approx(1e-3, rel=0.05)


def test_nothing_of_a_gradients_kind_is_ever_alive():
    """Beside weights: one matrix's copy, its z, and what a forward without backward needs."""
    meter = Meter()
    trainer = _trainer(0.1, observer=meter)
    with meter:
        for step in range(2):
            trainer.step([batch(step)])
    frame = meter.frame()
    assert not frame["category"].isin(["gradients", "optimizer"]).any()
    assert set(frame[frame["category"] == "activations"]["bytes"]) == {4}  # the loss
    largest = max(p.nbytes for p in trainer.model.parameters())
    assert frame[frame["phase"] == "update"].query("event == 'alloc'")["bytes"].max() <= largest
    assert frame[frame["phase"] == "backward"].query("event == 'alloc'")["bytes"].max() <= 8


def test_a_leaf_whose_module_is_never_run_is_not_guessed_at():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    idle = Idle()
    guess = ZerothOrderUpdater(ZerothOrder(), idle, dict(idle.named_parameters()), Observer())
    guess.arm()
    guess.begin(0, 0.1)
    with pytest.raises(AssertionError, match="idle.weight"), guess.run(0):
        idle.used(torch.ones(1, 2))
