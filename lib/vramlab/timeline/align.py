"""Two event lists of the same steps, laid side by side: what a history cannot say is taken from the
forecast, which can.

Allocations are matched in order, by phase and size, step by step: the longest common subsequence,
found by Myers' greedy algorithm (Algorithmica 1, 1986), so what both lists have in the same order
is matched and nothing else. A match is an inference: nothing shows that two allocations of equal
size have changed places. The share that was matched is part of the result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .events import on_device

MOST_DIFFERENCES = 3000
"""Between two lists. With more differences, allocations are matched by their ordinal among those of
equal phase and size, and the result says so."""


@dataclass(frozen=True, eq=False)
class Joined:
    """`frame`: the recorded timeline with modules and operations; `pairs` (n, 2): matched
    allocations, as row numbers of the recorded frame and of the other. Shares are of allocations
    and of bytes in the steps that both have; NaN where there are none."""

    frame: pd.DataFrame
    pairs: np.ndarray
    share: float
    bytes_share: float
    method: str


def joined(
    recorded: pd.DataFrame, forecast: pd.DataFrame, steps: Mapping[int, int] | None = None
) -> Joined:
    """Lay `recorded` and `forecast`, both as `Meter.frame` gives them, side by side.

    `steps`: step of the first -> step of the second; by default steps of equal number. Storages get
    their operation, and those made in backward their module, from the forecast. An undeclared
    storage that the forecast knows as a kernel's own becomes a workspace.
    """
    if steps is None:
        steps = {step: step for step in set(recorded["step"]) & set(forecast["step"])}
    pairs, requests, exact = [], list[int](), True
    for step, other_step in sorted(steps.items()):
        rows, others = _allocations(recorded, step), _allocations(forecast, other_step)
        places, whole = align(_elements(recorded, rows), _elements(forecast, others))
        pairs += [(rows[i], others[j]) for i, j in places]
        requests, exact = requests + rows, exact and whole
    matched = np.array(pairs, np.int64).reshape(-1, 2)
    sizes = recorded["bytes"].to_numpy()
    share, bytes_share = float("nan"), float("nan")
    if requests:
        share = len(pairs) / len(requests)
        bytes_share = float(sizes[matched[:, 0]].sum() / sizes[requests].sum())
    return Joined(
        _named(recorded, forecast, matched),
        matched,
        share,
        bytes_share,
        "in order, by phase and size"
        if exact
        else "by ordinal among those of equal phase and size, in order",
    )


def _allocations(frame: pd.DataFrame, step: int) -> list[int]:
    requests = (frame["event"] == "alloc") & (frame["bytes"] > 0) & (frame["step"] == step)
    return np.flatnonzero(requests.to_numpy() & on_device(frame)).tolist()


def _elements(frame: pd.DataFrame, rows: list[int]) -> list[tuple[str, int]]:
    phases, sizes = frame["phase"].to_numpy()[rows], frame["bytes"].to_numpy()[rows]
    return list(zip(phases, sizes.tolist(), strict=True))


def _named(recorded: pd.DataFrame, forecast: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    frame = recorded.copy()
    storages = recorded["storage"].to_numpy()[pairs[:, 0]]
    known = forecast.iloc[pairs[:, 1]].set_index(storages)
    known = known[~known.index.duplicated(keep="last")]  # a storage that changed its size
    ops, modules = (frame["storage"].map(known[name]).astype(object) for name in ("op", "module"))
    frame["op"] = ops.fillna(frame["op"])
    frame["module"] = modules.fillna("").where(frame["module"] == "", frame["module"])
    workspaces = frame["storage"].isin(known.index[known["category"] == "workspace"])
    undeclared = frame["category"].isin(("activations", "temporaries"))
    frame.loc[workspaces & undeclared, "category"] = "workspace"
    return frame


# two lists ----------------------------------------------------------------------------------------


def align(
    ours: Sequence[Hashable], theirs: Sequence[Hashable], most: int = MOST_DIFFERENCES
) -> tuple[list[tuple[int, int]], bool]:
    """(pairs of places that hold equal elements, ascending in both; whether no longer list of pairs
    exists)."""
    start, ends, shorter = 0, 0, min(len(ours), len(theirs))
    while start < shorter and ours[start] == theirs[start]:
        start += 1
    while ends < shorter - start and ours[-1 - ends] == theirs[-1 - ends]:
        ends += 1
    ours_between, theirs_between = (
        ours[start : len(ours) - ends],
        theirs[start : len(theirs) - ends],
    )
    inner = _shortest_edit(ours_between, theirs_between, most)
    exact = inner is not None
    if inner is None:
        inner = _by_ordinal(ours_between, theirs_between)
    pairs = [(at, at) for at in range(start)] + [(start + i, start + j) for i, j in inner]
    return pairs + [(len(ours) - at, len(theirs) - at) for at in range(ends, 0, -1)], exact


def _shortest_edit(ours: Sequence, theirs: Sequence, most: int) -> list[tuple[int, int]] | None:
    """Myers: for each number of differences the furthest place reached on each diagonal, with the
    runs of matches on the way there. None when the lists have more than `most` differences."""
    reached: dict[int, tuple[int, tuple | None]] = {1: (0, None)}
    for differences in range(most + 1):
        for diagonal in range(-differences, differences + 1, 2):
            down = diagonal == -differences or (
                diagonal != differences and reached[diagonal - 1][0] < reached[diagonal + 1][0]
            )
            start, runs = reached[diagonal + 1] if down else reached[diagonal - 1]
            start += 0 if down else 1
            x = start
            while x < len(ours) and x - diagonal < len(theirs) and ours[x] == theirs[x - diagonal]:
                x += 1
            reached[diagonal] = x, ((start, x, diagonal, runs) if x > start else runs)
            if x >= len(ours) and x - diagonal >= len(theirs):
                return _pairs(reached[diagonal][1])
    return None


def _pairs(runs: tuple | None) -> list[tuple[int, int]]:
    """The pairs of a linked list of runs, whose last run comes first."""
    pairs = []
    while runs is not None:
        start, end, diagonal, runs = runs
        pairs += [(x, x - diagonal) for x in reversed(range(start, end))]
    return pairs[::-1]


def _by_ordinal(ours: Sequence, theirs: Sequence) -> list[tuple[int, int]]:
    """Match the n-th element of a kind with the n-th of that kind, and keep the longest ascending
    part of these pairs."""
    places = {element: place for place, element in enumerate(_numbered(theirs))}
    pairs = [(at, places[each]) for at, each in enumerate(_numbered(ours)) if each in places]
    return _ascending(pairs)


def _numbered(elements: Sequence) -> Iterator[tuple[Hashable, int]]:
    """Each element with the number of equal ones before it."""
    counts: Counter = Counter()
    for element in elements:
        yield element, counts[element]
        counts[element] += 1


def _ascending(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part in which both places ascend."""
    ends: list[int] = []  # smallest second place in which an ascending part of each length ends
    last: list[int] = []  # the number of the pair with that place
    before = [-1] * len(pairs)
    for number, (_, place) in enumerate(pairs):
        length = bisect_left(ends, place)
        ends[length : length + 1], last[length : length + 1] = [place], [number]
        before[number] = last[length - 1] if length else -1
    ascending, at = [], last[-1] if last else -1
    while at >= 0:
        ascending.append(pairs[at])
        at = before[at]
    return ascending[::-1]
