"""How an update reads a stored weight in fp32 and stores the result, one slice of rows at a time.

    Nearest      the stored type, rounded to nearest: bf16 loses an update below half a unit in the
                 last place (2^-9 of the weight)
    Stochastic   bf16, rounded up or down with the probabilities that make the mean exact; Gupta
                 2015, arXiv:1502.02551
    Master       bf16 for the network, and in the optimizer an fp32 master weight. The update
                 changes the master; the bf16 weight is always the master rounded to nearest. 4
                 more bytes for each weight; Micikevicius 2018, arXiv:1710.03740

All three update in place weights that are already fp32 (adapters that peft makes in fp32), and
those have no master. Shapes: weight (O, ...), rows a slice of O, wide (rows, ...).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASTER = "master"
"""The key of a leaf's fp32 master in its optimizer state."""


@dataclass(frozen=True)
class Nearest:
    """The stored weight, rounded to nearest."""

    def begin(self, weight: Tensor, entry: dict) -> None:
        """Adds to `entry`, a leaf's optimizer state, what this storage needs. Called before the
        first update of the leaf."""

    def read(self, weight: Tensor, entry: dict, rows: slice) -> Tensor:
        """The slice in fp32: the stored slice itself where that is fp32, else a copy."""
        return weight[rows].float()

    def write(self, weight: Tensor, entry: dict, rows: slice, wide: Tensor, label: str) -> None:
        """Stores `wide`, which `read` returned and the update changed in place. `label` names leaf
        and step."""
        if weight.dtype != wide.dtype:
            weight[rows].copy_(wide)

    def moments_dtype(self, weight: Tensor) -> torch.dtype:
        """The type in which a rule keeps its moments."""
        return weight.dtype

    def state_bytes(self, weight: Tensor) -> int:
        """Bytes that `begin` adds to the optimizer state."""
        return 0


@dataclass(frozen=True)
class Stochastic(Nearest):
    """bf16 weights rounded at random. Moments are rounded to nearest, as in plain bf16."""

    seed: int = 0

    def write(self, weight: Tensor, entry: dict, rows: slice, wide: Tensor, label: str) -> None:
        if weight.dtype == torch.bfloat16:
            first = rows.start * wide[0].numel()
            bits = random_bits(wide.numel(), first, f"{self.seed}/{label}", wide.device)
            weight[rows].copy_(round_up_or_down(wide, bits.view(wide.shape)))
        else:
            super().write(weight, entry, rows, wide, label)


@dataclass(frozen=True)
class Master(Nearest):
    """An fp32 master in the optimizer state. Moments are fp32 too: with AdamW 12 bytes of state for
    each weight, and 16 together with bf16 weights and gradients."""

    def begin(self, weight: Tensor, entry: dict) -> None:
        if weight.dtype != torch.float32:
            entry[MASTER] = weight.float()

    def read(self, weight: Tensor, entry: dict, rows: slice) -> Tensor:
        return entry.get(MASTER, weight)[rows]

    def moments_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.float32

    def state_bytes(self, weight: Tensor) -> int:
        return 0 if weight.dtype == torch.float32 else 4 * weight.numel()


def round_up_or_down(wide: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 numbers in place to fp32 numbers that bf16 holds exactly.

    Adds 16 random bits (`bits`: int32, 0 to 2^16 - 1) to the 16 lowest bits, which bf16 does not
    have; a carry rounds away from zero. The mean over all `bits` is exactly `wide`. Infinities
    stay. NaN becomes infinity, because the pattern of a NaN plus bits may be the pattern of zero.
    """
    pattern = wide.nan_to_num_(math.inf, math.inf, -math.inf).view(torch.int32)
    pattern.add_(bits).bitwise_and_(-(1 << 16))
    return wide


def random_bits(count: int, first: int, label: str, device: torch.device) -> Tensor:
    """(count,) int32, 16 random bits for each element from number `first` on.

    A hash of element number and label (murmur3's finaliser). So there is no state to save, every
    device draws the same bits, and the slices of a step do not matter. Element numbers are int32.
    """
    digest = hashlib.blake2b(label.encode(), digest_size=4)
    key = int.from_bytes(digest.digest(), "little", signed=True)
    mixed = torch.arange(first, first + count, dtype=torch.int32, device=device).bitwise_xor_(key)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        unsigned = (1 << 32 - shift) - 1  # the shift fills with sign bits: mask them
        mixed.bitwise_xor_(mixed.bitwise_right_shift(shift).bitwise_and_(unsigned)).mul_(factor)
    # the finaliser's last step mixes the upper half into the lower: the upper half is the result
    return mixed.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
