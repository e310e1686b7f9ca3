"""A row over all axes, kinds and field values is refused by name, or trains: nothing that is read
ends in a traceback or a NaN."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml

from micro import batch, model, ranks
from vramlab.reading import BadFile
from vramlab.regimes import fields
from vramlab.regimes.regime import IllegalRegime, ImpossibleHere, read_regimes, read_row, regime_row
from vramlab.regimes.registry import AXES
from vramlab.regimes.sharded import local
from vramlab.training.trainer import Schedule, Trainer

WRONG = (
    None,
    True,
    -1,
    0,
    0.5,
    -0.5,
    1e308,
    10**30,
    -(10**30),
    10**400,
    1 << 20_000,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "8",
    "1e-3",
    "\N{SNOWMAN}",
    [],
    ["o_proj"],
    ["q_proj"],
    ["o_proj", 3],
    {},
    {"a": 1},
    [[[]]],
    b"8",
    float,
    "adamw",
)
"""Values that most fields cannot hold. Where one can, the row is to train."""


def fitting(annotation: Any, chance: random.Random) -> Any:
    """A value that a field with this annotation takes: its bounds too, but of what has no end, or
    makes matrices, few."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated and arguments[0] is int:
        least, most = arguments[1].least, arguments[1].most
        return chance.choice(
            (least, least + 1, least + chance.randrange(9), min(most, 40), min(most, 300))
        )
    if kind is Annotated:
        least, most = arguments[1].least, arguments[1].most
        return chance.choice(
            (
                least,
                most,
                chance.uniform(least, min(most, least + 1)),
                chance.choice((0.01, 0.5, 1)) * most,
            )
        )
    if kind is Literal:
        return chance.choice(arguments)
    if kind is tuple:
        return [fitting(arguments[0], chance) for _ in range(chance.randint(1, 3))]
    return {bool: chance.random() < 0.5, str: "o_proj"}[annotation]


def random_cell(axis: str, chance: random.Random, wrong: float) -> Any:
    """A kind of the axis, the default more often than others, with some of its fields; a share
    `wrong` of them any value."""
    known = AXES[axis]
    name = chance.choice((next(iter(known)), chance.choice(list(known))))
    owned = [field.name for field in dataclasses.fields(known[name])]
    given = {
        field: (
            chance.choice(WRONG)
            if chance.random() < wrong
            else fitting(fields.field_types(known[name])[field], chance)
        )
        for field in owned
        if chance.random() < 0.4
    }
    if chance.random() < wrong / 8:
        return chance.choice(
            (
                *WRONG,
                {name: 3},
                {name: []},
                {name: {}, "other": {}},
                {name: {"rnk": 1}},
                {3: {}},
                name[:-1],
            )
        )
    return {name: given} if given else name


def random_row(chance: random.Random) -> Any:
    """Half of the rows have none of the values that do not fit, so that what excludes what is met,
    and what trains."""
    wrong = chance.choice((0.0, 0.3))
    row: dict[Any, Any] = {
        axis: random_cell(axis, chance, wrong) for axis in AXES if chance.random() < 0.5
    }
    scalars = {"accumulate": (1, 2, 3), "clip": (0.0, 1e-6, 0.5, 1e6), "lr": (0, 1e-5, 1e-3, 0.1)}
    row |= {
        name: chance.choice(values) for name, values in scalars.items() if chance.random() < 0.25
    }
    if chance.random() < wrong / 4:
        row[chance.choice(("lr", "clip", "accumulate", "says", "colour", 3, None))] = chance.choice(
            WRONG
        )
    return chance.choice(WRONG) if chance.random() < wrong / 20 else row


def outcome(row: Any) -> str:
    """What becomes of the row: `unreadable`, `illegal` for what excludes what, `not here` for this
    model or machine, `trained`."""
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
    assert all(
        bool(weight.isfinite().all()) for weight in weights.values() if weight.is_floating_point()
    )
    return "trained"


def outcomes(
    first: int, count: int, wanted: Callable[[Any], bool] = lambda row: True
) -> collections.Counter:
    """How often each outcome came of the `wanted` of `count` rows. Raises: AssertionError, with the
    rows that failed."""
    seen, failed = collections.Counter(), []
    for number in range(first, first + count):
        row = random_row(random.Random(number))
        if not wanted(row):
            continue
        try:
            seen[outcome(row)] += 1
        except Exception as error:  # whatever it is, it is the fault that is looked for
            failed.append(f"row {number}: {row}\n    {type(error).__name__}: {str(error)[:300]}")
    assert not failed, f"{len(failed)} of {count} rows:\n" + "\n".join(failed[:20])
    return seen


def test_a_random_row_is_refused_by_name_or_trains():
    """At 55 ms a row that trains. Of `weights: nf4` there are none here: its library compiles for
    seconds when it is first used."""
    seen = outcomes(0, 160, lambda row: not isinstance(row, dict) or row.get("weights") != "nf4")
    assert min(seen[name] for name in ("unreadable", "illegal", "trained")) > 15, seen


