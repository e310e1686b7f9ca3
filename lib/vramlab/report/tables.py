"""The table behind each plot: tidy frames made from finished runs, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pandas as pd

from ..factcc.statistics import compare, holm
from ..runs.folder import Run
from ..timeline import thin

MIB = 2**20
REFERENCE = "full"
SCORINGS = {"yesno": "yes/no answer", "likelihood": "likelihood of the claim"}
"""The model's own, with their labels; the other judges have no model."""


def summary(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run: outcome, peaks, speed, sizes, and the balanced accuracy in the training domain
    of both scorings with its interval. A run that did not finish has its outcome and reason
    alone."""
    return pd.DataFrame([_summary(run) for run in runs])


def _summary(run: Run) -> dict:
    result = run.result
    row = {"regime": run.name, "outcome": result["outcome"], "reason": result["reason"]}
    if not run.ok:
        return row
    speed, peaks = result["speed"], result.get("peak_bytes", {})
    row |= {
        "peak_mib": mib(peaks.get("meter")),
        "process_peak_mib": mib(peaks.get("process")),
        "phase": result.get("peak", {}).get("phase"),
        "host_mib": mib(result.get("host_bytes")),
        "optimizer_state_mib": mib(result.get("optimizer_state_bytes")),
        "trainable_parameters": result["trainable_parameters"],
        "tokens_per_s": speed["tokens_per_s"],
        "step_ms": 1000 * speed["step_s_median"],
        "step_ms_q25": 1000 * speed["step_s_q25"],
        "step_ms_q75": 1000 * speed["step_s_q75"],
        "forward_ms": 1000 * speed["forward_s"],
        "backward_ms": 1000 * speed["backward_s"],
        "update_ms": 1000 * speed["update_s"],
        "loss_first": result["loss_first"],
        "loss_last": result["loss_last"],
    }
    for scoring, score in in_domain(run).loc[list(SCORINGS)].iterrows():
        row |= {
            scoring: score["value"],
            f"{scoring}_low": score["low"],
            f"{scoring}_high": score["high"],
        }
    return row


def mib(size_bytes: int | None) -> float | None:
    """Bytes in MiB; None, which is not measured, stays None."""
    return None if size_bytes is None else size_bytes / MIB


def in_domain(run: Run) -> pd.DataFrame:
    """Balanced accuracy on new documents of the training domain: one row a scoring, which is the
    index."""
    frame = run.accuracy
    rows = (
        (frame["domain"] == run.params["train_domain"])
        & (frame["shift"] == "none")
        & (frame["metric"] == "balanced_accuracy")
    )
    return frame[rows].set_index("scoring")


def place(domain: str, shift: str, home: str) -> str:
    """A column's name: the domain, and in the training domain `home` how far it was shifted."""
    return f"{domain}, {shift}" if domain == home and shift != "none" else domain


def _places(frame: pd.DataFrame, home: str) -> list[str]:
    return [place(*cell, home) for cell in zip(frame["domain"], frame["shift"], strict=True)]


def accuracy(runs: Sequence[Run], metric: str = "balanced_accuracy") -> pd.DataFrame:
    """Every run, place and scoring: value, interval, n. A judge without a model, which no run
    changes, appears once under its own name."""
    frames: list[pd.DataFrame] = []
    for run in (run for run in runs if run.ok):
        frame = run.accuracy[run.accuracy["metric"] == metric].copy()
        models = frame["scoring"].isin(SCORINGS)
        frame["place"] = _places(frame, run.params["train_domain"])
        frame["judge"] = np.where(models, run.name, frame["scoring"].str.replace("_", " "))
        listed = {name for earlier in frames for name in earlier["scoring"]}
        frames.append(frame[models | ~frame["scoring"].isin(listed)])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def against_reference(runs: Sequence[Run]) -> pd.DataFrame:
    """Each run minus full fine-tuning on the same items: difference of balanced accuracy, its
    interval, exact McNemar p, and Holm's correction over the runs compared in that place and
    scoring. A run on other items is left out, because the comparison is paired. The frame is empty
    without finished full fine-tuning, or without another run.
    """
    base = next((run for run in runs if run.ok and run.name == REFERENCE), None)
    if base is None:
        return pd.DataFrame()
    frames = []
    for run in (run for run in runs if run.ok and run is not base):
        with suppress(ValueError):
            frames.append(compare(run.scores, base.scores).assign(regime=run.name))
    if not frames:
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True)
    frame["place"] = _places(frame, base.params["train_domain"])
    groups = frame.groupby(["place", "scoring"])
    frame["holm_p"] = groups["mcnemar_p"].transform(lambda p: holm(list(p)))
    return frame


