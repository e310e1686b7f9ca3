"""Consistency items from disk: FactCC as released, BoolQ, SummEdits, or our own `.jsonl`. Nothing
is dropped silently."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from ..files import write_whole
from ..reading import BadFile, regular_file
from .formats import (
    SOURCE_FIELDS,
    parse_object,
    read_boolq,
    read_factcc,
    read_generated,
    read_summedits,
    source_of,
)
from .items import Item

MOST_LINE_BYTES, MOST_FILE_BYTES, MOST_PROBLEMS = 1 << 22, 1 << 32, 100_000
"""A file is not read on beyond so many bytes in a line or in all lines, or so many bad lines of its
data set."""
FACTCC_SIZES = {"val": (931, None), "test": (503, 441)}
"""Items and consistent items of the annotated release (Kryscinski 2020); the balance of `val` is
not published."""
FACTCC_FOLDERS = ("annotated_data", "unpaired_annotated_data")


@dataclass(frozen=True)
class Problem:
    """One line that is not an item, or one fact about a file (line 0)."""

    line: int
    path: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """The items of a data set and its bad lines. `summary` has the source's name and the numbers of
    missing articles and of unlabelled lines."""

    items: list[Item]
    problems: list[Problem]
    summary: dict = field(default_factory=dict)


def load_items(
    path: Path | str, source: str | None = None, stories: Path | str | None = None
) -> Loaded:
    """Every item under `path`. Without `source` the content decides which it is; `stories` is a
    folder with CNN/DM `.story` files, for releases of FactCC that have no article text.

    Raises: OSError; BadFile, when the source is unknown or two lines have one id: statistics pair
    items by it.
    """
    path = Path(path)
    files = {
        file: str(file.relative_to(path)) if file != path else file.name
        for file in item_files(path)
    }
    kinds = {file: source or _recognise(file) for file in files}
    known = [kind for kind in kinds.values() if kind]
    if not known:
        first_lines = (_describe_first_line(file, name) for file, name in files.items())
        first = next(filter(None, first_lines), "there is no line at all")
        raise BadFile(
            f"{path} has no .jsonl or .jsonl.gz file that begins with an item of"
            f" {', '.join(SOURCE_FIELDS)}: give the folder or file that holds the items, or name"
            f" their source with --source ({first})"
        )
    absent: set[str] = set()
    readers: dict[str, Callable[..., Item | None]] = {
        "factcc": partial(read_factcc, stories=stories, absent=absent),
        "boolq": read_boolq,
        "summedits": read_summedits,
        "generated": read_generated,
    }
    read: list[tuple[str, Item | None]] = []
    problems: list[Problem] = []
    for file, name in files.items():
        reader = readers[kinds[file] or known[0]]
        for number, line in _lines(file, name, problems):
            try:
                read.append((f"{name}:{number}", reader(parse_object(line, number), file, number)))
            except (BadFile, OSError) as error:
                problems.append(Problem(number, name, str(error)))
    items = [item for _, item in read if item]
    if repeated := [uid for uid, n in Counter(item.uid for item in items).items() if n > 1]:
        places = (
            f"{uid!r} on {' and '.join(place for place, item in read if item and item.uid == uid)}"
            for uid in repeated[:5]
        )
        raise BadFile(
            f"{path}: {len(repeated)} ids stand more than once, {'; '.join(places)}: give each item"
            " its own"
        )
    if "factcc" in known:
        problems += _unexpected(items, absent)
    summary = {
        "source": ", ".join(dict.fromkeys(known)),
        "missing_articles": len(absent),
        "unlabelled": len(read) - len(items),
    }
    return Loaded(items, problems, summary)


def describe_items(
    path: Path | str, source: str | None = None, stories: Path | str | None = None
) -> dict:
    """The data set at `path` as plain data: sizes, labels, splits, missing articles, bad lines by
    number."""
    loaded = load_items(path, source, stories)
    items = loaded.items
    consistent = sum(item.label for item in items)
    return {
        "source": loaded.summary["source"],
        "items": len(items),
        "documents": len({item.group for item in items}),
        "consistent": consistent,
        "inconsistent": len(items) - consistent,
        "majority": max(consistent, len(items) - consistent) / len(items) if items else None,
        "splits": _counts(items, "split"),
        "domains": _counts(items, "domain"),
        "transforms": _counts(items, "transform"),
        "missing_articles": loaded.summary["missing_articles"],
        "unlabelled": loaded.summary["unlabelled"],
        "problems": [asdict(problem) for problem in loaded.problems],
    }


def _counts(items: list[Item], field_name: str) -> dict[str, int]:
    return dict(sorted(Counter(getattr(item, field_name) for item in items).items()))


def write_items(items: list[Item], path: Path | str) -> None:
    """Write items as `.jsonl`, one per line, which `load_items` reads back exactly. Raises:
    OSError, where `path` is a folder or its folder does not exist."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(
            f"{path} is a folder, or lies in none: give a .jsonl file in an existing folder"
        )
    write_whole(path, "".join(json.dumps(asdict(item)) + "\n" for item in items))


