"""The cards a forecast can be held against: `params/cards.yml`, each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from .reading import check_type, read_mapping, short, unknown

CARDS_FILE = Path(__file__).parents[2] / "params" / "cards.yml"


@dataclass(frozen=True)
class Card:
    """One card. Peak rates are dense and never reached; the context is a public report's, not ours."""

    key: str
    name: str
    compute_capability: tuple[int, int]
    total_gib: float
    """What PyTorch reports as the card's total."""
    context_mib: float
    """What a process holds on the card before its first tensor."""
    bf16_tflops: float
    """With fp32 accumulation."""
    fp32_tflops: float
    """Without TF32, which torch leaves off."""
    gb_per_s: float
    host_gb_per_s: float
    """Between the card and the host, in one direction."""
    source: Mapping[str, str]

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
    """Every card of the file, by key, smallest first. Raises: FileNotFoundError; ValueError, naming file, card, field and value."""
    try:
        cards = {key: _card(key, row) for key, row in read_mapping(path).items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dict(sorted(cards.items(), key=lambda item: item[1].total_gib))


def _card(key: str, row: Mapping) -> Card:
    check_type(key, row, "dict")
    kinds = {field.name: str(field.type) for field in fields(Card) if field.name != "key"}
    if wrong := set(row) ^ set(kinds):
        raise ValueError(f"{key}: {unknown(wrong, kinds)} is missing or unknown; a card has {', '.join(kinds)}")
    for name, value in row.items():
        check_type(f"{key}: {name}", value, "dict" if name == "source" else kinds[name])
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name != "context_mib")):
            raise ValueError(f"{key}: {name} is {value}: use more than 0")
    for name, text in row["source"].items():
        check_type(f"{key}: source.{name}", text, "str")
    capability = row["compute_capability"]
    if not isinstance(capability, list) or len(capability) != 2 or not all(type(part) is int and 0 <= part < 99 for part in capability):
        raise ValueError(f"{key}: compute_capability is {short(capability)}: use two whole numbers, such as [8, 9]")
    found = Card(key, **{**row, "compute_capability": tuple(capability)})
    if not 0 < found.capacity_bytes < 2**50:
        raise ValueError(f"{key}: total_gib is {found.total_gib} and context_mib {found.context_mib}: the card needs room for both")
    return found


def card(key: str, path: Path = CARDS_FILE) -> Card:
    """The card called `key`. Raises: ValueError, naming the cards there are."""
    cards = read_cards(path)
    if key not in cards:
        raise ValueError(f"no card {unknown([key], cards)} in {Path(path).name}; it has: {', '.join(cards)}")
    return cards[key]
