"""A regime: one row of answers, read from `params/regimes.yml`, and refused at once when the answers exclude each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from .axes import AXES
from .axes.grads import ZerothOrder
from .axes.place import Fsdp
from .axes.rowwise import Fit
from .axes.rule import AdamMini, NoRule, Rule, Sgd
from .axes.storage import Master, Nearest
from .axes.trains import Chunks, Nothing
from .axes.until import Backward
from .axes.weights import Bf16, Mixed

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
        reasons = [reason for excluded, reason in ILLEGAL if excluded(self)]
        if reasons:
            raise IllegalRegime(f"regime {self.name!r} is not possible:\n" + "\n".join(f"  - {r}" for r in reasons))

    def rule_for(self, model: nn.Module, named: Mapping[str, Tensor]) -> Rule:
        """The rule, told how weights are stored and what the leaves are that it will update."""
        names = {id(leaf): name for name, leaf in named.items()}
        return self.rule.fitted(Fit(self.weights.storage, names, getattr(model.config, "head_dim", 0)))

    def axes(self) -> dict[str, dict]:
        """The resolved row: every axis with its value and that value's fields. Plain data, for records and tables."""
        return {axis: {"value": self.values[axis], **dataclasses.asdict(getattr(self, axis))} for axis in AXES}


def _is(axis: str, kind: type) -> Callable[[Regime], bool]:
    return lambda regime: isinstance(getattr(regime, axis), kind)


_nothing, _no_rule, _in_backward = _is("trains", Nothing), _is("rule", NoRule), _is("until", Backward)
_fsdp, _guessed = _is("place", Fsdp), _is("grads", ZerothOrder)


def _clips_inside(regime: Regime) -> bool:
    return _in_backward(regime) and regime.until.clip_norm > 0


ILLEGAL: list[tuple[Callable[[Regime], bool], str]] = [
    (lambda r: r.accumulate < 1, "accumulate counts micro-batches: use 1 or more"),
    (lambda r: r.clip < 0, "clip is a norm: use a positive number, or 0 to leave gradients alone"),
    (lambda r: _nothing(r) and not _no_rule(r), "nothing trains, so there is nothing to update: use rule: none"),
    (lambda r: _no_rule(r) and not _nothing(r), "weights train, but rule is none: use rule: adamw or sgd, or trains: none"),
    (lambda r: _nothing(r) and _in_backward(r), "nothing trains, so there is no backward: use until: step"),
    (lambda r: _nothing(r) and r.values["acts"] != "keep",
     "nothing trains, so forward keeps nothing: use acts: keep"),
    (lambda r: _nothing(r) and (r.accumulate > 1 or r.clip > 0),
     "nothing trains, so there is no gradient to accumulate or clip: use accumulate: 1 and clip: 0"),
    (lambda r: _in_backward(r) and r.accumulate > 1,
     "until: backward updates at every micro-batch, so accumulate would change the result: use until: step, or a larger batch"),
    (lambda r: _in_backward(r) and r.clip > 0,
     "until: backward drops each gradient before the norm of all is known: use until: {backward: {clip_norm: ...}}, which looks "
     "twice, or until: step, or clip: 0"),
    (lambda r: _fsdp(r) and hasattr(r.trains, "interval"),
     "place: fsdp cuts every weight between ranks, and decides once how its gradient is reduced, so parts cannot take turns: "
     "use trains: all or lora, or place: device"),
    (lambda r: type(r.weights.storage) is not Nearest and not r.rule.row_wise and not _no_rule(r),
     "this rule writes weights itself, and rounds them to nearest: use weights: bf16, or a rule that updates rows in fp32, as "
     "rule: adamw does"),
    (lambda r: type(r.weights.storage) is not Nearest and _no_rule(r),
     "nothing is updated, so it does not matter how an update is stored: use weights: bf16"),
    (lambda r: _fsdp(r) and not r.rule.pieces,
     "this rule looks at whole matrices or blocks of them, and place: fsdp cuts them between ranks: use rule: adamw or sgd, or "
     "place: device"),
    (lambda r: isinstance(r.rule, AdamMini) and isinstance(r.trains, Chunks),
     "adam_mini has one second moment a head, and chunks cut heads: use trains: blocks, or rule: adamw"),
    (lambda r: _fsdp(r) and _clips_inside(r),
     "until.backward.clip_norm measures what this rank has, and place: fsdp cuts every gradient between ranks: use until: step and "
     "clip, or place: device"),
    (lambda r: _fsdp(r) and _guessed(r),
     "grads: zeroth_order moves a weight while its module runs, and place: fsdp has gathered it before: use place: device"),
    (lambda r: _guessed(r) and not (isinstance(r.rule, Sgd) or _no_rule(r)),
     "grads: zeroth_order never holds a gradient that a rule could remember something of: use rule: sgd, or grads: exact"),
    (lambda r: _guessed(r) and _nothing(r), "nothing trains, so there is no gradient to guess: use grads: exact"),
    (lambda r: _guessed(r) and _in_backward(r), "grads: zeroth_order has no backward to update in: use until: step"),
    (lambda r: _guessed(r) and not _nothing(r) and r.values["acts"] != "keep",
     "grads: zeroth_order has no backward, so forward keeps nothing: use acts: keep"),
    (lambda r: _guessed(r) and not _nothing(r) and r.clip > 0,
     "grads: zeroth_order has no gradient whose norm could be clipped: use clip: 0, or a lower lr"),
    (lambda r: _guessed(r) and isinstance(r.weights.storage, Master) and not _nothing(r),
     "grads: zeroth_order moves the weights the network has, and an fp32 master would not know: use weights: fp32 or bf16_sr"),
]
"""(excluded, reason with the way out); all that apply are reported together."""


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
    rows = yaml.safe_load(Path(path).read_text())
    return {name: read_row(name, row) for name, row in rows.items()}


def regime_row(name: str, path: Path = REGIMES_FILE) -> dict:
    """The row called `name` as it is written. Raises: IllegalRegime, naming the rows there are."""
    rows = yaml.safe_load(Path(path).read_text())
    if name not in rows:
        raise IllegalRegime(f"no regime {name!r} in {Path(path).name}; it has: {', '.join(rows)}")
    return rows[name]


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
    if _fsdp(regime) and not (distributed.is_available() and distributed.is_initialized()):
        raise ImpossibleHere(f"regime {regime.name!r} shards over a process group, and this process is in none: start it with "
                             "torchrun and call torch.distributed.init_process_group, or use place: device")
