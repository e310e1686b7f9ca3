"""A row over all axes, kinds and field values is refused by name, or trains: nothing that is read ends in a traceback or a NaN."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from micro import batch, model, ranks
from vramlab.axes import AXES, fields
from vramlab.axes.place import local
from vramlab.regime import IllegalRegime, ImpossibleHere, read_row
from vramlab.trainer import Schedule, Trainer

WRONG = (None, True, -1, 0, 0.5, -0.5, 1e308, 10**30, -(10**30), 10**400, 1 << 20_000, math.nan, math.inf, -math.inf, "", "8",
         "1e-3", "\N{SNOWMAN}", [], ["o_proj"], ["q_proj"], ["o_proj", 3], {}, {"a": 1}, [[[]]], b"8", float, "adamw")
"""Values that most fields cannot hold. Where one can, the row is to train."""


def fitting(annotation: Any, chance: random.Random) -> Any:
    """A value that a field with this annotation takes: its bounds too, but of what has no end, or makes matrices, few."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated and arguments[0] is int:
        least, most = arguments[1].least, arguments[1].most
        return chance.choice((least, least + 1, least + chance.randrange(9), min(most, 40), min(most, 300)))
    if kind is Annotated:
        least, most = arguments[1].least, arguments[1].most
        return chance.choice((least, most, chance.uniform(least, min(most, least + 1)), chance.choice((0.01, 0.5, 1)) * most))
    if kind is Literal:
        return chance.choice(arguments)
    if kind is tuple:
        return [fitting(arguments[0], chance) for _ in range(chance.randint(1, 3))]
    return {bool: chance.random() < 0.5, str: "o_proj"}[annotation]


def random_cell(axis: str, chance: random.Random, wrong: float) -> Any:
    """A kind of the axis, the default more often than others, with some of its fields; a share `wrong` of them any value."""
    known = AXES[axis]
    name = chance.choice((next(iter(known)), chance.choice(list(known))))
    owned = [field.name for field in dataclasses.fields(known[name])]
    given = {field: chance.choice(WRONG) if chance.random() < wrong else fitting(fields.annotations(known[name])[field], chance)
             for field in owned if chance.random() < 0.4}
    if chance.random() < wrong / 8:
        return chance.choice((*WRONG, {name: 3}, {name: []}, {name: {}, "other": {}}, {name: {"rnk": 1}}, {3: {}}, name[:-1]))
    return {name: given} if given else name


def random_row(chance: random.Random) -> Any:
    """Half of the rows have none of the values that do not fit, so that what excludes what is met, and what trains."""
    wrong = chance.choice((0.0, 0.3))
    row: dict[Any, Any] = {axis: random_cell(axis, chance, wrong) for axis in AXES if chance.random() < 0.5}
    scalars = {"accumulate": (1, 2, 3), "clip": (0.0, 1e-6, 0.5, 1e6), "lr": (0, 1e-5, 1e-3, 0.1)}
    row |= {name: chance.choice(values) for name, values in scalars.items() if chance.random() < 0.25}
    if chance.random() < wrong / 4:
        row[chance.choice(("lr", "clip", "accumulate", "says", "colour", 3, None))] = chance.choice(WRONG)
    return chance.choice(WRONG) if chance.random() < wrong / 20 else row


def outcome(row: Any) -> str:
    """What becomes of the row: `unreadable`, `illegal` for what excludes what, `not here` for this model or machine, `trained`."""
    try:
        regime = read_row("row", row)
    except IllegalRegime as refusal:
        assert "use" in str(refusal) and len(str(refusal)) < 10_000
        return "illegal" if "is not possible" in str(refusal) else "unreadable"
    try:
        with ranks(regime):
            trainer = Trainer(model(), regime, Schedule(regime.lr, 2))
            batches = [batch(seed, rows=1, tokens=6) for seed in range(regime.accumulate)]
            losses = [float(trainer.step(batches)) for _ in range(2)]
            weights = {name: local(p) for name, p in trainer.finish().state_dict().items()}
    except (IllegalRegime, ImpossibleHere) as refusal:
        assert "use" in str(refusal)
        return "not here"
    assert all(math.isfinite(loss) for loss in losses), losses
    assert all(bool(weight.isfinite().all()) for weight in weights.values() if weight.is_floating_point())
    return "trained"


def outcomes(first: int, count: int) -> collections.Counter:
    """How often each outcome came of rows `first` on. Raises: AssertionError, with the rows that failed."""
    seen, failed = collections.Counter(), []
    for number in range(first, first + count):
        row = random_row(random.Random(number))
        try:
            seen[outcome(row)] += 1
        except Exception as error:  # whatever it is, it is the fault that is looked for
            failed.append(f"row {number}: {row}\n    {type(error).__name__}: {str(error)[:300]}")
    assert not failed, f"{len(failed)} of {count} rows:\n" + "\n".join(failed[:20])
    return seen


def test_a_random_row_is_refused_by_name_or_trains():
    seen = outcomes(0, 1200)
    assert min(seen[name] for name in ("unreadable", "illegal", "trained")) > 100, seen


@pytest.mark.slow
def test_many_random_rows_are_refused_by_name_or_train():
    print(outcomes(10_000, 20_000))