def item_files(path: Path) -> list[Path]:
    """The files under `path` that can hold items, in order. Raises: OSError; BadFile, for a pipe or
    device."""
    if not path.is_dir():
        return [regular_file(path)]
    for folder in FACTCC_FOLDERS:  # the paired copy first: it has the articles
        if files := sorted((path / folder).glob("*/data-dev.jsonl")):
            return files
    files = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
    return files or sorted(path.glob("*/*.jsonl"))


def _lines(file: Path, name: str, problems: list[Problem]) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank. Where reading fails, that line is added to
    `problems` and the rest of the file is left out."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(regular_file(file), "rb") as lines:
            while line := lines.readline(MOST_LINE_BYTES):
                if (
                    len(line) == MOST_LINE_BYTES
                    or lines.tell() > MOST_FILE_BYTES
                    or len(problems) > MOST_PROBLEMS
                ):
                    raise BadFile(
                        f"more than {MOST_LINE_BYTES:,} bytes in a line, {MOST_FILE_BYTES:,} in the"
                        f" file or {MOST_PROBLEMS:,} bad lines"
                    )
                number += 1
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, BadFile) as error:
        problems.append(Problem(number + 1, name, f"cannot be read on from here: {error}"))


def _recognise(file: Path) -> str | None:
    """The source of the first object in the file's first 1,000 lines; None where it is of none."""
    for number, line in itertools.islice(_lines(file, "", []), 1000):
        try:
            return source_of(parse_object(line, number))
        except BadFile:
            continue
    return None


def _describe_first_line(file: Path, name: str) -> str:
    """The first line of a file that holds no items, in words; empty where there is no line."""
    problems: list[Problem] = []
    for number, line in _lines(file, name, problems):
        try:
            names = ", ".join(parse_object(line, number))
            return f"{name}, line {number}, has the fields {names[:200]}"
        except BadFile as error:
            is_pointer = line.startswith(b"version https://git-lfs")
            pointer = ", but a pointer of Git LFS: git lfs pull brings the file"
            return f"{name}, line {number}: {error}{pointer if is_pointer else ''}"
    return problems[0].message if problems else ""


def _unexpected(items: list[Item], absent: set[str]) -> list[Problem]:
    """The annotated release has known sizes; a copy that differs is not the benchmark."""
    problems = []
    for split, (size, consistent) in FACTCC_SIZES.items():
        labels = [item.label for item in items if item.split == split]
        if labels and (len(labels) != size or consistent not in (None, sum(labels))):
            message = (
                f"{len(labels)} items, {sum(labels)} consistent: the annotated release has {size}"
                " items"
                + (f", {consistent} consistent" if consistent else "")
                + (f"; {len(absent)} articles are missing" if absent else "")
            )
            problems.append(Problem(0, split, message))
    return problems
