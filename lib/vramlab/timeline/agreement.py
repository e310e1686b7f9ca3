"""A forecast compared with a measurement: both curves on the same axes, how far apart they are, and
where they part.

    agreement = compare(recorder.frame(), forecast(question).trace.frame, steps={1: 1})
    agreement.peak_error, agreement.first(), agreement.curve

Errors are signed shares of the measured value: +0.01 is a forecast 1 % too high. The curves are of
requested bytes, which both sides know exactly. Allocated and reserved bytes are compared too where
both timelines have them: a recording has, a forecast has after `reserved.through_allocator`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from .align import Joined, joined
from .events import alive_rows, on_device, peak_event


@dataclass(frozen=True)
class Divergence:
    """An allocation that only one side has, or that one side frees at another time.

    `at`: how many matched allocations lie before it. `what`: "not predicted", "only predicted",
    "freed later than predicted", "freed earlier than predicted", and for what only one side holds
    when the step begins "held before, not predicted" and "held before, only predicted". Where only
    the measurement has the allocation, `op` is unknown and `module` is as far as a history knows
    it.
    """

    at: int
    what: str
    phase: str
    op: str
    module: str
    category: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Agreement:
    """The comparison of a run's step. Bytes are requested bytes."""

    measured_peak_bytes: int
    predicted_peak_bytes: int
    curve: pd.DataFrame
    """One row for each matched allocation: `at`, `t_s` and `phase` of the measurement,
    `measured_bytes`, `predicted_bytes` (alive after it), `error_bytes`; and
    `measured_allocated_bytes`, `predicted_allocated_bytes`, and the same of `reserved`, where both
    sides have them."""
    peaks: Mapping[str, tuple[int, int]]
    """(measured, predicted) within the step, of `allocated` and `reserved` where both have them."""
    divergences: tuple[Divergence, ...]
    """In the order of the step."""
    joined: Joined

    @property
    def peak_error(self) -> float:
        return self.predicted_peak_bytes / self.measured_peak_bytes - 1

    @property
    def worst_error(self) -> float:
        """Largest distance of the curves after any matched allocation, as a share of the measured
        peak; NaN if no allocation matched."""
        return float(self.curve["error_bytes"].abs().max() / self.measured_peak_bytes)

    def first(self, least_bytes: int = 0) -> Divergence | None:
        """The first divergence of at least `least_bytes`."""
        return next((each for each in self.divergences if each.bytes >= least_bytes), None)

    def largest(self) -> Divergence | None:
        """The divergence of most bytes."""
        return max(self.divergences, key=lambda each: each.bytes, default=None)

    def to_json(self) -> dict:
        first, largest = self.first(), self.largest()
        return {
            "measured_peak_bytes": self.measured_peak_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "peak_error": self.peak_error,
            "worst_error": self.worst_error,
            "peaks": {
                name: {
                    "measured_bytes": measured,
                    "predicted_bytes": predicted,
                    "error": predicted / measured - 1,
                }
                for name, (measured, predicted) in self.peaks.items()
            },
            "matched_share": self.joined.share,
            "matched_bytes_share": self.joined.bytes_share,
            "matched": self.joined.method,
            "divergences": len(self.divergences),
            "first_divergence": first and asdict(first),
            "largest_divergence": largest and asdict(largest),
        }


def compare(
    measured: pd.DataFrame, predicted: pd.DataFrame, steps: Mapping[int, int] | None = None
) -> Agreement:
    """Compare one step, or several, of two timelines, both as `Meter.frame` gives them. `steps`:
    step of the first -> step of the second, by default the last step that both have. Raises:
    ValueError, when they have no step in common."""
    common = sorted(set(measured["step"]) & set(predicted["step"]))
    if steps is None and not common:
        raise ValueError(
            f"no step in common: {sorted(set(measured['step']))} were measured,"
            f" {sorted(set(predicted['step']))} predicted; say which are to be compared with"
            " steps={measured: predicted}"
        )
    steps = {common[-1]: common[-1]} if steps is None else dict(steps)
    match = joined(measured, predicted, steps)
    rows, others = match.pairs.T
    curve = pd.DataFrame(
        {
            "at": np.arange(len(rows)),
            "t_s": measured["t_s"].to_numpy()[rows],
            "phase": measured["phase"].to_numpy()[rows],
            "measured_bytes": measured["live_bytes"].to_numpy()[rows],
            "predicted_bytes": predicted["live_bytes"].to_numpy()[others],
        }
    )
    curve["error_bytes"] = curve["predicted_bytes"] - curve["measured_bytes"]
    peaks = {}
    for name in ("allocated", "reserved"):
        column = f"{name}_bytes"
        if column in measured and column in predicted and measured[column].notna().all():
            curve[f"measured_{column}"] = measured[column].to_numpy(np.int64)[rows]
            curve[f"predicted_{column}"] = predicted[column].to_numpy(np.int64)[others]
            peaks[name] = (
                int(measured[column][measured["step"].isin(steps.keys())].max()),
                int(predicted[column][predicted["step"].isin(steps.values())].max()),
            )
    return Agreement(
        _peak(measured, steps),
        _peak(predicted, steps.values()),
        curve,
        peaks,
        (*_held_before(match, predicted, steps), *_within(match, measured, predicted, steps)),
        match,
    )


