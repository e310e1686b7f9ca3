"""The fused head: the plain head's loss and gradients, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from micro import batch, train
from vramlab.baichuan.head import NormHead, causal_loss
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.regimes.head import chunks as head_chunks
from vramlab.regimes.head.fused import FusedHeadLoss, Options
from vramlab.regimes.head.head import FusedLoss
from vramlab.regimes.rule.rules import Sgd
from vramlab.regimes.trains import leaves
from vramlab.regimes.until.row_protocol import spans
from vramlab.regimes.weights import bf16_on_cpu as rounding


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
    monkeypatch.setattr(head_chunks, "LEAST_ROWS", 4)
    monkeypatch.setattr(head_chunks, "LEAST_PRODUCTS", 60)
    monkeypatch.setattr(head_chunks, "ROWS", 5)


def _case(dtype, tokens=13, hidden=6, vocabulary=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = (
        torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    w = (
        torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
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
    leaf, start = {
        "head": (w, 0),
        "rows": (weight[5:11].requires_grad_(), 5),
        "nothing": (None, 0),
    }[trained]
    inputs = [tensor for tensor in (h, leaf) if tensor is not None]

    def loss(*_):
        return _fused(h, weight, leaf, labels, z, start)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("z", [0.0, 0.3])
def test_rows_are_the_whole_gradients(z):
    """Taken in rows, whatever the sweep, they add up to the gradient that is formed whole; and
    backward can run twice."""
    h, w, labels = _case(torch.float64)
    dh, dw = torch.autograd.grad(_plain64(h, w, labels, z) * 0.7, (h, w))
    for start, stop in ((0, 37), (11, 20)):
        leaf, taker = w.detach()[start:stop].requires_grad_(), Collects()
        loss = _fused(h, w, leaf, labels, z, start, taker) * 0.7
        for _ in range(2):
            assert (
                torch.autograd.grad(loss, (h, leaf), retain_graph=True, allow_unused=True)[1]
                is None
            )
            torch.testing.assert_close(taker.seen[0], dw[start:stop], rtol=1e-9, atol=1e-12)
        loss = _fused(h, w, leaf, labels, z, start) * 0.7
        for _ in range(2):
            torch.testing.assert_close(
                torch.autograd.grad(loss, (h, leaf), retain_graph=True),
                (dh, dw[start:stop]),
                rtol=1e-9,
                atol=1e-12,
            )


def _plain64(h, w, labels, z=0.0):
    """The plain head in fp64: `causal_loss` is fp32."""
    logits = F.linear(h, F.normalize(w))
    loss = F.cross_entropy(logits, labels)
    return loss + z * logits.amax(-1).square()[labels != -100].mean() if z else loss


def test_rows_shorter_than_the_least_length_are_divided_by_it():
    h, w, labels = _case(torch.float64)
    with torch.no_grad():
        w[3], w[5] = 0, w[5] * 1e-13
    plain = torch.autograd.grad(_plain64(h, w, labels), (h, w))
    torch.testing.assert_close(
        torch.autograd.grad(_fused(h, w, w, labels), (h, w)), plain, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chunks", [1, 4, 20])
def test_errors_are_no_larger_than_the_plain_heads(dtype, chunks, monkeypatch):
    """Root mean square over draws of the relative error against fp64, of loss, dh and dW, taken
    whole and in rows."""
    monkeypatch.setattr(head_chunks, "ROWS", 100)
    monkeypatch.setattr(head_chunks, "LEAST_PRODUCTS", -(-120 // chunks) * 499)
    squares = torch.zeros(2, 4)
    for seed in range(6):
        h, w, labels = _case(dtype, 120, 40, 499, seed)
        wide = [tensor.detach().double().requires_grad_() for tensor in (h, w)]
        truth = _plain64(*wide, labels)
        truth = [truth, *torch.autograd.grad(truth * 0.37, wide)]
        with rounding.halves_formed_in_fp32():
            taker = Collects()
            (_fused(h.detach(), w, w, labels, taker=taker) * 0.37).backward()
            for index, loss in enumerate((_plain(h, w, labels), _fused(h, w, w, labels))):
                found = [loss, *torch.autograd.grad(loss * 0.37, (h, w))]
                errors = [
                    (a.double() - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)
                ]
                rows = (taker.seen[0].double() - truth[2]).norm() / truth[2].norm()
                squares[index] += (
                    torch.stack([*errors, rows if index else errors[2]]).detach().square()
                )
    plain, fused = squares.sqrt()
    # fp32 differs by the order of sums, on a CPU without wide units by twice a matrix product's own
    # error; a loss is one number of fp32, whose error may be nothing by luck
    assert (fused[1:] <= plain[1:] * (1.0 if dtype is torch.bfloat16 else 3.0)).all(), (
        plain,
        fused,
    )
    assert fused[0] <= plain[0] * 2 + 4 * torch.finfo(torch.float32).eps, (plain, fused)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"rule": "sgd"},
        {"until": "backward"},
        {"until": "backward", "rule": "sgd"},
        {"trains": {"chunks": {"count": 5}}},
        {"trains": {"chunks": {"count": 5}}, "until": "backward"},
        {"acts": "checkpoint"},
        {"acts": {"offload": {"min_bytes": 0}}},
        {"accumulate": 2},
        {"clip": 0.1},
        {"place": "fsdp"},
        {"place": "fsdp", "until": "backward"},
        {"trains": "lora"},
        {"trains": "none", "rule": "none"},
    ],
    ids=str,
)
def test_fused_trains_as_plain_does(row):
    (plain, weights, _), (fused, others, _) = (
        train(row, steps=3),
        train({**row, "head": "fused"}, steps=3),
    )
    assert fused == pytest.approx(plain, rel=1e-5)
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weights", ["mixed", "bf16"])
@pytest.mark.parametrize("until", ["step", "backward"])
def test_fused_trains_in_half_types(weights, until):
    row = {"weights": weights, "until": until, "rule": "sgd"}
    (plain, *_), (fused, *_) = train(row, lr=0.05), train({**row, "head": "fused"}, lr=0.05)
    assert fused == pytest.approx(plain, rel=1e-2) and fused[-1] != fused[0]


def test_lomo_is_plain_sgd_bit_for_bit_on_the_embeddings(monkeypatch):
    monkeypatch.setattr(leaves, "TAKEN_BYTES", 64 * 20 * 4)
    (_, whole, _), (_, rows, _) = (
        train({"rule": "sgd", "until": until}, vocab_size=200) for until in ("step", "backward")
    )
    assert all(torch.equal(rows[name], whole[name]) for name in whole)


def test_logits_are_there_when_no_loss_is_asked_for():
    _, _, trainer = train({"head": "fused"}, steps=1)
    ids = batch(0)["input_ids"]
    with torch.no_grad():
        scored = trainer.model(ids)
        learned = trainer.model(ids, labels=ids)
    assert scored.logits.shape == (*ids.shape, 61) and learned.logits is None
    expected = F.cross_entropy(scored.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(learned.loss, expected)


def test_autograd_takes_the_gradient_as_it_is():
    """No copy of it: its storage is the one the forward made."""
    h, w, labels = _case(torch.float32)
    loss = _fused(h, w, w, labels)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert w.grad.data_ptr() == made


UNIT = 125_696 * 4_096 * 2
"""One bf16 copy of the published 7B's head, in bytes."""


