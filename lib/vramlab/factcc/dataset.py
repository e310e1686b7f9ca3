"""The items of one run: what it trains on, what its thresholds are chosen on, what it is scored
on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .formats import hash_fraction
from .generator import GeneratorConfig, generate_items
from .items import DOMAINS, SPLITS, Item
from .prompt import CLAIMS_PER_SEQUENCE
from .questions import QUESTIONS_PER_PASSAGE, QuestionConfig, generate_questions
from .sources import load_items

GENERATORS: dict[str, tuple[Callable[..., list[Item]], Callable, dict[str, int]]] = {
    "claims": (generate_items, GeneratorConfig, {"claims": CLAIMS_PER_SEQUENCE}),
    "questions": (generate_questions, QuestionConfig, {"questions": QUESTIONS_PER_PASSAGE}),
}
"""Task -> generator, its configuration, and how many items a training document has."""
TASKS = tuple(GENERATORS)
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
    """The data set of a run's parameters: generated when `items` is empty, else read from that
    folder or file.

    Raises: ValueError, when the training domain does not exist or has no items.
    """
    return _read(params) if params["items"] else _generated(params)


def _generated(params: Mapping) -> Dataset:
    """With a training domain, its test items come at every shift and other domains count as shift
    severe. With all of them, each is trained on, and no test item is shifted."""
    task, trained, size = params["task"], params["train_domain"], params["test_items"]
    if task not in GENERATORS:
        raise ValueError(f"task is {task!r}: the generator makes {', '.join(TASKS)}")
    make, config, several = GENERATORS[task]
    make = partial(make, seed=params["data_seed"])
    make_one = partial(make, config=config(params["records"]))
    make_several = partial(make, config=config(params["records"], **several))
    tested = chosen("test_domains", params["test_domains"], DOMAINS)
    if trained == EVERY:
        domains, test = DOMAINS, _draw(make_one, tested, "test", size)
    else:
        shifts = chosen("test_shifts", params["test_shifts"], IN_DOMAIN_SHIFTS)
        others = _draw(make_one, [name for name in tested if name != trained], "test", size)
        domains, test = (trained,), _draw(make_one, [trained], "test", size, shifts)
        test += [replace(item, shift="severe") for item in others]
    train_size, val_size = (-(-params[f"{s}_items"] // len(domains)) for s in ("train", "val"))
    train = _draw(make_several, domains, "train", train_size)
    return Dataset(train, _draw(make_one, domains, "val", val_size), test, [])


def _draw(
    make: Callable[..., list[Item]],
    domains: Sequence[str],
    split: str,
    count: int,
    shifts: Sequence[str] = ("none",),
) -> list[Item]:
    """`count` items of each domain at each shift."""
    return [
        item
        for domain in domains
        for shift in shifts
        for item in make(domain, split, count, shift=shift)
    ]


def chosen(name: str, text: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names in `text`, the value of parameter `name`; all of `known` when it is
    empty. Raises: ValueError, for an unknown name."""
    names = [word.strip() for word in text.split(",") if word.strip()] or list(known)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{name} has {', '.join(unknown)}: there are {', '.join(known)}")
    return names


def _read(params: Mapping) -> Dataset:
    path, domain = Path(params["items"]), params["train_domain"]
    if not path.exists():
        raise ValueError(
            f"items is {path}, which does not exist: give a file or folder that `vramlab items` can"
            " read, or leave it empty for generated items"
        )
    loaded = load_items(path)
    known = sorted({item.domain for item in loaded.items})
    if domain not in known:
        raise ValueError(f"train_domain is {domain!r}: {path.name} has {', '.join(known)}")
    if params["task"] == "questions" and not all(item.asks for item in loaded.items):
        raise ValueError(
            f"task is 'questions', but {path.name} has claims: leave task out, items from disk"
            " bring their own"
        )
    tested = chosen("test_domains", params["test_domains"], known)
    inside = [replace(item, shift="none") for item in loaded.items if item.domain == domain]
    outside = [
        replace(item, shift="severe", split="test")
        for item in loaded.items
        if item.domain != domain and item.domain in tested
    ]
    by_split = _by_split(inside)
    if not by_split["train"] or not by_split["test"]:
        raise ValueError(
            f"domain {domain!r} has {len(by_split['train'])} training and {len(by_split['test'])}"
            " test items: a run needs both"
        )
    problems = [f"{problem.path}:{problem.line}: {problem.message}" for problem in loaded.problems]
    return Dataset(by_split["train"], by_split["val"], by_split["test"] + outside, problems)


def _by_split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by the source's split.

    Where the test labels are hidden, as BoolQ's are, the validation split is the test set and a
    tenth of the training documents are the validation set.
    """
    if {item.split for item in items} == {"train", "val"}:
        items = [
            replace(item, split="val" if hash_fraction(item.group) < 0.1 else "train")
            if item.split == "train"
            else replace(item, split="test")
            for item in items
        ]
    return {split: [item for item in items if item.split == split] for split in SPLITS}
