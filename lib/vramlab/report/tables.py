"""The table behind each plot: tidy frames made from finished runs, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..factcc.statistics import compare, holm
from ..runs.folder import Run
from ..timeline import thin

MIB = 2**20
REFERENCE = "full"


def summary(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run: outcome, peaks, speed, sizes, in-domain balanced accuracy of both scorings
    with its interval."""
    return pd.DataFrame([_summary(run) for run in runs])


def _summary(run: Run) -> dict:
    result = run.result
    row = {"regime": run.name, "outcome": result["outcome"], "reason": result["reason"]}
    if not run.ok:
        return row
    speed, peaks, peak = result["speed"], result.get("peak_bytes", {}), result.get("peak", {})
    row |= {
        "peak_mib": _mib(peaks.get("meter")),
        "process_peak_mib": _mib(peaks.get("process")),
        "phase": peak.get("phase"),
        "host_mib": _mib(result.get("host_bytes")),
        "optimizer_state_mib": _mib(result.get("optimizer_state_bytes")),
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
    home = in_domain(run)
    for scoring in ("yesno", "likelihood"):
        cell = home[home["scoring"] == scoring].iloc[0]
        row |= {
            scoring: cell["value"],
            f"{scoring}_low": cell["low"],
            f"{scoring}_high": cell["high"],
        }
    return row


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def in_domain(run: Run) -> pd.DataFrame:
    """Balanced accuracy on new documents of the training domain."""
    frame = run.accuracy
    return frame[
        (frame["domain"] == run.params["train_domain"])
        & (frame["shift"] == "none")
        & (frame["metric"] == "balanced_accuracy")
    ]


def place(domain: str, shift: str, home: str) -> str:
    """A column's name: the domain, and how far it is when it is the training domain itself."""
    return f"{domain}, {shift}" if domain == home and shift != "none" else domain


def accuracy(runs: Sequence[Run], metric: str = "balanced_accuracy") -> pd.DataFrame:
    """Every run, place and scoring: value, interval, n. Baselines, which need no run, appear once
    under their own name."""
    frames, seen = [], set()
    for run in (run for run in runs if run.ok):
        frame = run.accuracy[run.accuracy["metric"] == metric].copy()
        frame["place"] = [
            place(d, s, run.params["train_domain"])
            for d, s in zip(frame["domain"], frame["shift"], strict=True)
        ]
        models = frame["scoring"].isin(("yesno", "likelihood"))
        frame["judge"] = np.where(models, run.name, frame["scoring"].str.replace("_", " "))
        fresh = models | ~frame["scoring"].isin(seen)
        seen |= set(frame.loc[~models, "scoring"])
        frames.append(frame[fresh])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def against_reference(runs: Sequence[Run], reference: str = REFERENCE) -> pd.DataFrame:
    """Each run minus `reference` on the same items: difference of balanced accuracy, its interval,
    exact McNemar p, and Holm's correction over the runs compared in that place and scoring. Empty
    without a finished reference.
    """
    base = next((run for run in runs if run.ok and run.name == reference), None)
    if base is None:
        return pd.DataFrame()
    frames = []
    for run in runs:
        if run.ok and run is not base:
            try:
                frames.append(compare(run.scores, base.scores).assign(regime=run.name))
            except ValueError:  # other items: not a paired comparison, so none is shown
                continue
    if not frames:
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True)
    home = base.params["train_domain"]
    frame["place"] = [
        place(d, s, home) for d, s in zip(frame["domain"], frame["shift"], strict=True)
    ]
    frame["holm_p"] = frame.groupby(["place", "scoring"])["mcnemar_p"].transform(
        lambda p: holm(list(p))
    )
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


def recalls(runs: Sequence[Run]) -> pd.DataFrame:
    """Share judged right by transformation, in the training domain, yes/no at the validation
    threshold."""
    rows = []
    for run in (run for run in runs if run.ok):
        cut = in_domain(run).query("scoring == 'yesno'")["threshold"].iloc[0]
        inside = run.scores[
            (run.scores["split"] != "val")
            & (run.scores["domain"] == run.params["train_domain"])
            & (run.scores["shift"] == "none")
        ]
        kind = inside["transform"].str.removesuffix("+noise").replace("", "unchanged")
        for transform, cell in inside.groupby(kind):
            right = (cell["yesno"] > cut) == (cell["label"] == 1)
            rows.append(
                {"regime": run.name, "transform": transform, "right": right.mean(), "n": len(cell)}
            )
    return pd.DataFrame(rows)


def written(runs: Sequence[Run]) -> pd.DataFrame:
    """What became of the claims that the models wrote: regime, judge, place, each call's share, and
    `consistent`'s interval."""
    rows: dict[tuple, dict] = {}
    for run in runs:
        for said in run.result.get("generation", {}).get("shares", ()):
            where = place(said["domain"], said["shift"], run.params["train_domain"])
            row = rows.setdefault(
                (run.name, said["judge"], where),
                {"regime": run.name, "judge": said["judge"], "place": where},
            )
            row |= {said["call"]: said["share"], "n": said["n"]}
            row |= {end: said[end] for end in ("low", "high") if said["call"] == "consistent"}
    return pd.DataFrame(rows.values())


def curve(run: Run, points: int = 500) -> pd.DataFrame:
    """A run's timeline thinned for drawing: bytes by category after each event, wide, in MiB, with
    `event`, `step`, `phase` and `live`. Of each bin of events the highest is kept, so the peak
    survives."""
    frame = run.timeline
    columns = {name: sizes / MIB for name, sizes in thin.category_curves(frame).items()}
    wide = pd.DataFrame(
        {
            **columns,
            "event": np.arange(len(frame)),
            "step": frame["step"],
            "phase": frame["phase"],
            "live": frame["live_bytes"] / MIB,
        }
    )
    return wide.iloc[thin.highest_of_bins(wide["live"], points)].reset_index(drop=True)


def would_fit(runs: Sequence[Run]) -> pd.DataFrame:
    """Of each run that ran out of memory and left evidence: what was changed in a forecast of it,
    its peak, whether that fits."""
    rows = [
        {
            "regime": run.name,
            "with": change["change"],
            "row": change.get("regime", ""),
            "kind": change.get("kind", ""),
            "reserved_mib": (
                change["peak_reserved_bytes"] / MIB if change.get("peak_reserved_bytes") else None
            ),
            "verdict": change["reason"] or ("fits" if change["fits"] else "does not fit"),
        }
        for run in runs
        for change in run.result.get("oom", {}).get("would_fit", ())
    ]
    return pd.DataFrame(rows, columns=["regime", "with", "row", "kind", "reserved_mib", "verdict"])
