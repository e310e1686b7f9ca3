"""Random numbers that need not be kept: drawn again from what they are for, the same on every
visit.

A stream is a pure function of its key, for example (seed, step, name of a weight, first row), so a
run can stop and resume anywhere. Numbers are drawn on the device they are used on: a GPU draws
others than a CPU from the same key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

HAVE_GENERATORS = ("cpu", "cuda")


def generator(device: torch.device, *key) -> _Stream:
    """The stream of `key`, whose parts print as what they are: ints and strings."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # fake tensors draw nothing, so any generator serves the virtual GPU
    source = torch.Generator(device if device.type in HAVE_GENERATORS else "cpu")
    return _Stream(device, source.manual_seed(int.from_bytes(digest, "little") >> 1))


class _Stream:
    """A generator, and the device its numbers are made on."""

    def __init__(self, device: torch.device, source: torch.Generator):
        self.device, self.source = device, source


def normal(shape: Sequence[int], stream: _Stream) -> Tensor:
    """Standard normal numbers, fp32."""
    return torch.empty(shape, dtype=torch.float32, device=stream.device).normal_(
        generator=stream.source
    )
