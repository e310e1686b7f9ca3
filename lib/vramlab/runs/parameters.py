"""Every parameter of a run, its default and its possible values. Parameters that cannot work are
refused when they are read, all of them at once."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path

from ..factcc.dataset import EVERY, IN_DOMAIN_SHIFTS, TASKS, chosen
from ..factcc.generator import most_records
from ..factcc.items import DOMAINS
from ..factcc.prompt import CLAIMS_PER_SEQUENCE, HALF, OBJECTIVES
from ..factcc.questions import QUESTIONS_PER_PASSAGE
from ..factcc.sources import item_files
from ..files import checksum
from ..reading import nearest
from ..regimes.parameters import run_row, run_spec
from ..regimes.registry import AXES

SCHEMA = 1
KNOWN_PARAMETERS: dict[str, object] = {
    "regime": "full",
    "model": "tiny",
    "config": {},
    "train_domain": "news",
    "test_domains": "",
    "test_shifts": "",
    "items": "",
    "task": "claims",
    "records": 2,
    "steps": 150,
    "batch_size": 16,
    "max_length": 256,
    "lr": 0.0,
    "objective": "answer+claim",
    "seed": 0,
    "data_seed": 0,
    "train_items": 4000,
    "val_items": 300,
    "test_items": 500,
    "recipe": "standard",
    "device": "cpu",
    "threads": 0,
    "measure": True,
    "watch_logits": False,
    "limit_mib": 0.0,
    "weights": "",
    "axes": {},
    "generate": 0,
    "checker": "",
}
"""Every parameter of a run, with its default.

`axes`          values in place of the row's, written as in a row, for example
                {"trains": {"chunks": {"count": 64}}, "clip": 1.0}; they win over `weights`
`checker`       folder of a published judge of the claims that `generate` asks for
`config`        fields of the model's config, also of its base's, such as {"norm_head": false}
`generate`      test documents of each domain and shift that the trained model writes a claim for
`items`         a data set on disk; empty: generated items, as `task` and `records` say
`limit_mib`     memory of the device for the allocator, 0: all of it. On a CPU it limits the metered
                pass, which then comes first
