"""Axis `weights`: how the parameters are stored, and in which type matrix products are formed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...baichuan.model import decoder
from ...machine import needs_fp32_products
from ..fields import Seed
from .bf16_on_cpu import halves_formed_in_fp32
from .quantized_linear import Int8Linear, Nf4Linear, Quantized, quantize_blocks
from .storage import Master, Nearest, Stochastic


@dataclass(frozen=True)
class Fp32:
    """Every parameter in fp32, 4 bytes each, and every product in fp32."""

    dtype = torch.float32
    gathered: ClassVar[torch.dtype | None] = None
    """The type to which autocast casts the operands of products, and in which a sharded weight is
    gathered; None without autocast."""

    @property
    def storage(self) -> Nearest:
        """How an update is stored."""
        return Nearest()

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with its parameters stored in this way."""
        return model.to(self.dtype)

    def compute(self, device_type: str) -> AbstractContextManager:
        """Around a whole step: how products of half types are formed.

        A CPU forms those of fp16 in fp32 and rounds them, and so it does those of bf16 where it has
        no bf16 units, see `bf16_on_cpu`.
        """
        low = self.gathered or self.dtype
        rounds = low == torch.float16 or (low == torch.bfloat16 and needs_fp32_products()[0])
        return halves_formed_in_fp32() if device_type == "cpu" and rounds else nullcontext()

    def forward(self, device_type: str) -> AbstractContextManager:
        """Around each forward, inside `compute`: autocast, if this storage uses it."""
        return torch.autocast(device_type, self.gathered) if self.gathered else nullcontext()


@dataclass(frozen=True)
class Mixed(Fp32):
    """fp32 parameters under bf16 autocast: 4 bytes each, plus autocast's bf16 copies of the weights
    that train (2 bytes each).

    Autocast ends with the forward, so a copy lives until backward has used it, not to the end of
    the step. Norms, softmax and the loss stay in fp32. Micikevicius 2018, arXiv:1710.03740; here
    with bf16 and so without loss scaling.
    """

    gathered = torch.bfloat16


@dataclass(frozen=True)
class Bf16(Fp32):
    """Every parameter in bf16, 2 bytes each. Rounding to nearest loses an update below 2^-9 of a
    weight."""

    dtype = torch.bfloat16


@dataclass(frozen=True)
class Bf16Stochastic(Bf16):
    """Every parameter in bf16, 2 bytes each. An update is rounded up or down at random, so that its
    mean is exact. The random numbers are a function of seed, leaf and step. Gupta 2015,
    arXiv:1502.02551."""

    seed: Seed = 0

    @property
    def storage(self) -> Nearest:
        return Stochastic(self.seed)


@dataclass(frozen=True)
class MasterFp32(Bf16):
    """Every parameter in bf16, 2 bytes each, and in the optimizer an fp32 master (4 bytes) of each
    trained one. Updates change the master; moments are fp32. Micikevicius 2018, arXiv:1710.03740,
    as DeepSpeed does it with bf16."""

    @property
    def storage(self) -> Nearest:
        return Master()


@dataclass(frozen=True)
class Fp16(Fp32):
    """Every parameter in fp16, 2 bytes each: 10 bits of mantissa, and no number below 6e-8.

    Smaller gradients vanish unless the loss is scaled, see `clipping`. Rounding to nearest loses an
    update below 2^-12 of a weight. A CPU always forms the products in fp32 and rounds them, see
    `bf16_on_cpu`. Micikevicius 2018, arXiv:1710.03740, without a master.
    """

    dtype = torch.float16


@dataclass(frozen=True)
class Nf4(Bf16):
    """Every matrix of a block in 4.127 bits a number (blocks of 64, double quantisation), the rest
    (embeddings, norms, head) in bf16; products in bf16. The matrices are packed on the host, before
    the model goes to the device. Dettmers 2023, arXiv:2305.14314.
    """

    linear: ClassVar[type[Quantized]] = Nf4Linear

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        quantize_blocks(decoder(model).layers, self.linear)
        return model


@dataclass(frozen=True)
class Int8(Nf4):
    """Every matrix of a block in 8 bits a number and one bf16 scale a row, the rest in bf16.
    Products are formed in bf16: so it is smaller and less exact than bf16, and no faster."""

    linear = Int8Linear
