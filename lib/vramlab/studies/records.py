"""The evidence of a study: what its run folders hold, thinned to what figures need, and the same
read back from the gallery.

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
    """`runs`: one row an arm and run: `arm`, `run_id`, `params` (a dict), its scalar parameters,
    and what came out; `items`: one row a test item of a set; `calls`: bits for each run and
    scoring; `accuracy`: as `statistics.summarise`; `steps`: thinned; `probes`: of guessed
    gradients; `tables`: arm -> what its measurements found, with the parameters they were asked
    with.
    """

    runs: pd.DataFrame
    items: pd.DataFrame
    calls: pd.DataFrame
    accuracy: pd.DataFrame
    steps: pd.DataFrame
    probes: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Records:
        """From run folders. Cells that have not ended are not there."""
        found: dict[str, list] = {name: [] for name in TABLES}
        tables: dict[str, list] = {}
        seen: set[str] = set()
        for arm, cells in plan.arms.items():
            for cell in cells:
                target = folder / cell.name
                if outcome(target) is None:
                    continue
                if cell.call:
                    tables.setdefault(arm, []).append(_table(target, cell))
                    continue
                run = Run(target)
                found["runs"].append(_run(arm, run, cell))
                if cell.name not in seen and run.ok:
                    seen.add(cell.name)
                    _gather(run, found)
        frames = {
            name: pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
            for name, rows in found.items()
        }
        if len(frames["items"]):
            frames["items"] = frames["items"].drop_duplicates(["item_set", "at"], ignore_index=True)
        return cls(
            **frames,
            tables={arm: pd.concat(rows, ignore_index=True) for arm, rows in tables.items()},
        )

    def write(self, folder: Path) -> None:
        """A handful of files, whatever the number of runs."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            frame = getattr(self, name)
            if name == "runs" and len(frame):
                frame = frame.assign(
                    params=[json.dumps(params, sort_keys=True) for params in frame["params"]]
                )
            if len(frame):
                write_table(frame, folder / f"{name}.parquet", compression="zstd", index=False)
        for arm, frame in self.tables.items():
            write_table(frame, folder / f"table-{arm}.parquet", compression="zstd", index=False)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """What `write` has written. Raises: FileNotFoundError."""
        if not list(folder.glob("*.parquet")):
            raise FileNotFoundError(f"no records in {folder}: `make studies` makes them")
        frames = {
            name: (
                read_table(path)
                if (path := folder / f"{name}.parquet").exists()
                else pd.DataFrame()
            )
            for name in TABLES
        }
        if len(frames["runs"]):
            frames["runs"]["params"] = [json.loads(params) for params in frames["runs"]["params"]]
        tables = {
            path.stem.removeprefix("table-"): read_table(path)
            for path in sorted(folder.glob("table-*.parquet"))
        }
        return cls(**frames, tables=tables)

    def select(self, arm: str, **where) -> pd.DataFrame:
        """The arm's runs that ended ok and whose parameters are as said, by seed. Raises: NotRun,
        when there is none."""
        if len(self.runs):
            rows = self.runs[(self.runs["arm"] == arm) & (self.runs["outcome"] == "ok")]
            rows = rows[[where.items() <= params.items() for params in rows["params"]]]
        if not len(self.runs) or not len(rows):
            raise NotRun(f"no finished run of arm {arm} has {where}")
        return rows.sort_values("seed", kind="stable", ignore_index=True)

    def right(
        self, rows: pd.DataFrame, domain: str, shift: str, scoring: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each call was right, (seeds, items), and the items' labels. Raises: NotRun, when
        none was scored; ValueError, when they were not scored on the same items."""
        if not len(self.calls):
            raise NotRun("no run was scored")
        its = (
            self.calls[self.calls["scoring"] == scoring]
            .set_index("run_id")
            .loc[list(rows["run_id"])]
        )
        if its["item_set"].nunique() != 1:
            raise ValueError(
                f"{len(rows)} runs of {its['item_set'].nunique()} sets of items: only those on the"
                " same items compare"
            )
        items = self.items[self.items["item_set"] == its["item_set"].iloc[0]].sort_values("at")
        cell = ((items["domain"] == domain) & (items["shift"] == shift)).to_numpy()
        if not cell.any():
            raise ValueError(
                f"no item of domain {domain} and shift {shift}: there are "
                f"{sorted(set(zip(items['domain'], items['shift'], strict=True)))}"
            )
        bits = [
            np.unpackbits(np.frombuffer(row, np.uint8), count=len(items))[cell]
            for row in its["bits"]
        ]
        return np.array(bits, bool), items["label"].to_numpy()[cell]

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
        """Balanced accuracy of `one` minus `other`'s, paired by seed and item. `equal`: the budget
        both had. Raises: NotRun, when a seed is there on one side only."""
        if list(one["seed"]) != list(other["seed"]):
            raise NotRun(
                f"seeds {list(one['seed'])} against {list(other['seed'])}: only the same seeds"
                " compare"
            )
        (right, labels), (against, same) = (
            self.right(rows, domain, shift, scoring) for rows in (one, other)
        )
        if not np.array_equal(labels, same):
            raise ValueError("the two sides were scored on other items")
        return replace(two_level(right, labels, against), equal=equal)


def _run(arm: str, run: Run, cell: StudyCell) -> pd.DataFrame:
    result, params = (
        run.result,
        (run.params if (run.folder / "params.yml").exists() else dict(cell.params)),
    )
    scalars = {key: value for key, value in params.items() if isinstance(value, int | float | str)}
    changed = json.dumps(params.get("axes") or {}, sort_keys=True)
    row = {
        **scalars,
        "axes": changed,
        "arm": arm,
        "run_id": run.folder.name,
        "params": dict(cell.params),
        "item_set": _key(run) if result["outcome"] == "ok" else "",
        **{name: result.get(name) for name in RESULTS},
        **{name: result.get("speed", {}).get(name) for name in SPEED},
        "peak_bytes": (result.get("peak_bytes") or {}).get("meter"),
        "allocated_peak_bytes": (result.get("allocator") or {}).get("allocated_peak_bytes"),
    }
    return pd.DataFrame([row])


def _tested(run: Run) -> pd.DataFrame:
    return run.scores[run.scores["split"] != "val"].reset_index(drop=True)


def _key(run: Run) -> str:
    tested = _tested(run)
    return hashlib.sha256("\n".join(tested["uid"] + " " + tested["shift"]).encode()).hexdigest()[
        :12
    ]


def _gather(run: Run, found: Mapping[str, list]) -> None:
    scores, tested, key, name = run.scores, _tested(run), _key(run), run.folder.name
    val = scores[scores["split"] == "val"]
    known = any(key == frame["item_set"].iloc[0] for frame in found["items"] if len(frame))
    if not known:
        items = tested[["domain", "shift", "transform", "label"]]
        found["items"].append(items.assign(item_set=key, at=range(len(items))))
    for scoring in MODEL_SCORINGS:
        cut = choose_threshold(val["label"], val[scoring])
        right = (tested[scoring] > cut).to_numpy() == (tested["label"] == 1).to_numpy()
        found["calls"].append(
            pd.DataFrame(
                [
                    {
                        "run_id": name,
                        "item_set": key,
                        "scoring": scoring,
                        "bits": np.packbits(right).tobytes(),
                    }
                ]
            )
        )
    accuracy = (
        run.accuracy if not known else run.accuracy[run.accuracy["scoring"].isin(MODEL_SCORINGS)]
    )
    found["accuracy"].append(accuracy.assign(run_id=name))
    steps = run.steps.assign(
        t_s=run.steps["step_s"].cumsum(), tokens_seen=run.steps["tokens"].cumsum(), run_id=name
    )
    at = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    watched = [name for name in ("highest_logit", "cross_entropy") if name in steps]
    found["steps"].append(
        steps.iloc[at][["run_id", "step", "loss", "step_s", "t_s", "tokens_seen", "lr", *watched]]
    )
    probes = run.folder / "probes.parquet"
    if probes.exists():
        found["probes"].append(read_table(probes).assign(run_id=name))


def _table(target: Path, cell: StudyCell) -> pd.DataFrame:
    """What was found, with the parameters asked with that are not columns of it."""
    run = Run(target)
    if not run.ok:
        return pd.DataFrame([{**_scalars(cell.params), "reason": run.result["reason"]}])
    return run.table.assign(
        **{key: value for key, value in _scalars(cell.params).items() if key not in run.table},
        reason="",
    )


def _scalars(params: Mapping) -> dict:
    return {
        key: value if isinstance(value, int | float | str) else json.dumps(value, sort_keys=True)
        for key, value in params.items()
    }
