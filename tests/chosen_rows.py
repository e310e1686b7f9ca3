"""Rows that stand for all of them in `make test`; the others go through the same test in
`make test-slow`."""

from collections.abc import Iterable

import pytest

QUICK = {
    "full",
    "mixed",
    "checkpoint",
    "offload",
    "lora",
    "qlora",
    "lomo",
    "adam8bit",
    "galore",
    "mezo",
    "badam",
    "chunkft_128",
    "host_weights",
    "fsdp",
    "approx_residual",
}
"""At least one row with another answer than the default, for each axis."""


def slow_unless_chosen(names: Iterable[str]) -> list:
    """The names as parameters of a test, those not in `QUICK` marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
