"""A regime: one row of answers, read from `params/regimes.yml`, and refused at once when the answers exclude each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .axes import AXES
from .axes.host import FsdpOffload
from .axes.place import Fsdp
from .axes.rowwise import Fit
from .axes.rule import Rule
from .axes.weights import Bf16, Mixed
from .illegal import ILLEGAL
from .reading import read_yaml

REGIMES_FILE = Path(__file__).parents[2] / "params" / "regimes.yml"


class IllegalRegime(ValueError):
    """The row cannot mean anything; the message lists every reason with the way out."""


class ImpossibleHere(RuntimeError):
    """The row is legal, but this machine cannot run it."""


@dataclass(frozen=True)
class Regime:
    """One memory regime: a value for each axis, and how often and how hard it updates."""

    name: str
    weights: Any
    trains: Any
    grads: Any
    until: Any
    rule: Any
    acts: Any
    head: Any
    place: Any
    accumulate: int = 1
    """Micro-batches whose gradients are added before one update; the sum equals the large batch's gradient."""
    clip: float = 0.0
    """Largest norm of the gradient of the active leaves; 0 leaves it alone."""
    lr: float = 1e-3
    """Default learning rate of the row; a sweep may set another."""
    says: str = ""
    source: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    """axis -> the name of its value, as written in the row."""

    def __post_init__(self):
        reasons = [prohibition.reason for prohibition in ILLEGAL if prohibition.excludes(self)]
        if reasons:
            raise IllegalRegime(f"regime {self.name!r} is not possible:\n" + "\n".join(f"  - {r}" for r in reasons))

    def rule_for(self, model: nn.Module, named: Mapping[str, Tensor]) -> Rule:
        """The rule, told how weights are stored and what the leaves are that it will update."""
        names = {id(leaf): name for name, leaf in named.items()}
        return self.rule.fitted(Fit(self.weights.storage, names, getattr(model.config, "head_dim", 0)))

    def axes(self) -> dict[str, dict]:
        """The resolved row: every axis with its value and that value's fields. Plain data, for records and tables."""
        return {axis: {"value": self.values[axis], **dataclasses.asdict(getattr(self, axis))} for axis in AXES}


def _value(regime: str, axis: str, cell: Any) -> tuple[str, Any]:
    """One cell of the row: `name` or `{name: {field: value}}`."""
    known = AXES[axis]
    name, fields = (cell, {}) if isinstance(cell, str) else next(iter(cell.items()), ("", {}))
    if name not in known or (not isinstance(cell, str) and len(cell) != 1):
        raise IllegalRegime(f"regime {regime!r}: {axis} is {cell!r}; known values: {', '.join(known)}")
    names = [f.name for f in dataclasses.fields(known[name])]
    unknown = set(fields or {}) - set(names)
    if unknown:
        raise IllegalRegime(f"regime {regime!r}: {axis}.{name} has no {', '.join(sorted(unknown))}; "
                            f"it has: {', '.join(names) or 'no fields'}")
    try:
        return name, known[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in (fields or {}).items()})
    except ValueError as error:
        raise IllegalRegime(f"regime {regime!r}: {error}") from None


def read_row(name: str, row: Mapping[str, Any]) -> Regime:
    """A row as plain data -> a `Regime`. Axes left out take their first value.

    Raises: IllegalRegime, for an unknown key, value or field, and for answers that exclude each other.
    """
    scalars = ("accumulate", "clip", "lr", "says", "source")
    unknown = set(row) - set(AXES) - set(scalars)
    if unknown:
        raise IllegalRegime(f"regime {name!r}: unknown {', '.join(sorted(unknown))}; "
                            f"a row may have: {', '.join((*AXES, *scalars))}")
    cells = {axis: _value(name, axis, row.get(axis, next(iter(known)))) for axis, known in AXES.items()}
    return Regime(name, **{axis: value for axis, (_, value) in cells.items()},
                  **{key: row[key] for key in scalars if key in row},
                  values={axis: label for axis, (label, _) in cells.items()})


def read_regimes(path: Path = REGIMES_FILE) -> dict[str, Regime]:
    """Every row of the file, by name. Raises IllegalRegime at the first row that is wrong."""
    rows = read_yaml(path)
    return {name: read_row(name, row) for name, row in rows.items()}


def regime_row(name: str, path: Path = REGIMES_FILE) -> dict:
    """The row called `name` as it is written. Raises: IllegalRegime, naming the rows there are."""
    rows = _rows(Path(path), Path(path).stat().st_mtime_ns)
    if name not in rows:
        raise IllegalRegime(f"no regime {name!r} in {Path(path).name}; it has: {', '.join(rows)}")
    return copy.deepcopy(rows[name])


@cache
def _rows(path: Path, _changed_ns: int) -> dict[str, dict]:
    """Read once for each version of the file: a study asks for a row at every name of a run."""
    return read_yaml(path)


def regime(name: str, path: Path = REGIMES_FILE) -> Regime:
    """The row called `name`."""
    return read_row(name, regime_row(name, path))


def check_machine(regime: Regime, device: str) -> None:
    """Raises ImpossibleHere when this machine lacks what the row needs. Says nothing about memory: running out of it
    is a result."""
    import torch
    from torch import distributed

    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ImpossibleHere(f"device is {device!r}, but torch sees no GPU here: use device: cpu")
        if isinstance(regime.weights, Mixed | Bf16) and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ImpossibleHere(f"regime {regime.name!r} computes in bf16, which {name} cannot: use weights: fp32")
    try:  # before the first step, whose bytes and seconds are not the import's
        regime.rule.load()
    except ImportError as error:
        raise ImpossibleHere(f"regime {regime.name!r} updates by a library that does not import here ({error}): install it, or use "
                             "rule: adam4bit") from error
    if (isinstance(regime.place, FsdpOffload) and regime.clip > 0 and device.startswith("cuda")
            and distributed.is_initialized() and "gloo" not in distributed.get_backend_config()):
        raise ImpossibleHere(f"regime {regime.name!r} clips gradients that lie in host memory, and this process group reduces "
                             'none there: use init_process_group("cpu:gloo,cuda:nccl"), or clip: 0')
    if isinstance(regime.place, Fsdp) and not (distributed.is_available() and distributed.is_initialized()):
        raise ImpossibleHere(f"regime {regime.name!r} shards over a process group, and this process is in none: start it with "
                             "torchrun and call torch.distributed.init_process_group, or use place: device")