def _peak(frame: pd.DataFrame, steps: Iterable[int]) -> int:
    return max(int(frame.at[peak_event(frame, step), "live_bytes"]) for step in steps)


def _held_before(
    match: Joined, predicted: pd.DataFrame, steps: Mapping[int, int]
) -> list[Divergence]:
    """What only one side holds when the first step begins, largest first. Inputs are left out:
    where they are made depends on who loads them."""

    def alive_before(frame: pd.DataFrame, step: int) -> pd.DataFrame:
        alive = alive_rows(frame, int((frame["step"] == step).to_numpy().argmax()) - 1)
        return alive[alive["category"] != "inputs"]

    ours, theirs = (
        alive_before(match.frame, min(steps)),
        alive_before(predicted, min(steps.values())),
    )
    divergences = [
        *_surplus(ours, theirs, "held before, not predicted"),
        *_surplus(theirs, ours, "held before, only predicted"),
    ]
    return sorted(divergences, key=lambda each: -each.bytes)


def _surplus(ours: pd.DataFrame, theirs: pd.DataFrame, kind: str) -> list[Divergence]:
    """Those of `ours` for which `theirs` has no allocation of the same size left."""
    left, surplus = Counter(theirs["bytes"].tolist()), []
    for number, size in enumerate(ours["bytes"].tolist()):
        left[size] -= 1
        if left[size] < 0:
            surplus.append(_divergence(ours.iloc[number], 0, kind))
    return surplus


def _within(
    match: Joined, measured: pd.DataFrame, predicted: pd.DataFrame, steps: Mapping[int, int]
) -> list[Divergence]:
    """What only one side allocates, or frees at another time, within the steps."""
    rows, others = match.pairs.T
    # the joined frame of the measurement has the names that the forecast gave it
    divergences = [
        *_unmatched(match.frame, rows, list(steps), "not predicted"),
        *_unmatched(predicted, others, list(steps.values()), "only predicted"),
    ]
    freed, expected = _deaths(measured, rows), _deaths(predicted, others)
    for number in np.flatnonzero(freed != expected).tolist():
        when = "later" if freed[number] > expected[number] else "earlier"
        at = int(min(freed[number], expected[number]))
        row = predicted.iloc[others[number]]
        divergences.append(_divergence(row, at, f"freed {when} than predicted"))
    return sorted(divergences, key=lambda each: each.at)


def _unmatched(
    frame: pd.DataFrame, matched: np.ndarray, steps: list[int], kind: str
) -> list[Divergence]:
    requests = frame["step"].isin(steps) & (frame["event"] == "alloc") & (frame["bytes"] > 0)
    alone = np.setdiff1d(np.flatnonzero(requests.to_numpy() & on_device(frame)), matched)
    return [
        _divergence(frame.iloc[row], int(np.searchsorted(matched, row)), kind)
        for row in alone.tolist()
    ]


def _deaths(frame: pd.DataFrame, matched: np.ndarray) -> np.ndarray:
    """For each matched allocation, how many matched allocations were made before it was freed; one
    more than there are where it was not freed, or not within these steps."""
    frees = frame[frame["event"] == "free"].drop_duplicates("storage", keep="last")
    death = pd.Series(frees.index, index=frees["storage"].to_numpy())
    last = death.reindex(frame["storage"].to_numpy()[matched]).fillna(len(frame)).to_numpy()
    lasting = last > matched[-1:].max(initial=-1)
    return np.where(lasting, len(matched) + 1, np.searchsorted(matched, last))


def _divergence(row: pd.Series, at: int, kind: str) -> Divergence:
    return Divergence(
        at, kind, row["phase"], row["op"], row["module"], row["category"], int(row["bytes"])
    )