def ledger(runs: Sequence[Run]) -> pd.DataFrame:
    """Bytes by category at each run's peak, in MiB: one row a run and category."""
    return pd.DataFrame(
        [
            {"regime": run.name, "category": category, "mib": size / MIB}
            for run in runs
            if run.ok and run.has_timeline
            for category, size in run.result["memory_ledger"].items()
        ]
    )


def owners(runs: Sequence[Run]) -> pd.DataFrame:
    """The largest owners at each run's peak, with its phase."""
    return pd.DataFrame(
        [
            {"regime": run.name, "phase": run.result["peak"]["phase"], **owner}
            for run in runs
            for owner in run.result["peak"]["owners"]
        ]
    )


def recalls(runs: Sequence[Run]) -> pd.DataFrame:
    """Share of answers that are right by transformation, in the training domain, yes/no at the
    validation threshold."""
    rows = []
    for run in (run for run in runs if run.ok):
        threshold = in_domain(run).loc["yesno", "threshold"]
        items = run.scores[
            (run.scores["split"] != "val")
            & (run.scores["domain"] == run.params["train_domain"])
            & (run.scores["shift"] == "none")
        ]
        kind = items["transform"].str.removesuffix("+noise").replace("", "unchanged")
        right = (items["yesno"] > threshold) == (items["label"] == 1)
        counts = right.groupby(kind).agg(["mean", "size"])
        rows += [
            {"regime": run.name, "transform": transform, "right": share, "n": count}
            for transform, share, count in counts.itertuples()
        ]
    return pd.DataFrame(rows)


def written(runs: Sequence[Run]) -> pd.DataFrame:
    """What became of the claims that the models wrote: regime, judge, place, the share of each
    call, and the interval of `consistent`."""
    rows: dict[tuple, dict] = {}
    for run in runs:
        for share in run.result.get("generation", {}).get("shares", ()):
            where = place(share["domain"], share["shift"], run.params["train_domain"])
            names = {"regime": run.name, "judge": share["judge"], "place": where}
            row = rows.setdefault(tuple(names.values()), names)
            row |= {share["call"]: share["share"], "n": share["n"]}
            if share["call"] == "consistent":
                row |= {"low": share["low"], "high": share["high"]}
    return pd.DataFrame(rows.values())


def curve(run: Run, points: int = 500) -> pd.DataFrame:
    """A run's timeline thinned for drawing: bytes by category after each event, wide, in MiB, with
    `event`, `step`, `phase` and `live`. Of each bin of events the highest is kept, so the peak
    survives."""
    frame = run.timeline
    wide = pd.DataFrame(
        {
            **{name: sizes / MIB for name, sizes in thin.category_curves(frame).items()},
            "event": np.arange(len(frame)),
            "step": frame["step"],
            "phase": frame["phase"],
            "live": frame["live_bytes"] / MIB,
        }
    )
    return wide.iloc[thin.highest_of_bins(wide["live"], points)].reset_index(drop=True)


def would_fit(runs: Sequence[Run]) -> pd.DataFrame:
    """Of each run that ran out of memory and left evidence: what was changed in a forecast of it,
    the peak then, and whether that fits."""
    rows = [
        {
            "regime": run.name,
            "with": change["change"],
            "row": change.get("regime", ""),
            "kind": change.get("kind", ""),
            "reserved_mib": mib(change.get("peak_reserved_bytes") or None),
            "verdict": change["reason"] or ("fits" if change["fits"] else "does not fit"),
        }
        for run in runs
        for change in run.result.get("oom", {}).get("would_fit", ())
    ]
    return pd.DataFrame(rows, columns=["regime", "with", "row", "kind", "reserved_mib", "verdict"])
