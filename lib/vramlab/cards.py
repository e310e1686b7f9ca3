"""The cards that a forecast can be compared with: `params/cards.yml`, each figure with its
source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .reading import nearest, read_yaml, typed

Architecture = tuple[int, int]
"""Compute capability of a card, (major, minor): (8, 0) A100, (8, 9) RTX 4090, (9, 0) H100."""
AMPERE: Architecture = (8, 0)
CARDS_FILE = Path(__file__).parents[2] / "params" / "cards.yml"


@dataclass(frozen=True)
class Card:
    """One card. Peak rates are for dense matrices, and no step reaches them. The context is quoted
    from a public report, not measured by us."""

    key: str
    name: str
    compute_capability: Architecture
    total_gib: float
    """The card's total memory as PyTorch reports it."""
    context_mib: float
    """What CUDA holds for a process on the card before its first tensor."""
    bf16_tflops: float
    """Matrix products with fp32 accumulation."""
    fp32_tflops: float
    """Without TF32, which torch leaves off."""
    gb_per_s: float
    host_gb_per_s: float
    """Between the card and the host, in one direction."""
    source: Mapping[str, str]
    """Where the figures come from: `memory`, `context`, `rates` and `host`."""

    def __post_init__(self):
        positive = ("total_gib", "bf16_tflops", "fp32_tflops", "gb_per_s", "host_gb_per_s")
        wrong = [
            f"{name} is {getattr(self, name)}"
            for name in positive
            if not 1e-9 <= getattr(self, name) <= 1e9
        ]
        if wrong or not 0 <= self.context_mib < self.total_gib * 1024:
            raise ValueError(
                f"card {self.key}: {'; '.join(wrong) or f'context_mib is {self.context_mib}'}:"
                " rates and sizes are more than 0, a billion at most, and the context leaves"
                " something of the card"
            )

    @property
    def total_bytes(self) -> int:
        return int(self.total_gib * 2**30)

    @property
    def context_bytes(self) -> int:
        return int(self.context_mib * 2**20)

    @property
    def capacity_bytes(self) -> int:
        """What is left for PyTorch's allocator when nobody else uses the card."""
        return self.total_bytes - self.context_bytes


def read_cards(path: Path = CARDS_FILE) -> dict[str, Card]:
    """Every card of the file, by key, the least memory first. Raises: BadFile, for a field that is
    missing, unknown or of another type."""
    cards = {
        key: typed(Card, row, f"{path}: {key}", key=key) for key, row in read_yaml(path).items()
    }
    return dict(sorted(cards.items(), key=lambda item: item[1].total_gib))


def card(key: str, path: Path = CARDS_FILE) -> Card:
    """The card called `key`. Raises: ValueError, naming the cards there are."""
    cards = read_cards(path)
    if key not in cards:
        raise ValueError(
            f"no card {key!r} in {Path(path).name}{nearest(key, cards)}; it has: {', '.join(cards)}"
        )
    return cards[key]