@pytest.mark.parametrize(
    ("trains", "taken", "most"),
    [(False, False, 0.25), (True, False, 1.35), (True, True, 0.35)],
    ids=["frozen", "trained", "taken in rows"],
)
def test_extra_bytes_at_the_published_shape(trains, taken, most, monkeypatch):
    monkeypatch.undo()  # the real chunks
    with virtual_gpu() as gpu:
        with torch.device(gpu.device):
            head = NormHead(4_096, 125_696).to(torch.bfloat16).requires_grad_(trains)
            hidden = torch.empty(1, 1_024, 4_096, dtype=torch.bfloat16, requires_grad=True)
            labels = torch.empty(1, 1_024, dtype=torch.long)
        head.fused = FusedLoss()
        head.fused.trains(
            head.weight if trains else None,
            0,
            Sgd().bind().make([head.weight], 1.0) if taken else None,
        )
        meter = gpu.meter()
        meter.own("weights", [("head", head.weight), ("hidden", hidden), ("labels", labels)])
        with meter:
            with meter.phase("forward"):
                loss, logits = head(hidden, labels)
            with meter.phase("backward"):
                loss.backward()
        assert logits is None and (head.weight.grad is not None) == (trains and not taken)
        extra = meter.peak()["peak_bytes"] - sum(
            tensor.nbytes for tensor in (head.weight, hidden, labels)
        )
    least = 1 if trains and not taken else 0
    assert least * UNIT < extra <= most * UNIT, extra / UNIT


def test_spans_tile():
    assert (
        spans(10, 4) == [(0, 3), (3, 6), (6, 10)] and spans(4, 9) == [(0, 4)] and spans(0, 3) == []
    )


def test_without_normhead_the_head_is_linear_however_it_is_formed():
    """Whole, fused, in slices, in rows inside backward, and streamed from the host; max-z
    included."""
    rows = [
        {},
        {"head": "fused"},
        {"until": "backward"},
        {"until": "backward", "head": "fused"},
        {"place": "host_weights", "acts": "checkpoint"},
        {"trains": {"chunks": {"count": 5}}},
        {"trains": {"chunks": {"count": 5}}, "head": "fused"},
    ]
    found = [
        train({**row, "rule": "sgd"}, steps=3, norm_head=False, z_loss_weight=0.1) for row in rows
    ]
    for group in (found[:5], found[5:]):
        for losses, weights, _ in group[1:]:
            assert losses == pytest.approx(group[0][0], rel=1e-5)
            torch.testing.assert_close(
                weights["lm_head.weight"], group[0][1]["lm_head.weight"], rtol=1e-4, atol=1e-6
            )
    ids, model = batch(0)["input_ids"], found[0][2].model
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert torch.equal(model(ids).logits, F.linear(hidden, model.lm_head.weight))
        assert (
            model.lm_head.weight.norm(dim=1).max() < 0.5
        )  # initialised as any linear layer: 0.02 * sqrt(20)
