"""How a rule reads a stored weight as fp32, and how what it made of it is stored again, a slice of
rows at a time.

    Nearest      the stored type, rounded to nearest: an update below half a unit of a bf16 weight
                 (2^-9 of it) is lost
    Stochastic   bf16, rounded up or down with the probabilities that make the mean exact; Gupta
                 2015, arXiv:1502.02551
    Master       bf16 for the network, and in the optimizer the fp32 weight that is updated; the
                 bf16 one is always its
                 nearest rounding. 4 bytes more a weight; Micikevicius 2018, arXiv:1710.03740

Weights that are fp32 already (adapters that peft makes so) are updated in place by all three, and
have no master. Shapes: weight (O, ...), rows a slice of O, wide (rows, ...).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASTER = "master"
"""What a leaf's fp32 master is called in its optimizer state."""


@dataclass(frozen=True)
class Nearest:
    """The weight as it is stored."""

    def begin(self, weight: Tensor, entry: dict) -> None:
        """Before the first update of a leaf: what `entry`, its optimizer state, has to hold beside
        the rule's own."""

    def read(self, weight: Tensor, entry: dict, rows: slice) -> Tensor:
        """fp32: the stored slice itself where that is fp32, else a copy."""
        return weight[rows].float()

    def write(self, weight: Tensor, entry: dict, rows: slice, wide: Tensor, label: str) -> None:
        """Stores what was read and has been changed in place. `label` names leaf and step."""
        if weight.dtype != wide.dtype:
            weight[rows].copy_(wide)

    def moments_dtype(self, weight: Tensor) -> torch.dtype:
        """What a rule keeps its moments in."""
        return weight.dtype

    def state_bytes(self, weight: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class Stochastic(Nearest):
    """Moments are rounded to nearest, as in plain bf16."""

    seed: int = 0

    def write(self, weight: Tensor, entry: dict, rows: slice, wide: Tensor, label: str) -> None:
        if weight.dtype == torch.bfloat16:
            bits = random_bits(
                wide.numel(), rows.start * wide[0].numel(), f"{self.seed}/{label}", wide.device
            )
            weight[rows].copy_(round_up_or_down(wide, bits.view(wide.shape)))
        else:
            super().write(weight, entry, rows, wide, label)


@dataclass(frozen=True)
class Master(Nearest):
    """Moments are fp32 too: 12 bytes a weight for AdamW, which with bf16 weights and gradients
    makes 16."""

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
    """fp32 -> fp32 numbers that bf16 holds exactly, in place: 16 random bits are added to the 16
    that bf16 lacks, and a carry rounds away from zero. The mean over `bits` (int32, 0 to 2^16 - 1)
    is `wide` exactly; infinities stay, and what is not a number becomes one: its pattern, plus
    bits, may be that of zero."""
    pattern = wide.nan_to_num_(math.inf, math.inf, -math.inf).view(torch.int32)
    pattern.add_(bits).bitwise_and_(-(1 << 16))
    return wide


def random_bits(count: int, first: int, label: str, device: torch.device) -> Tensor:
    """(count,) int32 of 16 random bits for elements `first` on. A hash of element and label
    (murmur3's finaliser): no state to save, the same on every device, whatever slices a step is cut
    into. Elements are counted to 2^31.
    """
    key = int.from_bytes(
        hashlib.blake2b(label.encode(), digest_size=4).digest(), "little", signed=True
    )
    mixed = torch.arange(first, first + count, dtype=torch.int32, device=device).bitwise_xor_(key)
    for shift, factor in (
        (16, -2048144789),
        (13, -1028477387),
    ):  # the shift fills with sign bits: masked off
        mixed.bitwise_xor_(
            mixed.bitwise_right_shift(shift).bitwise_and_((1 << 32 - shift) - 1)
        ).mul_(factor)
    return mixed.bitwise_right_shift_(16).bitwise_and_(
        0xFFFF
    )  # the finaliser's last step mixes these into the lower half
