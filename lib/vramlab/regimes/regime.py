"""A regime: one row with a value for each axis, read from `params/regimes.yml`, and refused at once
if the values exclude each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from torch import Tensor, distributed, nn

from ..reading import BadFile, nearest, read_yaml
from . import fields
from .fields import Count, IllegalRegime, Limit, Range
from .forbidden import ILLEGAL
from .place.host import FsdpOffload
from .place.place import Fsdp
from .registry import AXES
from .rule.rules import BoundRule
from .rule.sliced import LeafContext
from .weights.types import Bf16, Mixed

REGIMES_FILE = Path(__file__).parents[3] / "params" / "regimes.yml"


class ImpossibleHere(RuntimeError):
    """The row is legal, but this machine cannot run it."""


@dataclass(frozen=True)
class Regime:
    """One memory regime: a value for each axis, and the settings of its updates."""

    name: str
    weights: Any
    trains: Any
    grads: Any
    until: Any
    rule: Any
    acts: Any
    head: Any
    place: Any
    accumulate: Count = 1
    """How many micro-batches' gradients are added before one update; their sum is the gradient of
    the large batch."""
    clip: Limit = 0.0
    """Largest norm of the gradient of the active leaves; 0: no limit."""
    lr: Annotated[float, Range(0, 100)] = 1e-3
    """The row's default learning rate; a sweep may set another."""
    says: str = ""
    source: str = ""
    differs: str = ""
    """How the published code differs from its paper, which of the two the row follows, and the
    field that gives the other."""
    values: Mapping[str, str] = field(default_factory=dict)
    """axis -> the name of its value, as written in the row."""

    def __post_init__(self):
        reasons = [prohibition.reason for prohibition in ILLEGAL if prohibition.excludes(self)]
        if reasons:
            heading = f"regime {self.name!r} is not possible:"
            raise IllegalRegime("\n  - ".join((heading, *reasons)))

    def rule_for(self, model: nn.Module, named: Mapping[str, Tensor]) -> BoundRule:
        """The rule, fitted to how weights are stored and to the leaves (name -> tensor) that it
        will update."""
        names = {id(leaf): name for name, leaf in named.items()}
        return self.rule.bind(
            LeafContext(self.weights.storage, names, getattr(model.config, "head_dim", 0))
        )

    def axes(self) -> dict[str, dict]:
        """The resolved row as plain data: every axis with its value and that value's fields."""
        return {
            axis: {"value": self.values[axis], **dataclasses.asdict(getattr(self, axis))}
            for axis in AXES
        }


SCALARS = ("accumulate", "clip", "lr", "says", "source", "differs")
"""What a row may have besides a value for each axis."""


def _value(axis: str, cell: Any) -> tuple[str, Any]:
    """The name and the value of one cell of a row, `name` or `{name: {field: value}}`. Raises:
    ValueError, with one reason in each line."""
    known, name, settings = AXES[axis], cell, dict[str, Any]()
    if isinstance(cell, Mapping) and len(cell) == 1:
        ((name, settings),) = cell.items()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{axis} is {fields.quoted(cell)}: use one of {', '.join(known)}")
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{axis}.{name} is {fields.quoted(settings)}: use {{{name}: {{field: value}}}}"
        )
    kind = known[name]
    owned = [field.name for field in dataclasses.fields(kind)]
    reasons = fields.unknown(settings, owned, f"{axis}.{name}")
    reasons = reasons or fields.faults(kind, settings, f"{axis}.{name}.")
    if reasons:
        raise ValueError("\n".join(reasons))
    return name, kind(**{field: _typed(kind, field, settings[field]) for field in settings})


