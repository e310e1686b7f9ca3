"""Loops of peers, rules' own updates in rows, and how often parameters are updated, by value."""

from __future__ import annotations

from types import SimpleNamespace as Its

import pytest
import torch

from benchmarks import peer_loops
from benchmarks.peer_loops import Job, Seen
from vramlab.observer import Observer
from vramlab.regimes import updates
from vramlab.regimes.rule.rules import AdamW, Sgd
from vramlab.regimes.rule.torch_optimizers import TorchAdamW, TorchSgd
from vramlab.regimes.trains.leaves import Leaf


def test_a_loop_ends_a_step_for_every_batch_and_reads_its_losses_at_the_end(monkeypatch):
    asked = []

    class Trainer:
        def __init__(self, model, regime, schedule, seed, observer):
            asked.append((model, regime, [schedule.at(step) for step in range(3)], seed))

        def step(self, batches):
            return sum(batch["input_ids"].sum() for batch in batches)

    monkeypatch.setattr(peer_loops, "Trainer", Trainer)
    data = [{"input_ids": torch.full((2,), at)} for at in range(5)]
    seen = peer_loops.ours("row")(Job("model", data, 2, 3, 0.5, 7), Observer())
    assert asked == [("model", "row", [0.5, 0.5, 0.5], 7)]
    assert (
        seen.losses == [2, 10, 8] and len(seen.ends_s) == 4 and seen.ends_s == sorted(seen.ends_s)
    )
    assert Seen().losses == []


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_sgd_in_rows_shrinks_then_moves(weight_decay):
    leaf = torch.nn.Parameter(torch.tensor([[8.0], [8.0], [8.0]]))
    rule = TorchSgd([leaf], lr=0.5, weight_decay=weight_decay)
    rule.rows(leaf, 1, 2, torch.tensor([[4.0]]), 0)
    assert leaf.flatten().tolist() == [8.0, 8.0 * (1 - 0.5 * weight_decay) - 2.0, 8.0]
    leaf.grad = torch.full((3, 1), 2.0)
    before = leaf.detach().clone()
    rule.step()
    assert torch.equal(leaf.detach(), before * (1 - 0.5 * weight_decay) - 1.0)
    leaf.grad = None
    rule.step()


def test_adamw_in_rows_is_adamw():
    whole, rows = (torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]])) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5, "fused": True}
    one, other = TorchAdamW([whole], **settings), TorchAdamW([rows], **settings)
    for scale in (1.0, -3.0):
        grad = scale * torch.tensor([[1.0, 2.0], [0.5, -1.0]])
        whole.grad = grad
        one.step()
        other.begin_rows(rows)
        for at in range(2):
            other.rows(rows, at, at + 1, grad[at : at + 1], 0)
        other.end_rows(rows)
    assert torch.equal(whole, rows) and float(other.state[rows]["step"]) == 2.0
    assert torch.equal(one.state[whole]["exp_avg_sq"], other.state[rows]["exp_avg_sq"])


def test_state_bytes_are_two_moments_and_a_count_or_nothing():
    leaves = [torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16)]
    assert (
        AdamW().bind().state_bytes(leaves) == (2 * 12 * 4 + 4) + (2 * 5 * 2 + 4)
        and Sgd().bind().state_bytes(leaves) == 0
    )
    assert Sgd().bind().make([leaves[0]], 0.1).param_groups[0]["fused"] is True
    assert Sgd().bind().make(leaves, 0.1).param_groups[0]["fused"] is False


def test_parameters_are_updated_as_often_as_their_part_has_its_turn(monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(rows, 3)) for rows in (4, 6))

    def prepare(model, seed):
        model.extra = torch.nn.Parameter(torch.zeros(2, 5))
        return model

    def leaf(name, rows, start, stop):
        return Leaf(name, start, stop, rows)

    monkeypatch.setattr(updates, "BaichuanForCausalLM", Model)
    parts = [[leaf("a", 4, 0, 4), leaf("extra", 2, 0, 1)], [leaf("b", 6, 2, 5)]]
    trains = Its(
        prepare=prepare, parts=lambda model: parts, active=lambda step, count: (step % 3 % count,)
    )
    row = Its(trains=trains, grads=Its(prepare=lambda model, seed: model))
    # of 5 steps the first part has 0, 2, 3 and the second 1, 4: 12 numbers 3 times, 9 twice, 9
    # never
    assert updates.updates(Its(config=None), row, 5) == updates.Updates(
        (12 * 3 + 9 * 2) / 30, 0, 3, 5
    )
    parts[1] = [leaf("b", 6, 0, 6)]
    assert updates.updates(Its(config=None), row, 5) == updates.Updates(
        (12 * 3 + 18 * 2) / 30, 2, 3, 5
    )
