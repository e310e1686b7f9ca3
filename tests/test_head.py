"""The fused head: the plain head's loss and gradients, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from micro import train
from vramlab.axes import fused_head
from vramlab.axes.fused_head import FusedHeadLoss, Options
from vramlab.axes.rows import spans
from vramlab.baichuan.model import causal_loss


class Collects:
    """Takes the rows of a gradient and keeps them, so that it can be seen."""

    sweeps = 2

    def begin_rows(self, leaf):
        self.seen = [torch.full_like(leaf, torch.nan) for _ in range(self.sweeps)]

    def rows(self, leaf, start, stop, grad, sweep):
        assert not grad.requires_grad and grad.dtype == leaf.dtype
        self.seen[sweep][start:stop] = grad

    def end_rows(self, leaf):
        assert torch.equal(*self.seen), "the same rows in every sweep"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused_head, "LEAST_ROWS", 4)
    monkeypatch.setattr(fused_head, "LEAST_PRODUCTS", 60)
    monkeypatch.setattr(fused_head, "ROWS", 5)


def _case(dtype, tokens=13, hidden=6, vocabulary=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[[2, 7]] = -100
    return h, w, labels


def _fused(h, weight, leaf, labels, z=0.0, start=0, taker=None):
    return FusedHeadLoss.apply(h, weight.detach(), leaf, labels, Options(h.dtype, z, start, taker))


def _plain(h, w, labels, z=0.0):
    return causal_loss(F.linear(h, F.normalize(w))[None], labels[None], z)


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["head", "rows", "nothing"])
@pytest.mark.parametrize("hidden", [True, False])
def test_gradcheck(z, trained, hidden):
    if trained == "nothing" and not hidden:
        return
    h, w, labels = _case(torch.float64, 9, 3, 13)
    h.requires_grad_(hidden)
    weight = w.detach()
    leaf, start = {"head": (w, 0), "rows": (weight[5:11].requires_grad_(), 5), "nothing": (None, 0)}[trained]
    inputs = [tensor for tensor in (h, leaf) if tensor is not None]

    def loss(*_):
        return _fused(h, weight, leaf, labels, z, start)

    assert torch.autograd.gradcheck(loss, inputs)


def test_identities_of_the_axis():
    for row in ({"until": "backward"}, {"until": "backward", "rule": "sgd"}, {"trains": {"chunks": {"count": 5}}}):
        (plain, weights, _), (fused, others, _) = train(row), train({**row, "head": "fused"})
        assert fused == pytest.approx(plain, rel=1e-5)
        for name in weights:
            torch.testing.assert_close(others[name], weights[name], rtol=1e-4, atol=1e-5)


def test_spans_tile():
    assert spans(10, 4) == [(0, 3), (3, 6), (6, 10)] and spans(4, 9) == [(0, 4)] and spans(0, 3) == []
