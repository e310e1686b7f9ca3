"""A regime: one row of answers, read from `params/regimes.yml`, and refused at once when the
answers exclude each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from torch import Tensor, nn

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
    accumulate: Count = 1
    """Micro-batches whose gradients are added before one update; the sum equals the large batch's
    gradient."""
    clip: Limit = 0.0
    """Largest norm of the gradient of the active leaves; 0 leaves it alone."""
    lr: Annotated[float, Range(0, 100)] = 1e-3
    """Default learning rate of the row; a sweep may set another."""
    says: str = ""
    source: str = ""
    differs: str = ""
    """How the published code differs from its paper, which of the two the row is, and the field
    that gives the other."""
    values: Mapping[str, str] = field(default_factory=dict)
    """axis -> the name of its value, as written in the row."""

    def __post_init__(self):
        reasons = [prohibition.reason for prohibition in ILLEGAL if prohibition.excludes(self)]
        if reasons:
            raise IllegalRegime(
                f"regime {self.name!r} is not possible:\n" + "\n".join(f"  - {r}" for r in reasons)
            )

    def rule_for(self, model: nn.Module, named: Mapping[str, Tensor]) -> BoundRule:
        """The rule, told how weights are stored and what the leaves are that it will update."""
        names = {id(leaf): name for name, leaf in named.items()}
        return self.rule.bind(
            LeafContext(self.weights.storage, names, getattr(model.config, "head_dim", 0))
        )

    def axes(self) -> dict[str, dict]:
        """The resolved row: every axis with its value and that value's fields. Plain data, for
        records and tables."""
        return {
            axis: {"value": self.values[axis], **dataclasses.asdict(getattr(self, axis))}
            for axis in AXES
        }


SCALARS = ("accumulate", "clip", "lr", "says", "source", "differs")
"""What a row may have beside a value for each axis."""


def _value(axis: str, cell: Any) -> tuple[str, Any]:
    """One cell of a row, `name` or `{name: {field: value}}`, as its name and its value. Raises:
    ValueError, a reason a line."""
    known = AXES[axis]
    name, given = (
        next(iter(cell.items())) if isinstance(cell, Mapping) and len(cell) == 1 else (cell, {})
    )
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{axis} is {fields.quoted(cell)}: use one of {', '.join(known)}")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{axis}.{name} is {fields.quoted(given)}: use {{{name}: {{field: value}}}}"
        )
    owned = [field.name for field in dataclasses.fields(known[name])]
    reasons = fields.unknown(given, owned, f"{axis}.{name}") or fields.faults(
        known[name], given, f"{axis}.{name}."
    )
    if reasons:
        raise ValueError("\n".join(reasons))
    return name, known[name](
        **{
            field: (
                float(value)
                if float in get_args(fields.annotations(known[name])[field])
                else tuple(value)
                if isinstance(value, list)
                else value
            )
            for field, value in given.items()
        }
    )


def read_row(name: str, row: Mapping[str, Any]) -> Regime:
    """A row as plain data -> a `Regime`. Axes left out take their first value.

    Raises: IllegalRegime, with every reason: unknown keys, values and fields, values that a field
    cannot hold; and where there is none, answers that exclude each other.
    """
    if not isinstance(row, Mapping):
        raise IllegalRegime(
            f"regime {name!r} is {fields.quoted(row)}: use a mapping, such as {{acts: checkpoint}}"
        )
    scalars = {key: row[key] for key in SCALARS if key in row}
    reasons, cells = (
        fields.unknown(row, (*AXES, *SCALARS), "a row") + fields.faults(Regime, scalars),
        {},
    )
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
        values={axis: label for axis, (label, _) in cells.items()},
    )


def read_regimes(path: Path = REGIMES_FILE) -> dict[str, Regime]:
    """Every row of the file, by name. Raises: OSError; BadFile, naming the file, also for the first
    row that is wrong."""
    try:
        return {name: read_row(name, row) for name, row in _file(path).items()}
    except IllegalRegime as error:
        raise BadFile(f"{path}: {error}") from None


def regime_row(name: str, path: Path = REGIMES_FILE) -> dict:
    """The row called `name` as it is written. Raises: OSError; BadFile; IllegalRegime, naming the
    rows there are."""
    rows = _file(path)
    if name not in rows:
        raise IllegalRegime(
            f"no regime {name!r} in {Path(path).name}{nearest(name, rows)}; it has:"
            f" {', '.join(rows)}"
        )
    return copy.deepcopy(rows[name])


def _file(path: Path) -> dict[str, Any]:
    """The rows as they are written. Raises: OSError; BadFile."""
    return _rows(Path(path), Path(path).stat().st_mtime_ns)


@cache
def _rows(path: Path, _changed_ns: int) -> dict[str, Any]:
    """Read once for each version of the file: a study asks for a row at every name of a run."""
    return read_yaml(path)


def regime(name: str, path: Path = REGIMES_FILE) -> Regime:
    """The row called `name`."""
    return read_row(name, regime_row(name, path))


def check_machine(regime: Regime, device: str) -> None:
    """Raises ImpossibleHere when this machine lacks what the row needs. Says nothing about memory:
    running out of it is a result."""
    import torch
    from torch import distributed

    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ImpossibleHere(
                f"device is {device!r}, but torch sees no GPU here: use device: cpu"
            )
        if isinstance(regime.weights, Mixed | Bf16) and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ImpossibleHere(
                f"regime {regime.name!r} computes in bf16, which {name} cannot: use weights: fp32"
            )
    try:  # before the first step, whose bytes and seconds are not the import's
        regime.rule.load()
    except ImportError as error:
        raise ImpossibleHere(
            f"regime {regime.name!r} updates by a library that does not import here ({error}):"
            " install it, or use rule: adam4bit"
        ) from error
    if (
        isinstance(regime.place, FsdpOffload)
        and regime.clip > 0
        and device.startswith("cuda")
        and distributed.is_initialized()
        and "gloo" not in distributed.get_backend_config()
    ):
        raise ImpossibleHere(
            f"regime {regime.name!r} clips gradients that lie in host memory, and this process"
            ' group reduces none there: use init_process_group("cpu:gloo,cuda:nccl"), or clip: 0'
        )
    if isinstance(regime.place, Fsdp) and not (
        distributed.is_available() and distributed.is_initialized()
    ):
        raise ImpossibleHere(
            f"regime {regime.name!r} shards over a process group, and this process is in none:"
            " start it with torchrun and call torch.distributed.init_process_group, or use place:"
            " device"
        )
