"""The items of one run: what it trains on, what its thresholds are frozen on, what it is scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .factcc.generator import GeneratorConfig, generate_items
from .factcc.items import DOMAINS, Item
from .factcc.prompt import CLAIMS_PER_SEQUENCE
from .factcc.sources import load_items

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
    """The data set that `params` asks for: generated when `items` is empty, else read from the folder or file there.

    Raises: ValueError, when the training domain does not exist or has no items.
    """
    return _read(params) if params["items"] else _generated(params)


def _generated(params: Mapping) -> Dataset:
    domain, seed = params["train_domain"], params["data_seed"]
    several = GeneratorConfig(claims=CLAIMS_PER_SEQUENCE)
    if domain == EVERY:
        return _mixed(params, several)
    if domain not in DOMAINS:
        raise ValueError(f"train_domain is {domain!r}: the generator has {', '.join(DOMAINS)}, and {EVERY}")
    test = [item for shift in _chosen("test_shifts", params["test_shifts"], IN_DOMAIN_SHIFTS)
            for item in generate_items(domain, "test", params["test_items"], seed, shift=shift)]
    for other in _chosen("test_domains", params["test_domains"], DOMAINS):
        if other != domain:
            test += [replace(item, shift="severe")
                     for item in generate_items(other, "test", params["test_items"], seed)]
    return Dataset(generate_items(domain, "train", params["train_items"], seed, config=several),
                   generate_items(domain, "val", params["val_items"], seed), test, [])


def _chosen(name: str, said: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names in `said`; empty is all. Raises: ValueError, for one that there is not."""
    wanted = [word.strip() for word in said.split(",") if word.strip()] or list(known)
    if missing := sorted(set(wanted) - set(known)):
        raise ValueError(f"{name} has {', '.join(missing)}: there are {', '.join(known)}")
    return wanted


def _mixed(params: Mapping, several: GeneratorConfig) -> Dataset:
    """An equal share of each domain to train and to validate on; no test item is of a new domain."""
    def drawn(split: str, count: int, domains: Sequence[str] = DOMAINS, config: GeneratorConfig | None = None) -> list[Item]:
        return [item for domain in domains for item in generate_items(domain, split, count, params["data_seed"], config=config)]

    train, val = (-(-params[name] // len(DOMAINS)) for name in ("train_items", "val_items"))
    tested = _chosen("test_domains", params["test_domains"], DOMAINS)
    return Dataset(drawn("train", train, config=several), drawn("val", val), drawn("test", params["test_items"], tested), [])


def _read(params: Mapping) -> Dataset:
    path = Path(params["items"])
    if not path.exists():
        raise ValueError(f"items is {path}, which does not exist: give a file or folder that `vramlab items` can read, "
                         "or leave it empty for generated items")
    files = sorted(path.glob("*.jsonl*")) if path.is_dir() and list(path.glob("*.jsonl.gz")) else [path]
    items, problems = [], []
    for file in files:
        loaded = load_items(file)
        items += loaded.items
        problems += [f"{problem.path}:{problem.line}: {problem.message}" for problem in loaded.problems]
    domain = params["train_domain"]
    known = sorted({item.domain for item in items})
    if domain not in known:
        raise ValueError(f"train_domain is {domain!r}: {path.name} has {', '.join(known)}")
    wanted = _chosen("test_domains", params["test_domains"], known)
    return _roles(items, domain, wanted, problems)


def _roles(items: list[Item], domain: str, wanted: list[str], problems: list[str]) -> Dataset:
    """In the training domain the source's splits by document; every other domain is test as a whole."""
    inside = [replace(item, shift="none") for item in items if item.domain == domain]
    outside = [replace(item, shift="severe", split="test") for item in items
               if item.domain != domain and item.domain in wanted]
    by_split = {split: [item for item in inside if item.split == split] for split in ("train", "val", "test")}
    if not by_split["train"] or not by_split["test"]:
        raise ValueError(f"domain {domain!r} has {len(by_split['train'])} training and {len(by_split['test'])} test items: "
                         "a run needs both")
    return Dataset(by_split["train"], by_split["val"], by_split["test"] + outside, problems)
