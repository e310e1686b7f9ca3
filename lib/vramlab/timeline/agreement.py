"""A forecast held against a measurement: both curves on the same axes, how far apart they are and
where they part.

    found = compare(recorder.frame(), forecast(question).trace.frame, steps={1: 1})
    found.peak_error, found.first, found.curve
    summary(rows)                      # over many runs, see `ROW`

Errors are signed shares of the measured value: +0.01 is a forecast 1 % too high. Curves are of
requested bytes, which both know exactly; what an allocator makes of them is compared too where both
timelines have it: a recording does, a forecast's does after `reserved.through_allocator`. What the
driver makes of it is compared at the peaks (`summary`). Where nothing was measured there is no
error, not an error of 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from .align import Joined, joined
from .events import on_device, peak_event

PEAKS = ("allocated", "reserved", "nvml")
ROW = (
    "regime",
    *(f"{kind}_{name}_bytes" for name in PEAKS for kind in ("predicted", "measured")),
    "predicted_fits",
    "measured_fits",
)
"""What `summary` reads of a run; what is missing or None was not measured, or not predicted."""
TOLERANCE = 0.005
"""A forecast lower than the measurement by more than this share counts as too low beyond
tolerance."""


@dataclass(frozen=True)
class Divergence:
    """An allocation that only one side has, or that one side frees at another time. `at`: how many
    matched allocations lie before it. `what`: "not predicted", "only predicted", "freed later than
    predicted", "freed earlier than predicted", and what one side alone holds when the step begins:
    "held before, not predicted", "held before, only predicted". Where only the measurement has it,
    `op` is unknown and `module` what a history knows."""

    at: int
    what: str
    phase: str
    op: str
    module: str
    category: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Agreement:
    """One run's step. Bytes requested."""

    measured_peak_bytes: int
    predicted_peak_bytes: int
    curve: pd.DataFrame
    """One row a matched allocation: `at`, `t_s` and `phase` of the measurement, `measured_bytes`,
    `predicted_bytes` (alive after it), `error_bytes`; and `measured_allocated_bytes`,
    `predicted_allocated_bytes`, and of `reserved`, where both have them."""
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
        peak; NaN if none matched."""
        return float(self.curve["error_bytes"].abs().max() / self.measured_peak_bytes)

    def first(self, least_bytes: int = 0) -> Divergence | None:
        """The first divergence of at least so many bytes."""
        return next((one for one in self.divergences if one.bytes >= least_bytes), None)

    def to_json(self) -> dict:
        largest = max(self.divergences, key=lambda one: one.bytes, default=None)
        peaks = {
            name: {"measured_bytes": here, "predicted_bytes": there, "error": there / here - 1}
            for name, (here, there) in self.peaks.items()
        }
        return {
            "measured_peak_bytes": self.measured_peak_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "peak_error": self.peak_error,
            "worst_error": self.worst_error,
            "peaks": peaks,
            "matched_share": self.joined.share,
            "matched_bytes_share": self.joined.bytes_share,
            "matched": self.joined.method,
            "divergences": len(self.divergences),
            "first_divergence": self.first() and asdict(self.first()),
            "largest_divergence": largest and asdict(largest),
        }


def compare(
    measured: pd.DataFrame, predicted: pd.DataFrame, steps: Mapping[int, int] | None = None
) -> Agreement:
    """One step, or several. Both timelines as `Meter.frame` gives them; `steps`: step of the first
    -> of the second, by default the last of those both have. Raises: ValueError, when they have
    none in common."""
    both = sorted(set(measured["step"]) & set(predicted["step"]))
    if steps is None and not both:
        raise ValueError(
            f"no step in common: {sorted(set(measured['step']))} were measured,"
            f" {sorted(set(predicted['step']))} predicted; say which are to be compared with"
            " steps={measured: predicted}"
        )
    steps = {both[-1]: both[-1]} if steps is None else dict(steps)
    found = joined(measured, predicted, steps)
    rows, others = found.pairs.T
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
                int(measured[column][measured["step"].isin(list(steps))].max()),
                int(predicted[column][predicted["step"].isin(list(steps.values()))].max()),
            )
    return Agreement(
        _peak(measured, steps),
        _peak(predicted, steps.values()),
        curve,
        peaks,
        tuple(_divergences(found, measured, predicted, steps)),
        found,
    )


def _peak(frame: pd.DataFrame, steps: Iterable[int]) -> int:
    return max(int(frame.at[peak_event(frame, step), "live_bytes"]) for step in steps)


def _divergences(
    found: Joined, measured: pd.DataFrame, predicted: pd.DataFrame, steps: Mapping[int, int]
) -> list[Divergence]:
    rows, others = found.pairs.T
    # the joined frame of the measurement has the names the forecast gave it
    only = [
        *_alone(found.frame, rows, list(steps), "not predicted"),
        *_alone(predicted, others, list(steps.values()), "only predicted"),
    ]
    first, second = min(steps), min(steps.values())
    held, expected = _held(found.frame, first), _held(predicted, second)
    before = [
        *_more(held, expected, "held before, not predicted"),
        *_more(expected, held, "held before, only predicted"),
    ]
    died, should = _deaths(measured, rows), _deaths(predicted, others)
    for number in np.flatnonzero(died != should).tolist():
        late = died[number] > should[number]
        only.append(
            _divergence(
                predicted.iloc[others[number]],
                int(min(died[number], should[number])),
                f"freed {'later' if late else 'earlier'} than predicted",
            )
        )
    return sorted(before, key=lambda one: -one.bytes) + sorted(only, key=lambda one: one.at)


def _held(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    """The allocations that are alive when a step begins, but its inputs: where they are made
    differs by who loads them."""
    begins = int((frame["step"] == step).to_numpy().argmax())
    rows = frame.iloc[:begins][
        on_device(frame)[:begins] & (frame["category"][:begins] != "inputs").to_numpy()
    ]
    last = rows.drop_duplicates("storage", keep="last")  # a storage that changes size has several
    return last[(last["event"] == "alloc") & (last["bytes"] > 0)]


def _more(ours: pd.DataFrame, theirs: pd.DataFrame, what: str) -> list[Divergence]:
    """What of one side has no allocation of its size on the other."""
    left, more = Counter(theirs["bytes"].tolist()), []
    for number, size in enumerate(ours["bytes"].tolist()):
        left[size] -= 1
        more += [_divergence(ours.iloc[number], 0, what)] * (left[size] < 0)
    return more


def _alone(
    frame: pd.DataFrame, matched: np.ndarray, steps: list[int], what: str
) -> list[Divergence]:
    asked = (
        frame["step"].isin(steps)
        & (frame["event"] == "alloc")
        & (frame["bytes"] > 0)
        & (frame["category"] != "host")
    )
    alone = np.setdiff1d(np.flatnonzero(asked.to_numpy()), matched)
    return [
        _divergence(frame.iloc[row], int(np.searchsorted(matched, row)), what)
        for row in alone.tolist()
    ]


def _deaths(frame: pd.DataFrame, matched: np.ndarray) -> np.ndarray:
    """For each matched allocation, how many matched allocations were made before it was freed; all
    of them and one where it was not, or not within these steps."""
    frees = frame[frame["event"] == "free"]
    died = pd.Series(frees.index, index=frees["storage"].to_numpy())
    died = died[~died.index.duplicated(keep="last")]  # a storage that changes size has several
    last = died.reindex(frame["storage"].to_numpy()[matched]).fillna(len(frame)).to_numpy()
    return (
        np.where(last > matched[-1], len(matched) + 1, np.searchsorted(matched, last))
        if len(matched)
        else last
    )


def _divergence(row: pd.Series, at: int, what: str) -> Divergence:
    return Divergence(
        at, what, row["phase"], row["op"], row["module"], row["category"], int(row["bytes"])
    )


# over many runs -----------------------------------------------------------------------------------


def errors(rows: Iterable[Mapping]) -> pd.DataFrame:
    """One row a run: `regime`, and `allocated`, `reserved`, `nvml`: the signed error of that peak,
    NaN where one is missing."""
    return pd.DataFrame(
        [
            {"regime": row.get("regime"), **{name: _error(row, name) for name in PEAKS}}
            for row in rows
        ],
        columns=["regime", *PEAKS],
    )


def _error(row: Mapping, name: str) -> float:
    predicted, measured = (row.get(f"{kind}_{name}_bytes") for kind in ("predicted", "measured"))
    return predicted / measured - 1 if predicted is not None and measured else float("nan")


def summary(rows: Iterable[Mapping]) -> dict:
    """Over all runs, see `ROW`: for each of `PEAKS` {n, median_error, worst_error (of their sizes),
    under_rate, under_rate_beyond (by more than `TOLERANCE`)}; and {n, false_refusal_rate,
    false_promise_rate} of `fits`: refused though it ran, of those that ran; promised though it ran
    out of memory, of those that ran out. None where there is nothing to tell from.
    """
    rows = list(rows)
    table = errors(rows)
    found: dict = {name: _spread(table[name].dropna()) for name in PEAKS}
    told = [
        row
        for row in rows
        if row.get("predicted_fits") is not None and row.get("measured_fits") is not None
    ]
    ran, out = (
        [row["predicted_fits"] for row in told if row["measured_fits"] is fits]
        for fits in (True, False)
    )
    found["fits"] = {
        "n": len(told),
        "false_refusal_rate": ran.count(False) / len(ran) if ran else None,
        "false_promise_rate": out.count(True) / len(out) if out else None,
    }
    return found


def _spread(errors: pd.Series) -> dict:
    if not len(errors):
        return {
            "n": 0,
            "median_error": None,
            "worst_error": None,
            "under_rate": None,
            "under_rate_beyond": None,
        }
    return {
        "n": len(errors),
        "median_error": float(errors.abs().median()),
        "worst_error": float(errors.abs().max()),
        "under_rate": float((errors < 0).mean()),
        "under_rate_beyond": float((errors < -TOLERANCE).mean()),
    }
