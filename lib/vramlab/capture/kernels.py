"""What CUDA kernels do that no operation shows: which attention kernel runs, and the workspaces
that kernels allocate for themselves.

Torch chooses the attention kernel at run time, by type, mask, shape and card; this module makes the
same choice from the same facts. Workspaces are a table with sources. They are reported as a
category of their own, and none of them is measured.

Shapes: b batch, h heads, q queries, k keys, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cards import AMPERE, Architecture

aten = torch.ops.aten

MATRIX_PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
)
_HALF = (torch.float16, torch.bfloat16)


def attention_kernel(
    dtype: torch.dtype, head_dim: int, masked: bool, architecture: Architecture = AMPERE
) -> str:
    """The kernel that `F.scaled_dot_product_attention` runs on a card of `architecture`: "cudnn",
    "flash", "efficient" or "math".

    Source: torch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `select_sdp_backend`, its
    default order and filters. Not exact: cuDNN comes first on sm_90 and sm_100 only with cuDNN
    9.15.1 or later, which is assumed; filters on odd strides, on empty sequences and on dropout are
    left out.
    """
    half = dtype in _HALF and (architecture >= (8, 0) or dtype is torch.float16)
    if half and architecture in ((9, 0), (10, 0)) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    # flash pads the head itself, so any size is possible
    if half and not masked and head_dim <= 256 and architecture >= (8, 0):
        return "flash"
    if dtype is torch.bfloat16 and architecture < (8, 0):
        return "math"
    alignment = _efficient_alignment(dtype, architecture)
    return "efficient" if head_dim % alignment == 0 and architecture >= (5, 0) else "math"


def _efficient_alignment(dtype: torch.dtype, architecture: Architecture) -> int:
    tensor_cores = architecture >= (8, 0) or architecture >= (7, 0) and dtype in _HALF
    least = 4 if architecture >= (8, 0) else 1
    return max(least, (8 if dtype in _HALF else 4)) if tensor_cores else least


@dataclass(frozen=True)
class Attention:
    """Replaces `F.scaled_dot_product_attention`: calls the operation that a card of `architecture`
    would run."""

    architecture: Architecture = AMPERE

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
        kernel = attention_kernel(
            query.dtype, query.shape[-1], attn_mask is not None, self.architecture
        )
        if kernel == "math" or enable_gqa:
            return _native(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        return _KERNELS[kernel](
            query,
            key,
            value,
            _bias(attn_mask, query, key),
            dropout_p,
            is_causal,
            query.shape[-1] ** -0.5 if scale is None else scale,
        )


_native = F.scaled_dot_product_attention


def _autocast(*tensors) -> list[Tensor | None]:
    """The function is on autocast's list of low precision, so its operands are cast before a kernel
    is chosen."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [
        tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in tensors
    ]


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask in the form that kernels take: a number to add, with rows that start at multiples of
    16, shared by batch and heads as views."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(
            mask.logical_not(), float("-inf")
        )
    columns = mask.shape[-1]
    if columns % 16:
        mask = F.pad(mask, (0, 16 - columns % 16))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _flash(query, key, value, bias, dropout_p, is_causal, scale) -> Tensor:
    size = query.shape[-1]
    if size % 8:
        query, key, value = (F.pad(tensor, (0, 8 - size % 8)) for tensor in (query, key, value))
    return aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0][..., :size]


def _efficient(query, key, value, bias, dropout_p, is_causal, scale) -> Tensor:
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, _trains(query, key, value), dropout_p, is_causal, scale=scale
    )[0]


def _cudnn(query, key, value, bias, dropout_p, is_causal, scale) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(
        query,
        key,
        value,
        bias,
        _trains(query, key, value),
        dropout_p,
        is_causal,
        False,
        scale=scale,
    )[0]


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


_KERNELS = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn}


def matrix_workspace_bytes(architecture: Architecture) -> int:
    """Bytes that cuBLAS holds for every handle and stream from its first product on: 4096 KiB x 2 +
    16 KiB x 8, or 32 MiB on Hopper. Source: ATen/cuda/CUDABlas `parseChosenWorkspaceSize`,
    pytorch issue 120925; found in recorded snapshots. Not included: cublasLt, which these models'
    bias-free products do not use."""
    return 32 << 20 if architecture[0] == 9 else (4096 * 2 + 16 * 8) * 1024


def attention_scratch_bytes(query: Tensor) -> int:
    """Bytes that the backward of a fused attention takes inside its kernel: dq summed in fp32, and
    a number for each query row.

    Exact for flash: source flash_api.cpp `mha_bwd`, dq_accum (b, q', h, d') and softmax_d (b, h,
    q') in fp32, q' a multiple of 128, d' of 32 (64 above 128). An estimate for efficient and cuDNN,
    which accumulate the same way in half types; in fp32 `efficient` accumulates in the output and
    forms one product of the output's size.
    """
    b, h, q, d = query.shape
    rows, columns = -(-q // 128) * 128, -(-d // (32 if d <= 128 else 64)) * (32 if d <= 128 else 64)
    return 4 * b * h * (rows * columns + rows)


@dataclass
class Workspaces:
    """The workspaces of kernels; `taken` is called once for each operation. Each thread has its own
    cuBLAS handle: forward has one, backward another."""

    architecture: Architecture = AMPERE
    _handles: set[bool] = field(default_factory=set)

    def taken(self, func, args: tuple, backward: bool) -> tuple[int, int]:
        """(bytes kept for good, bytes given back at once) by the kernel of `func`, which has just
        run."""
        if func in MATRIX_PRODUCTS and backward not in self._handles:
            self._handles.add(backward)
            return matrix_workspace_bytes(self.architecture), 0
        if func in _ATTENTION_BACKWARD:
            return 0, attention_scratch_bytes(args[1])
        return 0, 0


_ATTENTION_BACKWARD = frozenset(
    {
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)
"""Each takes (grad_out, query, key, value, ...)."""
