"""What is watched of the head at each step, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vramlab.baichuan.head import NormHead
from vramlab.training.logit_watch import LogitWatch

LN2, LN3 = math.log(2), math.log(3)


def test_a_steps_logits_are_those_of_its_labelled_tokens():
    head = NormHead(2, 3, norm=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    watch = LogitWatch(torch.nn.Sequential(head), z_loss_weight=0.5)
    hidden = torch.tensor(
        [[[0.0, 0.0], [9.0, 0.0], [0.0, LN2]]]
    )  # logits are these two numbers and 0
    losses = [
        head(hidden, torch.tensor([labels]), 0.5)[0].item()
        for labels in ([2, -100, 1], [0, -100, -100])
    ]
    assert losses == pytest.approx([(LN3 + LN2) / 2 + 0.5 * LN2**2 / 2, LN3])
    assert watch.take() == pytest.approx(
        {"highest_logit": LN2, "cross_entropy": (LN3 + LN2 + LN3) / 3}
    )
    assert all(math.isnan(value) for value in watch.take().values()), "nothing was looked at since"
    watch.stop()
    head(hidden, torch.tensor([[0, 0, 0]]), 0.5)
    assert math.isnan(watch.take()["highest_logit"])
