"""What CUDA would choose and take, by value: attention's filters one by one at their edges, and
every workspace's bytes."""

from __future__ import annotations

import pytest
import torch

from vramlab.capture.kernels import (
    Attention,
    Workspaces,
    _bias,
    attention_kernel,
    attention_scratch_bytes,
    matrix_workspace_bytes,
)

aten = torch.ops.aten
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "architecture", "sizes"),
    [
        # cuDNN for half types on sm_90 and sm_100 alone: multiples of 8 up to 128, with a mask or
        # without
        (
            BF16,
            (9, 0),
            {
                8: "cudnn",
                12: "flash",
                128: "cudnn",
                136: "flash",
                256: "flash",
                264: "efficient",
                260: "math",
            },
        ),
        (FP16, (10, 0), {64: "cudnn", 136: "flash"}),
        (FP16, (8, 9), {64: "flash", 256: "flash", 264: "efficient"}),
        (BF16, (12, 0), {64: "flash"}),
        # before Ampere no bf16, and fp16 in multiples of 8 where there are tensor cores
        (BF16, (7, 5), {64: "math"}),
        (FP16, (7, 0), {64: "efficient", 4: "math"}),
        (FP16, (6, 1), {3: "efficient"}),
        (FP16, (4, 9), {64: "math"}),
        # fp32: multiples of 4 where its tensor cores are used
        (FP32, (8, 0), {4: "efficient", 6: "math", 512: "efficient"}),
        (FP32, (7, 5), {1: "efficient", 6: "efficient"}),
        (FP32, (9, 0), {4: "efficient", 2: "math"}),
    ],
)
def test_the_kernel_by_head_size_without_a_mask(dtype, architecture, sizes):
    assert {size: attention_kernel(dtype, size, False, architecture) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("dtype", "architecture", "sizes"),
    [
        (BF16, (9, 0), {8: "cudnn", 136: "efficient", 12: "math"}),
        (FP16, (8, 0), {8: "efficient", 4: "math", 256: "efficient"}),
        (BF16, (12, 0), {64: "efficient"}),
        (FP16, (7, 5), {8: "efficient", 12: "math"}),
    ],
)
def test_the_kernel_by_head_size_with_a_mask(dtype, architecture, sizes):
    assert {size: attention_kernel(dtype, size, True, architecture) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("architecture", "size"),
    [((7, 5), 8_519_680), ((8, 9), 8_519_680), ((9, 0), 33_554_432), ((10, 0), 8_519_680)],
)
def test_a_handles_workspace(architecture, size):
    assert matrix_workspace_bytes(architecture) == size


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((1, 1, 1, 1), 128 * 32 + 128),
        ((1, 1, 128, 32), 128 * 32 + 128),
        ((2, 3, 129, 33), 6 * (256 * 64 + 256)),
        ((1, 1, 128, 128), 128 * 128 + 128),
        ((1, 1, 128, 129), 128 * 192 + 128),
        ((1, 5, 1000, 200), 5 * (1024 * 256 + 1024)),
    ],
)
def test_an_attentions_scratch(shape, numbers):
    assert attention_scratch_bytes(torch.empty(shape, device="meta")) == 4 * numbers


def test_forward_and_backward_have_a_handle_each_and_only_products_make_one():
    taken, query = Workspaces((9, 0)), torch.empty(2, 3, 100, 40, device="meta")
    attention = aten._scaled_dot_product_flash_attention_backward.default
    calls = [
        (aten.add.Tensor, False),
        (aten.bmm.default, False),
        (aten.mm.default, False),
        (aten.addmm.default, True),
        (attention, True),
        (attention, True),
        (aten.baddbmm.default, True),
    ]
    scratch = attention_scratch_bytes(query)
    assert [taken.taken(func, (None, query), backward) for func, backward in calls] == [
        (0, 0),
        (32 << 20, 0),
        (0, 0),
        (32 << 20, 0),
        (0, scratch),
        (0, scratch),
        (0, 0),
    ]


@pytest.mark.parametrize(("keys", "row_bytes"), [(15, 16), (16, 16), (17, 32), (33, 48)])
def test_a_mask_is_a_number_to_add_in_rows_of_sixteen(keys, row_bytes):
    allowed = torch.ones(1, 1, 3, keys, dtype=torch.bool).tril()
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, keys, 8)
    bias = _bias(allowed, query, key)
    assert (
        bias.shape == (2, 4, 3, keys)
        and bias.stride(2) == row_bytes
        and bias.stride()[:2] == (0, 0)
    )
    assert (bias == torch.where(allowed, 0.0, float("-inf"))).all()
    assert _bias(None, query, key) is None and torch.equal(_bias(bias[:1, :1], query, key), bias)


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 2, 5, 8), False), ((2, 2, 5, 8), True), ((1, 3, 4, 6), False)]
)
def test_the_stand_in_computes_what_torch_computes(shape, mask):
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape) for _ in range(3))
    later = torch.ones(shape[2], shape[2]).triu(1).bool()
    bias = torch.zeros(later.shape).masked_fill(later, float("-inf")) if mask else None
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias, is_causal=not mask
    )
    found = Attention((4, 0))(
        query, key, value, bias, is_causal=not mask
    )  # too old for any kernel but the plain one
    torch.testing.assert_close(found, plain)
