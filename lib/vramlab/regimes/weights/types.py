"""Axis `weights`: how the parameters are stored, and in which type the matrix products are
formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...baichuan.model import decoder
from ...machine import needs_fp32_products
from ..fields import Seed
from . import bf16_on_cpu as rounding
from .quantized_linear import Int8Linear, Nf4Linear, Quantized, quantize_blocks
from .storage import Master, Nearest, Stochastic


@contextmanager
def _bf16_products(device_type: str) -> Iterator[None]:
    """bf16 operands and results. A CPU without bf16 units forms each product in fp32 and rounds it,
    see `rounding`."""
    if device_type == "cpu" and needs_fp32_products()[0]:
        with rounding.halves_formed_in_fp32():
            yield
    else:
        yield


@dataclass(frozen=True)
class Fp32:
    """Every parameter in fp32, 4 bytes each, and every product in fp32."""

    dtype = torch.float32
    gathered: ClassVar[torch.dtype | None] = None
    """The type a sharded weight is gathered in, where it is not its own."""

    @property
    def storage(self) -> Nearest:
        """How an update is stored."""
        return Nearest()

    def prepare(self, model: nn.Module) -> nn.Module:
        return model.to(self.dtype)

    @contextmanager
    def compute(self, device_type: str) -> Iterator[None]:
        """Around a whole step: how products are formed."""
        yield

    @contextmanager
    def forward(self, device_type: str) -> Iterator[None]:
        """Around each forward, inside `compute`: what operands are cast to."""
        yield


@dataclass(frozen=True)
class Mixed(Fp32):
    """fp32 parameters under bf16 autocast: 4 bytes each, plus autocast's bf16 copies of the weights
    that train (2 bytes each). Autocast ends with the forward, so a copy lives until backward has
    used it, not to the end of the step. Norms, softmax and the loss stay fp32. Micikevicius 2018,
    arXiv:1710.03740; here with bf16 and so without loss scaling.
    """

    gathered = torch.bfloat16

    @contextmanager
    def compute(self, device_type: str) -> Iterator[None]:
        with _bf16_products(device_type):
            yield

    @contextmanager
    def forward(self, device_type: str) -> Iterator[None]:
        with torch.autocast(device_type, torch.bfloat16):
            yield


@dataclass(frozen=True)
class Bf16(Fp32):
    """Every parameter in bf16, 2 bytes each. An update below 2^-9 of a weight is lost to nearest
    rounding."""

    dtype = torch.bfloat16

    @contextmanager
    def compute(self, device_type: str) -> Iterator[None]:
        with _bf16_products(device_type):
            yield


@dataclass(frozen=True)
class Bf16Stochastic(Bf16):
    """Every parameter in bf16, 2 bytes each; an update is rounded up or down at random, so that on
    the mean none is lost. Random numbers are a function of seed, leaf and step. Gupta 2015,
    arXiv:1502.02551."""

    seed: Seed = 0

    @property
    def storage(self) -> Nearest:
        return Stochastic(self.seed)


@dataclass(frozen=True)
class MasterFp32(Bf16):
    """Every parameter in bf16, 2 bytes each, and of each that trains an fp32 master in the
    optimizer, 4 bytes, which is what is updated; moments are fp32. Micikevicius 2018,
    arXiv:1710.03740; as DeepSpeed does with bf16."""

    @property
    def storage(self) -> Nearest:
        return Master()


@dataclass(frozen=True)
class Fp16(Fp32):
    """Every parameter in fp16, 2 bytes each, 10 bits of mantissa and nothing below 6e-8: gradients
    that small are gone unless the loss is multiplied, see `clipping`. An update below 2^-12 of a
    weight is lost to nearest rounding. Products on a CPU are formed in fp32 and rounded, whatever
    it has, see `rounding`. Micikevicius 2018, arXiv:1710.03740, without a master.
    """

    dtype = torch.float16

    @contextmanager
    def compute(self, device_type: str) -> Iterator[None]:
        with rounding.halves_formed_in_fp32() if device_type == "cpu" else nullcontext():
            yield


@dataclass(frozen=True)
class Nf4(Bf16):
    """Every matrix of a block in 4.127 bits a number (blocks of 64, double quantisation), the rest
    (embeddings, norms, head) in bf16; products in bf16. Packed on the host, before the model goes
    to the device. Dettmers 2023, arXiv:2305.14314.
    """

    linear: ClassVar[type[Quantized]] = Nf4Linear

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        quantize_blocks(decoder(model).layers, self.linear)
        return model


@dataclass(frozen=True)
class Int8(Nf4):
    """Every matrix of a block in 8 bits a number and one bf16 scale a row, the rest in bf16;
    products in bf16, so less exact and smaller than bf16, and no faster."""

    linear = Int8Linear
