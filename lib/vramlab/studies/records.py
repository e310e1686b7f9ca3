"""The evidence of a study: its run folders, thinned to what figures need, and the same read back
from the gallery.

    records = Records.of(plan, Path("outputs/studies/lomo"))
    rows = records.select("quality", regime="lomo")
    records.balanced(rows, domain="news")  # Figure: balanced accuracy over seeds and items

Of every item's score only whether the call was right is kept, at the threshold of the run's own
validation items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..factcc.statistics import MODEL_SCORINGS, choose_threshold
from ..files import write_table
from ..reading import read_table
from ..runs.folder import Run, outcome
from .estimates import Figure, NotRun, two_level
from .plan import Plan, StudyCell

POINTS = 50
"""Steps kept of a run, evenly."""
RESULTS = (
    "outcome",
    "reason",
    "loss_first",
    "loss_last",
    "train_s",
    "trainable_parameters",
    "parameters",
    "weights_hash",
    "truncated_share",
    "config_hash",
)
SPEED = ("tokens_per_s", "step_s_median", "forward_s", "backward_s", "update_s")
TABLES = ("runs", "items", "calls", "accuracy", "steps", "probes")


@dataclass(frozen=True)
class Records:
    """Tables of a study's runs, and of its measurements."""

    runs: pd.DataFrame
    """One row for each arm and run: `arm`, `run_id`, `params` (a dict), its scalar parameters, and
    its results."""
    items: pd.DataFrame
    """One row for each test item of a set."""
    calls: pd.DataFrame
    """For each run and scoring, one bit an item: whether the call was right."""
    accuracy: pd.DataFrame
    """As `factcc.statistics.summarise`."""
    steps: pd.DataFrame
    """`POINTS` steps of each run."""
    probes: pd.DataFrame
    """Probes of guessed gradients."""
    tables: Mapping[str, pd.DataFrame]
    """Arm -> the rows that its measurements returned, with the parameters of each."""

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Records:
        """From run folders. Cells that have not ended are left out."""
        parts: dict[str, list] = {name: [] for name in TABLES}
        tables: dict[str, list] = {}
        gathered: set[str] = set()
        for cell in (cell for cells in plan.arms.values() for cell in cells):
            run = Run(folder / cell.name)
            if outcome(run.folder) is None:
                continue
            if cell.call:
                tables.setdefault(cell.arm, []).append(_measurement(run, cell))
                continue
            parts["runs"].append(_run(run, cell))
            if run.ok and cell.name not in gathered:
                gathered.add(cell.name)
                _gather(run, parts)
        frames = {name: _joined(rows) for name, rows in parts.items()}
        if len(frames["items"]):
            frames["items"] = frames["items"].drop_duplicates(["item_set", "at"], ignore_index=True)
        return cls(**frames, tables={arm: _joined(rows) for arm, rows in tables.items()})

    def write(self, folder: Path) -> None:
        """Write a handful of files, whatever the number of runs."""
        folder.mkdir(parents=True, exist_ok=True)
        frames = {name: getattr(self, name) for name in TABLES}
        if len(self.runs):
            texts = [json.dumps(params, sort_keys=True) for params in self.runs["params"]]
            frames["runs"] = self.runs.assign(params=texts)
        frames = {name: frame for name, frame in frames.items() if len(frame)}
        frames |= {f"table-{arm}": frame for arm, frame in self.tables.items()}
        for name, frame in frames.items():
            write_table(frame, folder / f"{name}.parquet", compression="zstd", index=False)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read what `write` has written. Raises: FileNotFoundError."""
        frames = {path.stem: read_table(path) for path in sorted(folder.glob("*.parquet"))}
        if not frames:
            raise FileNotFoundError(f"no records in {folder}: `make studies` makes them")
        if "runs" in frames:
            frames["runs"]["params"] = [json.loads(params) for params in frames["runs"]["params"]]
        tables = {
            name.removeprefix("table-"): frame
            for name, frame in frames.items()
            if name.startswith("table-")
        }
        return cls(**{name: frames.get(name, pd.DataFrame()) for name in TABLES}, tables=tables)

    def select(self, arm: str, **where) -> pd.DataFrame:
        """The arm's runs that ended ok and have the parameters `where`, by seed. Raises: NotRun,
        when there are none."""
        rows = self.runs
        if len(rows):
            rows = rows[(rows["arm"] == arm) & (rows["outcome"] == "ok")]
            rows = rows[[where.items() <= params.items() for params in rows["params"]]]
        if not len(rows):
            raise NotRun(f"no finished run of arm {arm} has {where}")
        return rows.sort_values("seed", kind="stable", ignore_index=True)

    def right(
        self, rows: pd.DataFrame, domain: str, shift: str, scoring: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each call was right, (seeds, items), and the items' labels. Raises: NotRun, when
        no run was scored; ValueError, when the runs were not scored on the same items."""
        if not len(self.calls):
            raise NotRun("no run was scored")
        calls = self.calls[self.calls["scoring"] == scoring].set_index("run_id")
        calls = calls.loc[list(rows["run_id"])]
        item_sets = calls["item_set"].unique()
        if len(item_sets) != 1:
            raise ValueError(
                f"{len(rows)} runs of {len(item_sets)} sets of items: only those on the same items"
                " compare"
            )
        items = self.items[self.items["item_set"] == item_sets[0]].sort_values("at")
        chosen = ((items["domain"] == domain) & (items["shift"] == shift)).to_numpy()
        if not chosen.any():
            raise ValueError(
                f"no item of domain {domain} and shift {shift}: there are "
                f"{sorted(set(zip(items['domain'], items['shift'], strict=True)))}"
            )
        bits = [
            np.unpackbits(np.frombuffer(row, np.uint8), count=len(items))[chosen]
            for row in calls["bits"]
        ]
        return np.array(bits, bool), items["label"].to_numpy()[chosen]

    def balanced(
        self, rows: pd.DataFrame, domain: str, shift: str = "none", scoring: str = "yesno"
    ) -> Figure:
        """Balanced accuracy over the seeds of `rows`."""
        return two_level(*self.right(rows, domain, shift, scoring))

    def difference(
        self,
        one: pd.DataFrame,
        other: pd.DataFrame,
        domain: str,
        equal: str,
        shift: str = "none",
        scoring: str = "yesno",
    ) -> Figure:
        """Balanced accuracy of `one` minus that of `other`, paired by seed and item. `equal`: the
        budget that both had. Raises: NotRun, when a seed is missing on one side."""
        if list(one["seed"]) != list(other["seed"]):
            raise NotRun(
                f"seeds {list(one['seed'])} against {list(other['seed'])}: only the same seeds"
                " compare"
            )
        right, labels = self.right(one, domain, shift, scoring)
        against, other_labels = self.right(other, domain, shift, scoring)
        if not np.array_equal(labels, other_labels):
            raise ValueError("the two sides were scored on other items")
        return replace(two_level(right, labels, against), equal=equal)


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _run(run: Run, cell: StudyCell) -> pd.DataFrame:
    """The row of a run."""
    result, params = run.result, dict(cell.params)
    if (run.folder / "params.yml").exists():
        params = run.params
    row = {
        **{key: value for key, value in params.items() if isinstance(value, int | float | str)},
        "axes": json.dumps(params.get("axes") or {}, sort_keys=True),
        "arm": cell.arm,
        "run_id": run.folder.name,
        "params": dict(cell.params),
        "item_set": _item_set(run) if run.ok else "",
        **{name: result.get(name) for name in RESULTS},
        **{name: result.get("speed", {}).get(name) for name in SPEED},
        "peak_bytes": (result.get("peak_bytes") or {}).get("meter"),
        "allocated_peak_bytes": (result.get("allocator") or {}).get("allocated_peak_bytes"),
    }
    return pd.DataFrame([row])