@pytest.mark.slow
def test_many_random_rows_are_refused_by_name_or_train():
    seen = outcomes(10_000, 3000)
    assert (
        min(seen[name] for name in ("unreadable", "illegal", "trained")) > 500 and seen["not here"]
    ), seen


KINDS = [(axis, name) for axis, known in AXES.items() for name in known]


def companions(axis: str, name: str) -> dict:
    """A legal row with this value, of few others."""
    chance = random.Random(0)
    for _ in range(2000):
        row = {
            other: chance.choice((next(iter(known)), chance.choice(list(known))))
            for other, known in AXES.items()
        }
        try:
            read_row("row", {**row, axis: name})
        except IllegalRegime:
            continue
        if not row["place"].startswith("fsdp") and row["weights"] != "nf4":
            return {**row, axis: name}
    raise AssertionError(f"no legal row has {axis}: {name}")


@pytest.mark.parametrize(("axis", "name"), KINDS, ids=lambda part: part)
def test_every_field_refuses_by_name_what_it_cannot_hold(axis, name):
    row, annotations = companions(axis, name), fields.field_types(AXES[axis][name])
    for field in dataclasses.fields(AXES[axis][name]):
        assert get_args(annotations[field.name]) or annotations[field.name] is bool, (
            f"{field.name} has no range, choice or items"
        )
        refused = 0
        for value in WRONG:
            try:
                read_row("row", {**row, axis: {name: {field.name: value}}})
            except IllegalRegime as refusal:
                refused += f"{axis}.{name}.{field.name} is " in str(refusal)
                assert str(refusal).count("\n") == 1 or "is not possible" in str(refusal)
        assert refused > len(WRONG) / 2, field.name


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "name"), KINDS, ids=lambda part: part)
def test_whatever_a_field_holds_trains(axis, name):
    """The bounds of its range, and what of the odd values it takes."""
    row, annotations = companions(axis, name), fields.field_types(AXES[axis][name])
    for field in dataclasses.fields(AXES[axis][name]):
        bounds = (
            get_args(annotations[field.name])[1:]
            if get_origin(annotations[field.name]) is Annotated
            else ()
        )
        for value in (
            *WRONG,
            *(bound for span in bounds for bound in (span.least, min(span.most, 4096))),
        ):
            assert outcome({**row, axis: {name: {field.name: value}}}), field.name


ROWS = {"one": {"acts": "checkpoint"}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "one",
        "one: 3",
        "one: [acts]",
        "one:",
        "3: {acts: keep}",
        "one: {acts: keep",
        "\ufeff[]",
        "one: {lr: .nan}",
        "one: {lr: 1e-3x}",
        "one: {acts: on}",
        "one: {rule: {galore: {rank: 0x" + "f" * 5000 + "}}}",
        "[" * 5000,
        "one: {accumulate: yes}",
        "one: {says: [1]}",
        "\0",
        "one: &a [*a]",
        "? [a]\n: 3",
        b"\xff\xfe\x00",
        b"one: {says: \xe9}",
    ],
)
def test_a_file_of_rows_that_cannot_be_read_is_refused_by_name(text, tmp_path):
    path = tmp_path / "mine.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadFile, match=r"mine\.yml") as refusal:
        read_regimes(path)
    assert len(str(refusal.value)) < 2000


def test_a_file_of_rows_may_begin_with_a_byte_order_mark_and_must_exist(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(ROWS), encoding="utf-8-sig")
    assert (
        read_regimes(path)["one"].values["acts"] == "checkpoint"
        and regime_row("one", path) == ROWS["one"]
    )
    for missing in (tmp_path / "other.yml", tmp_path):
        with pytest.raises((OSError, BadFile), match=missing.name):
            regime_row("one", missing)


def test_every_fault_of_a_row_is_named_at_once():
    with pytest.raises(IllegalRegime) as refusal:
        read_row(
            "row",
            {
                "rule": {"galore": {"rnk": 3}},
                "trains": {"lora": {"rank": 0, "alpha": "8"}},
                "lr": math.nan,
                "clp": 1,
            },
        )
    reasons = str(refusal.value).splitlines()[1:]
    assert len(reasons) == 5 and [reason.count("use ") for reason in reasons] == [1] * 5
    assert any("rule.galore has no 'rnk': use rank" in reason for reason in reasons)
    assert any("a row has no 'clp': use clip" in reason for reason in reasons)


def test_a_whole_number_is_a_number():
    """torch takes both moments' decays as floats or neither."""
    rule = read_row("row", {"rule": {"adamw": {"beta1": 0}}, "clip": 1}).rule
    assert type(rule.beta1) is float and rule.beta1 == 0.0