def _typed(kind: type, field: str, value: Any) -> Any:
    """YAML's value in the type of the field: a whole number may stand for a float, and a list is a
    tuple."""
    if float in get_args(fields.field_types(kind)[field]):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def read_row(name: str, row: Mapping[str, Any]) -> Regime:
    """A row as plain data -> a `Regime`. An axis that is left out takes its first value.

    Raises: IllegalRegime, with every reason: unknown keys, values and fields, and values that a
    field may not hold. Without any of these: values that exclude each other.
    """
    if not isinstance(row, Mapping):
        raise IllegalRegime(
            f"regime {name!r} is {fields.quoted(row)}: use a mapping, such as {{acts: checkpoint}}"
        )
    scalars = {key: row[key] for key in SCALARS if key in row}
    reasons = fields.unknown(row, (*AXES, *SCALARS), "a row") + fields.faults(Regime, scalars)
    cells: dict[str, tuple[str, Any]] = {}
    for axis, known in AXES.items():
        try:
            cells[axis] = _value(axis, row.get(axis, next(iter(known))))
        except ValueError as error:
            reasons += str(error).splitlines()
    if reasons:
        raise IllegalRegime("\n  - ".join((f"regime {name!r} cannot be read:", *reasons)))
    return Regime(
        name,
        **{axis: value for axis, (_, value) in cells.items()},
        **scalars,
        values={axis: value_name for axis, (value_name, _) in cells.items()},
    )


def read_regimes(path: Path = REGIMES_FILE) -> dict[str, Regime]:
    """Every row of the file, by name. Raises: OSError; BadFile, naming the file, also for an
    illegal row."""
    try:
        return {name: read_row(name, row) for name, row in _rows(path).items()}
    except IllegalRegime as error:
        raise BadFile(f"{path}: {error}") from None


def regime_row(name: str, path: Path = REGIMES_FILE) -> dict:
    """The row called `name` as it is written. Raises: OSError; BadFile; IllegalRegime, listing the
    known rows."""
    rows = _rows(path)
    if name not in rows:
        raise IllegalRegime(
            f"no regime {name!r} in {Path(path).name}{nearest(name, rows)}; it has:"
            f" {', '.join(rows)}"
        )
    return copy.deepcopy(rows[name])


def _rows(path: Path) -> dict[str, Any]:
    """The rows as they are written. Raises: OSError; BadFile."""
    return _read_version(Path(path), Path(path).stat().st_mtime_ns)


@cache
def _read_version(path: Path, _changed_ns: int) -> dict[str, Any]:
    """Each version of the file is read once: a study looks a row up for every name of a run."""
    return read_yaml(path)


def regime(name: str, path: Path = REGIMES_FILE) -> Regime:
    """The row called `name`."""
    return read_row(name, regime_row(name, path))


def check_machine(regime: Regime, device: str) -> None:
    """Raises ImpossibleHere if this machine lacks what the row needs. Memory is not checked:
    running out of it is a result."""
    on_cuda = device.startswith("cuda")
    in_group = distributed.is_available() and distributed.is_initialized()
    if on_cuda and not torch.cuda.is_available():
        raise ImpossibleHere(f"device is {device!r}, but torch sees no GPU here: use device: cpu")
    if on_cuda and isinstance(regime.weights, Mixed | Bf16) and not torch.cuda.is_bf16_supported():
        raise ImpossibleHere(
            f"regime {regime.name!r} computes in bf16, which {torch.cuda.get_device_name(device)}"
            " cannot: use weights: fp32"
        )
    try:  # before the first step, so that the import is not in the step's bytes and seconds
        regime.rule.load()
    except ImportError as error:
        raise ImpossibleHere(
            f"regime {regime.name!r} updates by a library that does not import here ({error}):"
            " install it, or use rule: adam4bit"
        ) from error
    clips_on_host = isinstance(regime.place, FsdpOffload) and regime.clip > 0 and on_cuda
    if clips_on_host and in_group and "gloo" not in distributed.get_backend_config():
        raise ImpossibleHere(
            f"regime {regime.name!r} clips gradients that lie in host memory, and this process"
            ' group reduces none there: use init_process_group("cpu:gloo,cuda:nccl"), or clip: 0'
        )
    if isinstance(regime.place, Fsdp) and not in_group:
        raise ImpossibleHere(
            f"regime {regime.name!r} shards over a process group, and this process is in none:"
            " start it with torchrun and call torch.distributed.init_process_group, or use place:"
            " device"
        )
