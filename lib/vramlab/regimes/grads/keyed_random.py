"""Random numbers that are drawn again from their key instead of being kept.

A draw is a pure function of its key, for example (seed, step, name of a weight, first row), so a
run can stop and resume anywhere. Numbers are drawn on the device that uses them: a GPU draws other
numbers than a CPU from the same key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

HAVE_GENERATORS = ("cpu", "cuda")


def normal(shape: Sequence[int], device: torch.device, *key) -> Tensor:
    """Standard normal numbers, fp32. The parts of `key` are ints and strings: they count by their
    `repr`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # fake tensors draw nothing, so any generator serves the virtual GPU
    source = torch.Generator(device if device.type in HAVE_GENERATORS else "cpu")
    source.manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=source)
