"""The bases that ship with the project: trained again by one command, with a table of the scores
that other seeds and CPUs reach.

A recipe is only good when its scores depend neither on the seed nor on how a CPU sums. So beside
the shipped weights is a table with one row for each (seed, CPU capability) that was tried;
`ATEN_CPU_CAPABILITY=default` imitates a plain CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...baichuan import ModelSpec
from ...files import BASES, CACHE, SEAL, intact, seal, write_whole
from ...reading import BadFile, checked, read_json
from ...regimes.parameters import model_spec
from ..statistics import MODEL_SCORINGS
from .base_model import SEEDS, partial_folder, write_base
from .recipe import Recipe

SCORES = {
    "cpu_capability": str,
    "threads": int,
    "torch": str,
    "general": dict.fromkeys(MODEL_SCORINGS, float),
    "intervals": dict.fromkeys(MODEL_SCORINGS, tuple[float, float]),
    "items": int,
    "process_cpu_s": float,
}
"""Fields that a row of the table takes from `recipe.json`, with their types."""
ROW = {"hash": str, "seed": int, **SCORES}
RECORD = {"hash": str, "parameters": int, "recipe": {"seed": int}, **SCORES}
"""Fields of a row of the table and of `recipe.json`, with their types."""


def make(model: str, recipe_name: str, seed: int | None, progress: bool) -> dict:
    """Train the base of `model` and add its row to the table. With the recipe's own seed (`seed`
    None) its weights replace the shipped ones.

    Returns the result of `describe`. Raises: ValueError, for an unknown model or recipe, a negative
    seed or a damaged base that a row would be added to.
    """
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    spec, recipe = model_spec(model), Recipe.named(recipe_name)
    folder = BASES / f"{spec.name}-{recipe_name}"
    if seed is not None and (folder / SEAL).exists() and not intact(folder):
        raise BadFile(f"{folder} is damaged: git checkout brings it back")
    rows = _rows(folder, spec, recipe)
    with partial_folder(BASES) as whole:
        chosen = recipe if seed is None else replace(recipe, seed=seed)
        write_base(spec, chosen, CACHE, whole, progress)
        record = json.loads((whole / "recipe.json").read_text())
        scores = {name: record[name] for name in SCORES}
        row = {"hash": record["hash"], "seed": record["recipe"]["seed"], **scores}
        by_key = {_key(old): old for old in [*rows, row]}
        table = json.dumps({"rows": [by_key[key] for key in sorted(by_key)]}, indent=1)
        if seed is None:
            write_whole(whole / SEEDS, table)
            seal(whole)
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)
        else:
            folder.mkdir(exist_ok=True)
            write_whole(folder / SEEDS, table)
            if (folder / SEAL).exists():
                seal(folder, *read_json(folder / SEAL), SEEDS)
    return describe(model, recipe_name)


def _key(row: Mapping) -> tuple[int, str]:
    return row["seed"], row["cpu_capability"]


def describe(model: str, recipe_name: str) -> dict:
    """The shipped base as plain data: its record, whether its files are intact, whether it was made
    by the current recipe, and `seeds`, a row for each (seed, CPU capability). Raises:
    FileNotFoundError, if none ships."""
    spec, recipe = model_spec(model), Recipe.named(recipe_name)
    folder = BASES / f"{spec.name}-{recipe_name}"
    if not (folder / SEAL).exists() and not (folder / "recipe.json").exists():
        shipped = sorted(path.parent.name for path in BASES.glob("[!.]*/recipe.json"))
        raise FileNotFoundError(
            f"no base of model {spec.name} by recipe {recipe_name} ships (there are:"
            f" {', '.join(shipped) or 'none'}): train it with --make"
        )
    record = _read(folder / "recipe.json", RECORD)
    return {
        **record,
        "name": folder.name,
        "intact": intact(folder),
        "current": record["hash"] == recipe.hash(spec),
        "seeds": _rows(folder, spec, recipe),
    }


def _read(path: Path, hints: Mapping[str, Any]) -> dict:
    try:
        return checked(read_json(path), hints, str(path), tuple(hints), others=True)
    except (OSError, BadFile) as error:
        raise BadFile(f"{error}: git checkout {path.parent} brings it back") from None


def _rows(folder: Path, spec: ModelSpec, recipe: Recipe) -> list[dict]:
    """The table's rows that the current recipe made, with whatever seed; none without a folder."""
    rows = _read(folder / SEEDS, {"rows": [ROW]})["rows"] if folder.exists() else []
    return [row for row in rows if row["hash"] == replace(recipe, seed=row["seed"]).hash(spec)]


def to_text(base: dict) -> str:
    """The result of `describe` as lines for a terminal."""
    state = "intact" if base["intact"] else "DAMAGED: git checkout brings it back"
    older = "an older recipe than today's: vramlab base --make"
    recipe = "today's recipe" if base["current"] else older

    def score(row: dict, name: str) -> str:
        low, high = row["intervals"][name]
        return f"{row['general'][name]:.3f} [{low:.3f}, {high:.3f}]"

    header = "".join(f"{name:>22}" for name in MODEL_SCORINGS)
    return "\n".join(
        [
            f"{base['name']}: {base['parameters']:,} parameters, {recipe}, hash {base['hash']},"
            f" {state}",
            f"balanced accuracy on {base['items']:,} held-out claims of the general domain, 95 %"
            " interval over documents:",
            f"{'seed':>4}  {'CPU':<8}{header}{'CPU time':>13}",
            *(
                f"{row['seed']:>4}  {row['cpu_capability']:<8}"
                + "".join(f"{score(row, name):>22}" for name in MODEL_SCORINGS)
                + f"{row['process_cpu_s']:>11.0f} s"
                for row in base["seeds"]
            ),
        ]
    )
