"""Matrices stored in few bits and multiplied in full width: the frozen base under an adapter.

A product forms the whole matrix in the type of x, uses it and drops it; backward forms it once
more. So the temporary is one matrix at 2 bytes a number, however many matrices there are, and a
frozen matrix needs nothing of x for backward.

`nf4`: 4-bit numbers, quantiles of the normal distribution, in blocks of 64 with one scale each; the
scales are stored in 8 bits in blocks of 256. That is 4.127 bits a number. QLoRA, Dettmers 2023,
arXiv:2305.14314. The kernels are bitsandbytes', on CPU and GPU.

`int8`: each row is divided by its largest absolute value / 127 and rounded: 8 bits a number and 2
bytes a row. This is not LLM.int8 (Dettmers 2022, arXiv:2208.07339), which also rounds activations
and takes out the columns with outliers. The number of those depends on the data, so no shape would
be known before the step.

Shapes: matrix (O, I), n = O I; x (..., I); y (..., O).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, SCALE_BLOCK = 64, 256


class Product(torch.autograd.Function):
    """y = x W^T with W formed by `unpack(dtype, *stored)`. backward: dx = dy W, with W formed
    again. The stored tensors get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, unpack: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.unpack = unpack
        return F.linear(x, unpack(x.dtype, *stored))

    @staticmethod
    def backward(ctx, dy: Tensor):
        stored = ctx.saved_tensors  # read once: checkpointing returns them only once
        return F.linear(dy, ctx.unpack(dy.dtype, *stored).mT), None, *(None for _ in stored)


class Quantized(nn.Linear):
    """A frozen nn.Linear without bias, stored by `pack`. Its parameters are the stored tensors,
    named `names`; `weight` is the first."""

    names: tuple[str, ...] = ("weight",)

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None
        with torch.no_grad():
            for name, tensor in zip(self.names, self.pack(linear.weight.detach()), strict=True):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def pack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The tensors that store `matrix`."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """The matrix in `dtype`, from the stored tensors."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.unpack, *(getattr(self, name) for name in self.names))


class Nf4Linear(Quantized):
    """weight (ceil(n / 2), 1) uint8; scales (ceil(n / 64),) uint8, the scales' own scales, their
    codebook, and their mean."""

    names = ("weight", "scales", "scale_scales", "scale_codes", "scale_mean")

    def pack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        import bitsandbytes  # noqa: F401, registers the operations

        packed, scales = torch.ops.bitsandbytes.quantize_4bit(
            matrix.contiguous(), BLOCK, "nf4", torch.uint8
        )
        mean = scales.mean()
        codes = torch.tensor(dynamic_codes(), device=matrix.device)
        small, scale_scales = torch.ops.bitsandbytes.quantize_blockwise(
            scales - mean, codes, SCALE_BLOCK
        )
        return packed, small, scale_scales, codes, mean

    def unpack(self, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        packed, small, scale_scales, codes, mean = stored
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            small, scale_scales, codes, SCALE_BLOCK, torch.float32
        )
        kernel_dtype = dtype if dtype.itemsize <= 4 else torch.float32
        shape = (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales.add_(mean), BLOCK, "nf4", shape, kernel_dtype
        ).to(dtype)


class Int8Linear(Quantized):
    """weight (O, I) int8; scale (O, 1) in the matrix's own type."""

    names = ("weight", "scale")

    def pack(self, matrix: Tensor) -> tuple[Tensor, ...]:
        # the scale is rounded to its stored type first, so that `unpack` multiplies by the number
        # that the matrix was divided by
        scale = (matrix.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-30).to(matrix.dtype)
        return (matrix.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale

    def unpack(self, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        weight, scale = stored
        return weight.to(dtype).mul_(scale.to(dtype))


def quantize_blocks(blocks: nn.ModuleList, kind: type[Quantized]) -> None:
    """Replaces each matrix in `blocks` by a `kind`, one after the other: only one matrix exists in
    both forms at a time."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, kind(child))


def dynamic_codes() -> list[float]:
    """The 256 numbers of 8-bit dynamic quantisation, ascending: a sign, an exponent in unary, a
    linear rest. Dettmers 2016, arXiv:1511.04561; bitsandbytes' `create_dynamic_map`, but for the
    last bit of some of them in fp32."""
    codes = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        edges = [0.1 + 0.9 * i / count for i in range(count + 1)]
        means = [
            10.0 ** (exponent - 6) * (low + high) / 2
            for low, high in zip(edges, edges[1:], strict=False)
        ]
        codes += [*means, *(-mean for mean in means)]
    return sorted(codes)
