"""Resolves which model and which row a run, a forecast, a what-if or a study means.

    spec = model_spec("baichuan2-7b", {"norm_head": False})
    row = row_of("lomo", weights="bf16", axes={"acts": "keep"})

There is one precedence: arguments win over the row, the row wins over the model file, and the model
file wins over the axis's default. Among arguments, a value in `axes` wins over `weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..baichuan import ModelSpec, read_model_file
from ..files import ROOT
from ..reading import nearest
from .regime import Regime, read_row, regime_row


def row_of(regime: str, weights: str = "", axes: Mapping[str, Any] | None = None) -> Regime:
    """The row called `regime`, with the values in `axes` in place of its own, and stored as
    `weights` unless that is empty. `axes` may also set `accumulate`, `clip` and `lr`. Raises:
    IllegalRegime.
    """
    # lowest precedence first; a default of the model file, such as its storage type, would come
    # before the row
    stored = {"weights": weights} if weights else {}
    return read_row(regime, {**regime_row(regime), **stored, **(axes or {})})


def model_spec(model: str, config: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model called `model`, with the fields in `config` in place of its own. Raises:
    ValueError."""
    spec = read_model_file(model_file(model))
    return spec.changed(config) if config else spec


def model_file(name: str) -> Path:
    """The file of the model called `name` in params/models, or the model file at that path.

    Raises: ValueError, listing the known models.
    """
    folder = ROOT / "params" / "models"
    path = Path(name) if name.endswith(".yml") else folder / f"{name}.yml"
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.yml"))
        raise ValueError(
            f"no model {name!r}{nearest(name, known)}: params/models has {', '.join(known)}"
        )
    return path


def run_row(params: Mapping[str, Any]) -> Regime:
    """The row of a run with these parameters. Raises: IllegalRegime."""
    return row_of(params["regime"], params.get("weights", ""), params.get("axes"))


def run_spec(params: Mapping[str, Any]) -> ModelSpec:
    """The model of a run with these parameters, with the run's config. Raises: ValueError."""
    return model_spec(params["model"], params.get("config"))
