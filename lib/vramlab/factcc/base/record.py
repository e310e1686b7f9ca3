"""The bases that ship with the project: trained again by one command, with a table of what other
seeds and CPUs reach.

A recipe is only good when what it reaches hangs neither on the seed nor on how a CPU sums. So
beside the shipped weights stands one row for each (seed, CPU capability) that was tried;
`ATEN_CPU_CAPABILITY=default` imitates a plain CPU.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...baichuan import ModelSpec
from ...files import BASES, CACHE, SEAL, intact, remove_stale, seal, write_whole
from ...reading import BadFile, checked, read_json
from ...regimes.parameters import model_spec
from ..statistics import MODEL_SCORINGS
from .base_model import SEEDS, write_base
from .recipe import Recipe

ROW = {
    "seed": int,
    "cpu_capability": str,
    "threads": int,
    "torch": str,
    "general": dict.fromkeys(MODEL_SCORINGS, float),
    "intervals": dict.fromkeys(MODEL_SCORINGS, tuple[float, float]),
    "items": int,
    "process_cpu_s": float,
}
RECORD = {
    "hash": str,
    "parameters": int,
    "recipe": {"seed": int},
    **{name: kind for name, kind in ROW.items() if name != "seed"},
}
"""Fields of a row of the table and of `recipe.json`, with their types."""


def make(model: str, recipe_name: str, seed: int | None, progress: bool) -> dict:
    """Train the base of `model` and add its row to the table; with the recipe's own seed (`seed`
    None) its weights are shipped in place of the old. Returns what `describe` does. Raises:
    ValueError, for an unknown model or recipe, a negative seed or a damaged base that a row would
    be added to."""
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    spec, recipe = model_spec(model), Recipe.named(recipe_name)
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    folder = BASES / f"{spec.name}-{recipe_name}"
    if seed is not None and (folder / SEAL).exists() and not intact(folder):
        raise BadFile(f"{folder} is damaged: git checkout brings it back")
    rows = _rows(folder, spec, recipe_name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder.parent, ".partial-*")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        made = Path(partial, "made")
        made.mkdir()
        write_base(spec, recipe, CACHE, made, progress)
        row = _row(json.loads((made / "recipe.json").read_text()))
        table = json.dumps(
            {"rows": sorted([*(old for old in rows if _key(old) != _key(row)), row], key=_key)},
            indent=1,
        )
        if seed is None:
            write_whole(made / SEEDS, table)
            seal(made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        else:
            folder.mkdir(exist_ok=True)
            write_whole(folder / SEEDS, table)
            if (folder / SEAL).exists():
                seal(folder, *read_json(folder / SEAL), SEEDS)
    return describe(model, recipe_name)


def describe(model: str, recipe_name: str) -> dict:
    """The shipped base as plain data: its record, whether its files are intact and its recipe is
    today's, and `seeds`, a row for each (seed, CPU capability). Raises: FileNotFoundError, where
    none ships."""
    spec = model_spec(model)
    folder = BASES / f"{spec.name}-{recipe_name}"
    if not (folder / SEAL).exists() and not (folder / "recipe.json").exists():
        shipped = (
            ", ".join(sorted(path.parent.name for path in BASES.glob("[!.]*/recipe.json")))
            or "none"
        )
        raise FileNotFoundError(
            f"no base of model {spec.name} by recipe {recipe_name} ships (there are: {shipped}): "
            "train it with --make"
        )
    record = _read(folder / "recipe.json", RECORD)
    current = record["hash"] == Recipe.named(recipe_name).hash(spec)
    return {
        **record,
        "name": folder.name,
        "intact": intact(folder),
        "current": current,
        "seeds": _rows(folder, spec, recipe_name),
    }


def _read(path: Path, hints: Mapping[str, Any]) -> dict:
    try:
        return checked(read_json(path), hints, str(path), tuple(hints), others=True)
    except (OSError, BadFile) as error:
        raise BadFile(f"{error}: git checkout {path.parent} brings it back") from None


def _rows(folder: Path, spec: ModelSpec, recipe_name: str) -> list[dict]:
    """The table's rows that were made by today's recipe, whatever their seed; none where there is
    no folder."""
    recipe, table = Recipe.named(recipe_name), {"rows": []}
    if folder.exists():
        table = _read(folder / SEEDS, {"rows": [{"hash": str, **ROW}]})
    return [
        row for row in table["rows"] if row["hash"] == replace(recipe, seed=row["seed"]).hash(spec)
    ]


def _row(record: dict) -> dict:
    seed = record["recipe"]["seed"]
    return {
        "hash": record["hash"],
        "seed": seed,
        **{name: record[name] for name in ROW if name != "seed"},
    }


def _key(row: dict) -> tuple:
    return row["seed"], row["cpu_capability"]


def to_text(described: dict) -> str:
    """`describe`'s answer as lines for a terminal."""
    state = "intact" if described["intact"] else "DAMAGED: git checkout brings it back"
    recipe = (
        "today's recipe"
        if described["current"]
        else "an older recipe than today's: vramlab base --make"
    )
    lines = [
        (
            f"{described['name']}: {described['parameters']:,} parameters, {recipe}, hash"
            f" {described['hash']}, {state}"
        ),
        (
            f"balanced accuracy on {described['items']:,} held-out claims of the general domain, 95"
            " % interval over documents:"
        ),
        f"{'seed':>4}  {'CPU':<8}"
        + "".join(f"{name:>22}" for name in MODEL_SCORINGS)
        + f"{'CPU time':>13}",
    ]
    for row in described["seeds"]:
        scores = (
            f"{row['general'][name]:.3f} [{row['intervals'][name][0]:.3f},"
            f" {row['intervals'][name][1]:.3f}]"
            for name in MODEL_SCORINGS
        )
        lines.append(
            f"{row['seed']:>4}  {row['cpu_capability']:<8}"
            + "".join(f"{score:>22}" for score in scores)
            + f"{row['process_cpu_s']:>11.0f} s"
        )
    return "\n".join(lines)
