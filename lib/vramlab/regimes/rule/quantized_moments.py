"""Adam whose moments are kept in 8 or 4 bits: each block of neighbouring weights shares a scale,
and a weight's moment is stored as the index of the nearest of 256 or 16 values in a codebook, times
that scale.

    adam8bit   bitsandbytes' kernel, which reads and writes codes as it goes: no temporary. Blocks
               of 256. Dettmers 2021, arXiv:2110.02861
    adam4bit   our own, after torchao's, whose step is compiled anew for each shape and so cannot
               run on fake tensors: slices of rows are made fp32, updated, and coded again. Two
               codes a byte, blocks of 128. Li 2023, arXiv:2309.01507

Tensors of less than 4,096 weights keep whole moments, and in adam4bit so do those whose length is
no multiple of 128. Bytes a weight: 2 + 8/256 and 1 + 8/128; and each coded tensor has its two
codebooks, as in torchao. Not exact: coding rounds to the nearest value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..sharded import local
from .sliced import LeafContext, SlicedOptimizer

SMALLEST = 4096
BLOCK_8BIT, BLOCK_4BIT = 256, 128


def dynamic_codebook(signed: bool, bits: int, exponents: int) -> tuple[float, ...]:
    """Values of the dynamic type: the decades 10^-(exponents - 1) to 1, each cut into a power of
    two of equal steps, twice as many as the decade below; and 0 and 1. Dettmers 2015,
    arXiv:1511.04561."""
    values = [0.0, 1.0]
    for exponent in range(exponents):
        steps = 2 ** (exponent + bits - 1 - exponents + (not signed))
        edges = torch.linspace(0.1, 1, steps + 1)
        middles = (10 ** (exponent - exponents + 1) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += middles + [-middle for middle in middles if signed]
    return tuple(sorted(values))


# computed on import, because fake tensors have no values
CODEBOOKS_8BIT = {
    "dynamic": dynamic_codebook(True, 8, 7),
    "udynamic": dynamic_codebook(False, 8, 7),
}
CODEBOOKS_4BIT = {
    "exp_avg": dynamic_codebook(True, 4, 3),
    "exp_avg_sq": tuple(step / 16 for step in range(1, 17)),
}
"""The 4-bit codebook of the second moment is linear and has no zero, by which the update would
divide."""


def _on(device: torch.device, codebook: tuple[float, ...]) -> Tensor:
    """A new tensor with the codebook; copied on a CPU too, so that a CPU run does what a GPU run
    does."""
    return torch.tensor(codebook).to(device, copy=True)


def library():
    """The module of bitsandbytes' optimizers. Raises: ImportError.

    The package makes tensors when it is imported. They must be real, and no meter may count them,
    so the modes of fake tensors and meters are off.
    """
    with _disable_current_modes():
        import bitsandbytes.optim
    return bitsandbytes.optim


def adam8bit(
    params: Iterable[Tensor], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
):
    """bitsandbytes' AdamW8bit."""

    class OwnCodebooks(library().AdamW8bit):  # type: ignore[misc]  # imported late, see `library`
        """Gives each tensor its own codebooks. bitsandbytes shares them between the tensors of an
        optimizer, whose number depends on `until`, so the bytes of a tensor's state would too."""

        def fill_qmap(self) -> None:
            self.name2qmap: dict[str, Tensor] = {}

        def init_state(self, group, p, gindex, pindex) -> None:
            if p.numel() >= SMALLEST:
                self.name2qmap = {
                    name: _on(p.device, values) for name, values in CODEBOOKS_8BIT.items()
                }
            super().init_state(group, p, gindex, pindex)
            self.name2qmap = {}

    return OwnCodebooks(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def state_bytes_8bit(weight: Tensor) -> int:
    """Bytes of both moments in 8 bits: codes, scales and codebooks."""
    if weight.numel() < SMALLEST:
        return 2 * 4 * weight.numel()
    return 2 * (weight.numel() + 4 * -(-weight.numel() // BLOCK_8BIT) + 4 * 256)


def _coded(weight: Tensor) -> bool:
    """Whether the moments of a weight are kept in 4 bits."""
    return weight.numel() >= SMALLEST and weight.numel() % BLOCK_4BIT == 0


class Adam4bit(SlicedOptimizer):
    """State of a coded moment: `_codes` uint8 (n / 2), the first of two weights in the upper half;
    `_scale` fp32 (n / 128); `_codebook` fp32 (16)."""

    def add_state(self, leaf: Tensor, weight: Tensor, entry: dict) -> None:
        count, device = weight.numel(), weight.device
        for name, values in CODEBOOKS_4BIT.items():
            if _coded(weight):
                entry[f"{name}_codes"] = torch.zeros(count // 2, dtype=torch.uint8, device=device)
                entry[f"{name}_scale"] = torch.zeros(count // BLOCK_4BIT, device=device)
                entry[f"{name}_codebook"] = _on(device, values)
            else:
                entry[name] = torch.zeros_like(
                    weight, dtype=self.context.storage.moments_dtype(weight)
                )

    @staticmethod
    def leaf_bytes(leaf: Tensor, context: LeafContext) -> int:
        weight = local(leaf)
        if not _coded(weight):
            return 2 * weight.numel() * context.storage.moments_dtype(weight).itemsize
        return 2 * (weight.numel() // 2 + 4 * (weight.numel() // BLOCK_4BIT) + 4 * 16)

    def grain(self, weight: Tensor) -> int:
        """The fewest rows that are whole blocks."""
        row = math.prod(weight.shape[1:])
        return BLOCK_4BIT // math.gcd(BLOCK_4BIT, row) if _coded(weight) else 1

    def update(self, leaf: Tensor, rows: slice, gradient: Tensor, wide: Tensor) -> None:
        entry, options = self.state[leaf], self.options
        mean, square = (self._moment(entry, name, rows, wide) for name in CODEBOOKS_4BIT)
        mean.lerp_(gradient, 1 - options["beta1"])
        square.lerp_(gradient.square(), 1 - options["beta2"])
        self._store(entry, "exp_avg", rows, mean)
        self._store(entry, "exp_avg_sq", rows, square)
        root = square.div_(1 - options["beta2"] ** entry["step"]).sqrt_().add_(options["eps"])
        wide.mul_(1 - options["lr"] * options["weight_decay"])
        wide.addcdiv_(mean, root, value=-options["lr"] / (1 - options["beta1"] ** entry["step"]))

    @staticmethod
    def _moment(entry: dict, name: str, rows: slice, like: Tensor) -> Tensor:
        """A copy of a moment's slice in fp32, of the shape of `like`."""
        if name in entry:
            return entry[name][rows].to(torch.float32, copy=True)
        codes, scale = _coded_slice(entry, name, rows, like)
        halves = torch.stack((codes >> 4, codes & 15), -1).int()
        return (
            entry[f"{name}_codebook"][halves]
            .view(-1, BLOCK_4BIT)
            .mul_(scale[:, None])
            .view(like.shape)
        )

    @staticmethod
    def _store(entry: dict, name: str, rows: slice, moment: Tensor) -> None:
        """Stores a moment's slice, coded where the weight's moments are."""
        if name in entry:
            entry[name][rows].copy_(moment)
            return
        codes, scale = _coded_slice(entry, name, rows, moment)
        blocks = moment.reshape(-1, BLOCK_4BIT)
        scale.copy_(blocks.abs().amax(1).clamp_(min=1e-12))
        codebook = entry[f"{name}_codebook"]
        middles = (codebook[1:] + codebook[:-1]) / 2
        nearest = (
            torch.bucketize(blocks / scale[:, None], middles, out_int32=True, right=True)
            .to(torch.uint8)
            .view(-1, 2)
        )
        codes.copy_(nearest[:, 0] << 4 | nearest[:, 1])


def _coded_slice(entry: dict, name: str, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a slice of rows."""
    first = rows.start * math.prod(like.shape[1:])
    last = first + like.numel()
    return (
        entry[f"{name}_codes"][first // 2 : last // 2],
        entry[f"{name}_scale"][first // BLOCK_4BIT : last // BLOCK_4BIT],
    )
