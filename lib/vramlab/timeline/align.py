"""Two event lists of the same steps, laid side by side: what a history cannot say is taken from the
forecast that can.

Allocations are matched in order, by phase and size, step by step: the longest common subsequence,
found by Myers' greedy algorithm (Algorithmica 1, 1986), so what both have in the same order is
matched and nothing else. A match is an inference: two allocations of one size that changed places
are told apart by nothing. The share that was matched is part of the result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .events import on_device

MOST_DIFFERENCES = 3000
"""Of two lists; beyond, they are matched by the ordinal among their likes, in order, and that is
said."""
BACKWARD = ("backward", "recompute")


@dataclass(frozen=True, eq=False)
class Joined:
    """`frame`: the recorded timeline with modules and operations; `pairs` (n, 2): numbers of
    matched allocations, rows of the recorded frame and of the other. Shares are of allocations and
    bytes in the steps both have; NaN where there are none.
    """

    frame: pd.DataFrame
    pairs: np.ndarray
    share: float
    bytes_share: float
    backward_bytes_share: float
    """Of what backward allocates, whose owners no history knows."""
    method: str


def joined(
    recorded: pd.DataFrame, forecast: pd.DataFrame, steps: Mapping[int, int] | None = None
) -> Joined:
    """Lay `recorded` and `forecast`, both as `Meter.frame` gives them, side by side. `steps`: step
    of the first -> step of the second; by default those of equal number. Storages get their
    operation, and those made in backward their module, from the forecast; of what nobody declared,
    what a kernel takes for itself becomes a workspace."""
    steps = (
        {step: step for step in set(recorded["step"]) & set(forecast["step"])}
        if steps is None
        else steps
    )
    pairs, asked, exact = [], [], True
    for ours, theirs in sorted(steps.items()):
        mine, other = _allocations(recorded, ours), _allocations(forecast, theirs)
        found, whole = align(_elements(recorded, mine), _elements(forecast, other))
        pairs += [(mine[i], other[j]) for i, j in found]
        asked, exact = [*asked, *mine], exact and whole
    matched = np.array(pairs, np.int64).reshape(-1, 2)
    method = (
        "in order, by phase and size"
        if exact
        else "by ordinal among those of equal phase and size, in order"
    )
    shares = _shares(recorded, np.array(asked, np.int64), matched[:, 0])
    return Joined(_named(recorded, forecast, matched), matched, *shares, method)


def _allocations(frame: pd.DataFrame, step: int) -> list[int]:
    wanted = (
        on_device(frame) & (frame["event"] == "alloc").to_numpy() & (frame["bytes"] > 0).to_numpy()
    )
    return np.flatnonzero(wanted & (frame["step"] == step).to_numpy()).tolist()


def _elements(frame: pd.DataFrame, rows: list[int]) -> list[tuple[str, int]]:
    return list(
        zip(frame["phase"].to_numpy()[rows], frame["bytes"].to_numpy()[rows].tolist(), strict=True)
    )


def _shares(
    frame: pd.DataFrame, asked: np.ndarray, matched: np.ndarray
) -> tuple[float, float, float]:
    sizes, backward = frame["bytes"].to_numpy(), frame["phase"].isin(BACKWARD).to_numpy()

    def share(part: np.ndarray, whole: np.ndarray) -> float:
        return float(part.sum() / whole.sum()) if whole.sum() else float("nan")

    return (
        len(matched) / len(asked) if len(asked) else float("nan"),
        share(sizes[matched], sizes[asked]),
        share(sizes[matched[backward[matched]]], sizes[asked[backward[asked]]]),
    )


def _named(recorded: pd.DataFrame, forecast: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    frame = recorded.copy()
    storages = recorded["storage"].to_numpy()[pairs[:, 0]]
    told = forecast.iloc[pairs[:, 1]].set_index(storages)
    frame["op"] = frame["storage"].map(told["op"]).astype(object).fillna(frame["op"])
    unnamed = frame["module"] == ""
    frame.loc[unnamed, "module"] = (
        frame["storage"].map(told["module"]).astype(object).fillna("")[unnamed]
    )
    workspaces = frame["storage"].isin(told.index[told["category"] == "workspace"])
    frame.loc[workspaces & frame["category"].isin(("activations", "temporaries")), "category"] = (
        "workspace"
    )
    return frame


# two lists ----------------------------------------------------------------------------------------


def align(
    ours: Sequence[Hashable], theirs: Sequence[Hashable], most: int = MOST_DIFFERENCES
) -> tuple[list[tuple[int, int]], bool]:
    """(pairs of places that hold the same, ascending in both; whether no longer list of pairs
    exists)."""
    start = 0
    while start < min(len(ours), len(theirs)) and ours[start] == theirs[start]:
        start += 1
    ends = 0
    while ends < min(len(ours), len(theirs)) - start and ours[-1 - ends] == theirs[-1 - ends]:
        ends += 1
    mine, other = ours[start : len(ours) - ends], theirs[start : len(theirs) - ends]
    inner = _shortest_edit(mine, other, most)
    exact, inner = inner is not None, _by_ordinal(mine, other) if inner is None else inner
    pairs = [(at, at) for at in range(start)] + [(start + i, start + j) for i, j in inner]
    return pairs + [(len(ours) - at, len(theirs) - at) for at in range(ends, 0, -1)], exact


def _shortest_edit(ours: Sequence, theirs: Sequence, most: int) -> list[tuple[int, int]] | None:
    """Myers: the furthest place reached on each diagonal with so many differences; None beyond
    `most` of them."""
    reached, trail = {1: 0}, []
    for differences in range(most + 1):
        trail.append(dict(reached))
        for diagonal in range(-differences, differences + 1, 2):
            down = diagonal == -differences or (
                diagonal != differences and reached[diagonal - 1] < reached[diagonal + 1]
            )
            x = reached[diagonal + 1] if down else reached[diagonal - 1] + 1
            y = x - diagonal
            while x < len(ours) and y < len(theirs) and ours[x] == theirs[y]:
                x, y = x + 1, y + 1
            reached[diagonal] = x
            if x >= len(ours) and y >= len(theirs):
                return _back(trail, len(ours), len(theirs))
    return None


def _back(trail: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    pairs = []
    for differences in range(len(trail) - 1, -1, -1):
        reached, diagonal = trail[differences], x - y
        down = diagonal == -differences or (
            diagonal != differences and reached[diagonal - 1] < reached[diagonal + 1]
        )
        before = diagonal + 1 if down else diagonal - 1
        from_x = reached[before] if differences else 0
        from_y = from_x - before if differences else 0
        while x > from_x and y > from_y:
            x, y = x - 1, y - 1
            pairs.append((x, y))
        x, y = from_x, from_y
    return pairs[::-1]


def _by_ordinal(ours: Sequence, theirs: Sequence) -> list[tuple[int, int]]:
    """The n-th of a kind to the n-th of that kind, and of these pairs the longest ascending
    part."""
    places, seen = defaultdict(list), Counter()
    for at, thing in enumerate(theirs):
        places[thing].append(at)
    pairs = []
    for at, thing in enumerate(ours):
        if seen[thing] < len(places[thing]):
            pairs.append((at, places[thing][seen[thing]]))
            seen[thing] += 1
    return _ascending(pairs)


def _ascending(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ends: list[int] = []  # smallest second place an ascending part of each length ends in
    last: list[int] = []  # ... and which pair that is
    before = [-1] * len(pairs)
    for number, (_, place) in enumerate(pairs):
        length = bisect_left(ends, place)
        ends[length : length + 1], last[length : length + 1] = [place], [number]
        before[number] = last[length - 1] if length else -1
    found, at = [], last[-1] if last else -1
    while at >= 0:
        found.append(pairs[at])
        at = before[at]
    return found[::-1]
