"""bf16 products formed in fp32 are bf16 products: same values, same saved types, right
gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vramlab.regimes.weights.bf16_on_cpu import (
    RoundedAttention,
    RoundedLinear,
    halves_formed_in_fp32,
)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rounded_linear_passes_gradcheck():
    x, weight = (
        _random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3, 5), (4, 5)])
    )
    assert torch.autograd.gradcheck(
        lambda x, w: RoundedLinear.apply(x, w, torch.float64), (x, weight)
    )


@pytest.mark.parametrize("causal, masked", [(True, False), (False, True), (False, False)])
def test_rounded_attention_passes_gradcheck(causal, masked):
    q, k, v = (_random(1, 2, 4, 3, seed=i).requires_grad_() for i in range(3))
    mask = _random(1, 2, 4, 4, seed=9) if masked else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: RoundedAttention.apply(q, k, v, mask, causal, torch.float64), (q, k, v)
    )


def test_results_are_the_native_bf16_kernels_but_for_the_last_bit_of_few():
    x, weight = _random(64, 96, dtype=torch.bfloat16), _random(80, 96, seed=1, dtype=torch.bfloat16)
    native = F.linear(x, weight)
    with halves_formed_in_fp32():
        ours = F.linear(x, weight)
    assert ours.dtype == torch.bfloat16 and (ours == native).float().mean() >= 0.995
    torch.testing.assert_close(ours, native, rtol=2**-7, atol=1e-2)
    exact = (x.double() @ weight.double().mT).to(torch.bfloat16)
    assert (ours == exact).float().mean() >= 0.999


def test_what_is_saved_for_backward_stays_bf16():
    saved = []
    x = _random(8, 16, dtype=torch.bfloat16).requires_grad_()
    weight = _random(8, 16, seed=1, dtype=torch.bfloat16).requires_grad_()
    q = _random(1, 2, 8, 4, seed=2, dtype=torch.bfloat16).requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t),
        halves_formed_in_fp32(),
    ):
        F.linear(x, weight).sum()
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum()
    assert saved and set(saved) == {torch.bfloat16}


def test_under_autocast_fp32_weights_get_fp32_gradients():
    x, weight = (
        _random(8, 16, dtype=torch.float32),
        _random(8, 16, seed=1, dtype=torch.float32).requires_grad_(),
    )
    with halves_formed_in_fp32(), torch.autocast("cpu", torch.bfloat16):
        out = F.linear(x, weight)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_fp32_products_and_the_world_outside_are_left_alone():
    before = F.linear
    x, weight = _random(3, 4, dtype=torch.float32), _random(5, 4, seed=1, dtype=torch.float32)
    with halves_formed_in_fp32():
        assert torch.equal(F.linear(x, weight), before(x, weight))
    assert F.linear is before
