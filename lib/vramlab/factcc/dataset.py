"""The items of one run: what it trains on, what its thresholds are frozen on, what it is scored
on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .generator import GeneratorConfig, generate_items
from .items import DOMAINS, Item
from .prompt import CLAIMS_PER_SEQUENCE
from .questions import QUESTIONS_PER_PASSAGE, QuestionConfig, generate_questions
from .sources import held_out, load_items

TASKS = ("claims", "questions")
IN_DOMAIN_SHIFTS = ("none", "mild", "moderate")
EVERY = "all"
"""In place of a training domain: an equal share of each."""


@dataclass(frozen=True)
class Dataset:
    """Items by role; `problems` are the source's bad lines, kept for the record."""

    train: list[Item]
    val: list[Item]
    test: list[Item]
    problems: list[str]


def dataset(params: Mapping) -> Dataset:
    """The data set that `params` asks for: generated when `items` is empty, else read from the
    folder or file there.

    Raises: ValueError, when the training domain does not exist or has no items.
    """
    return _read(params) if params["items"] else _generated(params)


def _generated(params: Mapping) -> Dataset:
    domain, size = params["train_domain"], params["test_items"]
    one, several = _makers(params)
    if domain == EVERY:
        return _mixed(params, one, several)
    test = [
        item
        for shift in chosen("test_shifts", params["test_shifts"], IN_DOMAIN_SHIFTS)
        for item in one(domain, "test", size, shift=shift)
    ]
    for other in chosen("test_domains", params["test_domains"], DOMAINS):
        if other != domain:
            test += [replace(item, shift="severe") for item in one(other, "test", size)]
    return Dataset(
        several(domain, "train", params["train_items"]),
        one(domain, "val", params["val_items"]),
        test,
        [],
    )


def _makers(params: Mapping) -> tuple[Callable, Callable]:
    """What makes the items to be scored, one a document, and those to learn from, several a
    document."""
    task, seed, records = params["task"], params["data_seed"], params["records"]
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: the generator makes {', '.join(TASKS)}")
    if task == "claims":
        make, configs = (
            generate_items,
            (
                GeneratorConfig(records),
                GeneratorConfig(records, claims=CLAIMS_PER_SEQUENCE),
            ),
        )
    else:
        make, configs = (
            generate_questions,
            (
                QuestionConfig(records),
                QuestionConfig(records, questions=QUESTIONS_PER_PASSAGE),
            ),
        )
    one, several = (partial(make, seed=seed, config=config) for config in configs)
    return one, several


def chosen(name: str, said: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names in `said`; empty is all. Raises: ValueError, for one that there is
    not."""
    wanted = [word.strip() for word in said.split(",") if word.strip()] or list(known)
    if missing := sorted(set(wanted) - set(known)):
        raise ValueError(f"{name} has {', '.join(missing)}: there are {', '.join(known)}")
    return wanted


def _mixed(params: Mapping, one: Callable, several: Callable) -> Dataset:
    """An equal share of each domain to train and to validate on; no test item is of a new
    domain."""

    def drawn(
        make: Callable, split: str, count: int, domains: Sequence[str] = DOMAINS
    ) -> list[Item]:
        return [item for domain in domains for item in make(domain, split, count)]

    train, val = (-(-params[name] // len(DOMAINS)) for name in ("train_items", "val_items"))
    tested = chosen("test_domains", params["test_domains"], DOMAINS)
    return Dataset(
        drawn(several, "train", train),
        drawn(one, "val", val),
        drawn(one, "test", params["test_items"], tested),
        [],
    )


def _read(params: Mapping) -> Dataset:
    path = Path(params["items"])
    if not path.exists():
        raise ValueError(
            f"items is {path}, which does not exist: give a file or folder that `vramlab items` can"
            " read, or leave it empty for generated items"
        )
    loaded = load_items(path)
    items, problems = (
        loaded.items,
        [f"{problem.path}:{problem.line}: {problem.message}" for problem in loaded.problems],
    )
    domain = params["train_domain"]
    known = sorted({item.domain for item in items})
    if domain not in known:
        raise ValueError(f"train_domain is {domain!r}: {path.name} has {', '.join(known)}")
    if params["task"] == "questions" and not all(item.asks for item in items):
        raise ValueError(
            f"task is 'questions', but {path.name} has claims: leave task out, items from disk"
            " bring their own"
        )
    return _roles(items, domain, chosen("test_domains", params["test_domains"], known), problems)


def _roles(items: list[Item], domain: str, wanted: Sequence[str], problems: list[str]) -> Dataset:
    """In the training domain the source's splits by document; every other domain is test as a
    whole. A benchmark whose test labels are hidden, such as BoolQ, is scored on its validation
    split, and a tenth of its training documents validate.
    """
    inside = [replace(item, shift="none") for item in items if item.domain == domain]
    outside = [
        replace(item, shift="severe", split="test")
        for item in items
        if item.domain != domain and item.domain in wanted
    ]
    if {item.split for item in inside} == {"train", "val"}:
        inside = [
            replace(
                item,
                split="test" if item.split == "val" else "val" if held_out(item.group) else "train",
            )
            for item in inside
        ]
    by_split = {
        split: [item for item in inside if item.split == split]
        for split in ("train", "val", "test")
    }
    if not by_split["train"] or not by_split["test"]:
        raise ValueError(
            f"domain {domain!r} has {len(by_split['train'])} training and {len(by_split['test'])}"
            " test items: a run needs both"
        )
    return Dataset(by_split["train"], by_split["val"], by_split["test"] + outside, problems)
