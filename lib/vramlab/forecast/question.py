"""A question: a step of a regime, model and size; and its trace, kept under the question's key.

A key is a hash of everything that a trace depends on: the resolved model and row, the size, the
card's compute capability, the version of torch, and the files in `TRACED_CODE`. A folder with that
name has `frame.parquet`, the timeline, and `trace.json`, everything else with both checksums. A
folder that is damaged counts as not there, and its question is traced again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..baichuan import ModelSpec
from ..cards import AMPERE, Architecture
from ..files import FORECASTS as CACHE
from ..files import checksum, read_checked, recall, write_checked, write_table
from ..reading import BadFile
from ..regimes.head.fused import Cut
from ..regimes.parameters import model_file, model_spec, row_of
from ..regimes.regime import REGIMES_FILE, Regime
from .solver.loops import Loop
from .trace import Trace, trace

TRACED_CODE = (
    "allocator",
    "baichuan",
    "capture",
    "cards.py",
    "forecast/representative_step.py",
    "forecast/solver/loops.py",
    "forecast/trace.py",
    "forecast/virtual_gpu",
    "machine.py",
    "observer.py",
    "regimes",
    "timeline",
    "training",
)
"""Files and folders of this library whose code decides a trace. Left out are the modules that only
find and read what a question names: the result of that is in the key."""
MOST_LENGTH, MOST_TOKENS = 1 << 24, 1 << 30
"""The largest `seq` and `world`, and the most tokens of a step: a larger number is a mistake, and
the storages of such a step have more bytes than torch can count."""


@dataclass(frozen=True)
class Question:
    """One step to forecast. `regimes.parameters` resolves its row and its model."""

    model: str
    regime: str
    seq: int
    batch: int
    weights: str = ""
    """A storage type that replaces the row's own, for example "bf16"; empty keeps the row's."""
    architecture: Architecture = AMPERE
    world: int = 1
    """Number of ranks that the model is sharded over; the forecast is rank 0's."""
    axes: str = ""
    """Axis values that replace the row's, as JSON, for example '{"acts": "checkpoint"}'."""
    config: str = ""
    """Fields that replace those of the model's config, as JSON, for example '{"norm_head":
    false}'."""

    def __post_init__(self):
        for name in ("seq", "batch", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a step needs 1 or more")
        if max(self.seq, self.world) > MOST_LENGTH or self.seq * self.batch > MOST_TOKENS:
            raise ValueError(
                f"seq {self.seq} x batch {self.batch} on {self.world} ranks: use a seq and a world"
                f" of {MOST_LENGTH:,} at most, and {MOST_TOKENS:,} tokens"
            )

    @classmethod
    def of_run(cls, params: Mapping, seq: int = 0) -> Question:
        """One step of the run with these parameters, on full rows of `seq` tokens, by default of
        the run's `max_length`."""
        replaced: dict[str, Any] = {
            name: json.dumps(params[name], sort_keys=True)
            for name in ("axes", "config")
            if params.get(name)
        }
        return cls(
            params["model"],
            params["regime"],
            seq or params["max_length"],
            params["batch_size"],
            params.get("weights", ""),
            **replaced,
        )

    @property
    def row(self) -> Regime:
        """The regime, as `regimes.parameters.row_of` resolves it. Raises: IllegalRegime."""
        return _row(self.regime, self.weights, self.axes, REGIMES_FILE.stat().st_mtime_ns)

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model, json.loads(self.config or "{}"))

    @property
    def name(self) -> str:
        return self.regime + (f" ({self.weights})" if self.weights else "")

    def key(self) -> str:
        """Hash of everything that a trace depends on."""
        row = self.row
        content = {
            "spec": _fingerprint(
                self.model, self.config, model_file(self.model).stat().st_mtime_ns
            ),
            "row": row.axes(),
            "accumulate": row.accumulate,
            "clip": row.clip,
            "seq": self.seq,
            "batch": self.batch,
            "architecture": self.architecture,
            "world": self.world,
            "torch": torch.__version__,
            "code": traced_code_hash(),
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


# read once for each version of the file: an atlas has hundreds of questions
@cache
def _fingerprint(model: str, config: str, _changed_ns: int) -> dict:
    return model_spec(model, json.loads(config or "{}")).fingerprint()


@cache
def _row(regime: str, weights: str, axes: str, _changed_ns: int) -> Regime:
    return row_of(regime, weights, json.loads(axes or "{}"))


@cache
def traced_code_hash() -> str:
    """SHA-256 of the files in `TRACED_CODE`."""
    library, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in TRACED_CODE:
        path = library / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def traced_step(question: Question, cache_dir: Path | None = CACHE, counted: bool = True) -> Trace:
    """The trace of `question`, read from `cache_dir` or traced, in seconds, and kept there. With
    `counted`, a cached trace without FLOP counts is traced again."""
    folder = cache_dir and cache_dir / question.key()
    cached = recall(folder, _read) if folder else None
    if cached and (cached.work or not counted):
        return cached
    traced = trace(
        question.spec,
        question.row,
        question.seq,
        question.batch,
        card=question.architecture,
        world=question.world,
        counted=counted,
    )
    if folder:
        _write(traced, folder)
    return traced


def _write(traced: Trace, folder: Path) -> None:
    """Write the frame first, then `trace.json`, which holds the frame's checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    frame, names = traced.frame.drop(columns="t_s"), [f.name for f in dataclasses.fields(traced)]
    frame = frame.astype(dict.fromkeys(frame.select_dtypes(exclude="number"), "category"))
    write_table(frame, folder / "frame.parquet", compression="zstd")
    content = {
        **{name: getattr(traced, name) for name in names},
        "alive": [[*owner, size] for owner, size in traced.alive.items()],
        "loops": [dataclasses.asdict(loop) for loop in traced.loops],
        "frame": checksum(folder / "frame.parquet"),
    }
    write_checked(folder / "trace.json", content)


def _read(folder: Path) -> Trace:
    """Raises: OSError; BadFile, for a file that does not match its checksum."""
    content: dict[str, Any] = read_checked(folder / "trace.json")
    if content["frame"] != checksum(folder / "frame.parquet"):
        raise BadFile(f"{folder / 'frame.parquet'} does not match its checksum")
    frame = pd.read_parquet(folder / "frame.parquet")
    content |= {
        "frame": frame.astype(dict.fromkeys(frame.select_dtypes("category"), object)),
        "alive": {tuple(owner): size for *owner, size in content["alive"]},
        "loops": tuple(Loop(Cut(**loop.pop("cut")), **loop) for loop in content["loops"]),
        "ranked": {int(step): size for step, size in content["ranked"].items()},
        "architecture": tuple(content["architecture"]),
        "parts": tuple(content["parts"]),
    }
    return Trace(**content)