`lr`            0: the row's own
`measure`       false: no memory passes
`records`       records of a generated document
`task`          generated items: claims or questions
`test_domains`  of generated items, separated by commas; empty: all
`test_shifts`   of generated items in the training domain; empty: none, mild and moderate
`threads`       0: one a core
`watch_logits`  adds the highest logit, and the cross-entropy without max-z, to each step's row
`weights`       a storage type in place of the row's own, such as "bf16"
"""


def _number(least: float, most: float, more: str = "") -> tuple[Callable, str]:
    return lambda value: least <= value <= most, f"{least:,} to {most:,}{more}"


def _name(known: Collection[str], more: str = "") -> tuple[Callable, str]:
    return lambda value: value in known, f"one of {', '.join(filter(None, known))}{more}"


# parameter -> (whether a value of its type is possible, the possible values in words); a parameter
# without an entry may have any value of its type
RANGES: dict[str, tuple[Callable, str]] = {
    "task": _name(TASKS),
    "objective": _name(OBJECTIVES),
    "recipe": _name(("standard", "reading", "smoke", "none")),
    "weights": _name(("", *AXES["weights"]), ", or leave it empty"),
    "steps": _number(1, 10**9),
    "batch_size": _number(1, 10**6),
    "max_length": _number(16, 10**7),
    "records": _number(2, 1000),
    "train_items": _number(1, 10**8),
    "val_items": _number(1, 10**7),
    "test_items": _number(1, 10**7),
    "generate": _number(0, 10**7),
    "seed": _number(0, 2**32 - 1),
    "data_seed": _number(0, 2**32 - 1),
    "lr": (
        lambda value: 0 <= value <= sys.float_info.max,
        "a finite number above 0, or 0 for the row's own",
    ),
    "limit_mib": _number(0, 10**9, ", 0 for what there is"),
    "threads": _number(0, 1024, ", 0 for one a core"),
    "device": (
        lambda value: re.fullmatch(r"cpu|cuda(:\d{1,3})?", value),
        "cpu, cuda, or cuda:1 for the second GPU",
    ),
}


def _train_domain(full: Mapping) -> str:
    return (
        ""
        if full["items"] or full["train_domain"] in (*DOMAINS, EVERY)
        else (
            f"train_domain is {full['train_domain']!r:.80}: generated data has"
            f" {', '.join(DOMAINS)}, and {EVERY}"
        )
    )


def _records(full: Mapping) -> str:
    alone = full["items"] or full["train_domain"] == EVERY
    shifts = ["none"] if alone else chosen("test_shifts", full["test_shifts"], IN_DOMAIN_SHIFTS)
    most = min(most_records("general", shift) for shift in ("none", *shifts))
    return (
        ""
        if full["task"] != "claims" or full["records"] <= most
        else (
            f"records is {full['records']}: no two of a document share a name, place or day, use 2"
            f" to {most} for claims at the test shifts {', '.join(shifts)}, or task: questions"
        )
    )


def _batch_size(full: Mapping) -> str:
    domains = len(DOMAINS) if full["train_domain"] == EVERY else 1
    sequences = domains * -(
        -full["train_items"]
        // (
            domains
            * (QUESTIONS_PER_PASSAGE if full["task"] == "questions" else CLAIMS_PER_SEQUENCE)
        )
    )
    return (
        ""
        if full["items"] or full["batch_size"] <= HALF * sequences
        else (
            f"batch_size is {full['batch_size']} and train_items {full['train_items']}: the items"
            f" make {sequences} sequences, use a batch_size of {HALF * sequences} at most, or more"
            " train_items"
        )
    )


# (parameters, check): the check returns or raises the reason why they cannot work together; it is
# reported for the first of them
CHECKS: tuple[tuple[tuple[str, ...], Callable], ...] = (
    (("regime", "axes", "weights"), lambda full: run_row(full) and ""),
    (("model", "config"), lambda full: run_spec(full) and ""),
    (("train_domain", "items"), _train_domain),
    (
        ("test_domains", "items"),
        lambda full: (
            "" if full["items"] else chosen("test_domains", full["test_domains"], DOMAINS) and ""
        ),
    ),
    (
        ("test_shifts", "items"),
        lambda full: (
            ""
            if full["items"]
            else chosen("test_shifts", full["test_shifts"], IN_DOMAIN_SHIFTS) and ""
        ),
    ),
    (("records", "task", "items", "train_domain", "test_shifts"), _records),
    (("batch_size", "train_items", "task", "items", "train_domain"), _batch_size),
    (
        ("checker", "generate"),
        lambda full: (
            ""
            if full["generate"] or not full["checker"]
            else (
                f"checker is {full['checker']!r:.80} and generate 0: a checker judges what is"
                " written, set generate to a number"
            )
        ),
    ),
)


def faults(full: Mapping) -> dict[str, str]:
    """Parameter -> why its value cannot work, and what would. `full`: parameters over the
    defaults."""
    wrong = {
        name: (
            f"unknown parameter {name!r:.80}{nearest(str(name)[:80], KNOWN_PARAMETERS)}; known: "
            f"{', '.join(KNOWN_PARAMETERS)}"
        )
        for name in full
        if name not in KNOWN_PARAMETERS
    }
    for name, default in KNOWN_PARAMETERS.items():
        value, kinds = full[name], (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and not isinstance(default, bool)
        ):
            wrong[name] = (
                f"{name} is {value!r:.80}: it takes {type(default).__name__}, for example"
                f" {default!r}"
            )
        elif name in RANGES and not RANGES[name][0](value):
            wrong[name] = f"{name} is {value!r:.80}: use {RANGES[name][1]}"
    for names, check in CHECKS:
        try:
            reason = "" if wrong.keys() & {*names} else check(full)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            values = [
                f"{name} is {full[name]!r:.80}: "
                for name in names
                if isinstance(full[name], dict) and full[name]
            ]
            reason = "".join(values) + str(error)
        if reason:
            wrong[names[0]] = reason
    return wrong


def resolve(params: Mapping) -> dict:
    """`params` over the defaults, with the regime's row and learning rate filled in.

    Raises: ValueError, naming every parameter that cannot work, its value and what it may be.
    """
    full = {**KNOWN_PARAMETERS, **params}
    if wrong := faults(full):
        several = f"{len(wrong)} parameters cannot work:\n  - " if len(wrong) > 1 else ""
        raise ValueError(several + "\n  - ".join(wrong.values()))
    row = run_row(full)
    full["lr"] = float(full["lr"]) or row.lr
    return {**full, "regime_row": row.axes(), "accumulate": row.accumulate, "clip": row.clip}


def config_hash(params: Mapping) -> str:
    """Hash of everything that decides the run's numbers: parameters, the row, the model's file and
    the data on disk. Parameters at their default are left out, so that a new parameter renames no
    run; a new default is a new `SCHEMA`."""
    full = resolve(params)
    changed = {
        name: value
        for name, value in full.items()
        if name not in KNOWN_PARAMETERS or value != KNOWN_PARAMETERS[name]
    }
    content = {
        "schema": SCHEMA,
        "params": changed,
        "model": run_spec(full).fingerprint(),
        "items": _files(full["items"]),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _files(path: str) -> list:
    """(name, SHA-256) of each file of a data set."""
    files = item_files(Path(path)) if path and Path(path).exists() else []
    return [
        (file.name, _checksum(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size))
        for file in files
    ]


@cache
def _checksum(file: Path, *_: int) -> str:
    """The checksum, computed once for all cells of a sweep while the file keeps its time and
    size."""
    return checksum(file)


def run_id(params: Mapping) -> str:
    """The folder name of a run: its regime and the start of its hash."""
    return f"{params.get('regime', KNOWN_PARAMETERS['regime'])}-{config_hash(params)[:8]}"