def _tested(run: Run) -> pd.DataFrame:
    return run.scores[run.scores["split"] != "val"].reset_index(drop=True)


def _item_set(run: Run) -> str:
    """A hash of the items that the run was tested on."""
    tested = _tested(run)
    text = "\n".join(tested["uid"] + " " + tested["shift"])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _gather(run: Run, parts: Mapping[str, list]) -> None:
    """Append the tables of a run to `parts`; its items and baselines, where no run before had
    them."""
    tested, item_set, run_id = _tested(run), _item_set(run), run.folder.name
    known = any(item_set == frame["item_set"].iloc[0] for frame in parts["items"] if len(frame))
    accuracy = run.accuracy
    if known:
        accuracy = accuracy[accuracy["scoring"].isin(MODEL_SCORINGS)]
    else:
        items = tested[["domain", "shift", "transform", "label"]]
        parts["items"].append(items.assign(item_set=item_set, at=range(len(items))))
    parts["accuracy"].append(accuracy.assign(run_id=run_id))
    parts["calls"] += [_calls(run, tested, item_set, scoring) for scoring in MODEL_SCORINGS]
    steps = run.steps.assign(
        t_s=run.steps["step_s"].cumsum(), tokens_seen=run.steps["tokens"].cumsum(), run_id=run_id
    )
    at = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    columns = ["run_id", "step", "loss", "step_s", "t_s", "tokens_seen", "lr"]
    columns += [name for name in ("highest_logit", "cross_entropy") if name in steps]
    parts["steps"].append(steps.iloc[at][columns])
    probes = run.folder / "probes.parquet"
    if probes.exists():
        parts["probes"].append(read_table(probes).assign(run_id=run_id))


def _calls(run: Run, tested: pd.DataFrame, item_set: str, scoring: str) -> pd.DataFrame:
    """Whether each test item was called right, at the threshold of the validation items."""
    validation = run.scores[run.scores["split"] == "val"]
    threshold = choose_threshold(validation["label"], validation[scoring])
    right = (tested[scoring] > threshold).to_numpy() == (tested["label"] == 1).to_numpy()
    row = {"run_id": run.folder.name, "item_set": item_set, "scoring": scoring}
    return pd.DataFrame([{**row, "bits": np.packbits(right).tobytes()}])


def _measurement(run: Run, cell: StudyCell) -> pd.DataFrame:
    """The table of a measurement, with those of its parameters that are no columns of it."""
    params = {
        key: value if isinstance(value, int | float | str) else json.dumps(value, sort_keys=True)
        for key, value in cell.params.items()
    }
    if not run.ok:
        return pd.DataFrame([{**params, "reason": run.result["reason"]}])
    more = {key: value for key, value in params.items() if key not in run.table}
    return run.table.assign(**more, reason="")
