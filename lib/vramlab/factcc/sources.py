"""Consistency items from disk: FactCC as released, BoolQ, SummEdits, or our own `.jsonl`. Nothing
is dropped silently."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..files import write_whole
from ..reading import BadFile, read_text, regular_file, typed
from .items import SPLITS, Item

MOST_LINE_BYTES, MOST_FILE_BYTES, MOST_PROBLEMS = 1 << 22, 1 << 32, 100_000
"""Of one line, of all lines of one file, and lines of a data set that are no items: beyond, a file
is not read on."""
SOURCES = ("factcc", "boolq", "summedits", "generated")
LABELS = {
    "CORRECT": 1,
    "INCORRECT": 0,
    "CONSISTENT": 1,
    "INCONSISTENT": 0,
    1: 1,
    0: 0,
}  # True and False are 1 and 0
FACTCC_SIZES = {"val": (931, None), "test": (503, 441)}
"""Items and consistent items of the annotated release (Kryscinski 2020); the balance of `val` is
not published."""
FACTCC_FOLDERS = ("annotated_data", "unpaired_annotated_data")
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Problem:
    """One line that is not an item, or one fact about a file (line 0)."""

    line: int
    path: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """What was read. `summary` has the source's name, missing articles and unlabelled lines."""

    items: list[Item]
    problems: list[Problem]
    summary: dict = field(default_factory=dict)


def load_items(
    path: Path | str, source: str | None = None, stories: Path | str | None = None
) -> Loaded:
    """Every item under `path`. `source` is found from the content when it is None; `stories` is a
    folder with CNN/DM `.story` files, for releases of FactCC that have no article text.

    Raises: OSError; BadFile, when the source cannot be told, or two lines have one id: statistics
    pair items by it.
    """
    path = Path(path)
    files = {
        file: str(file.relative_to(path)) if file != path else file.name
        for file in item_files(path)
    }
    kinds = {file: source or _recognise(file) for file in files}
    known = [kind for kind in kinds.values() if kind]
    if not known:
        raise BadFile(
            f"{path} has no .jsonl or .jsonl.gz file that begins with an item of"
            f" {', '.join(SOURCES)}: give the folder or file that holds the items, or name their"
            f" source with --source ({_first(files)})"
        )
    readers = {
        "factcc": _Factcc(stories),
        "boolq": _boolq,
        "summedits": _summedits,
        "generated": _generated,
    }
    items, problems, unlabelled, lines = [], [], 0, {}
    for file, name in files.items():
        for number, line in _lines(file, name, problems):
            try:
                item = readers[kinds[file] or known[0]](_object(line, number), file, number)
                items.append(item)
                lines.setdefault(item.uid, []).append(f"{name}:{number}")
            except _Unlabelled:
                unlabelled += 1
            except (BadFile, OSError) as error:
                problems.append(Problem(number, name, str(error)))
    if repeated := [
        f"{uid!r} on {' and '.join(where)}" for uid, where in lines.items() if len(where) > 1
    ]:
        raise BadFile(
            f"{path}: {len(repeated)} ids stand more than once, {'; '.join(repeated[:5])}: give"
            " each item its own"
        )
    absent = readers["factcc"].absent
    if "factcc" in known:
        problems += _unexpected(items, absent)
    return Loaded(
        items,
        problems,
        {
            "source": ", ".join(dict.fromkeys(known)),
            "missing_articles": len(absent),
            "unlabelled": unlabelled,
        },
    )


def describe_items(
    path: Path | str, source: str | None = None, stories: Path | str | None = None
) -> dict:
    """What `path` holds, as plain data: sizes, labels, splits, missing articles, bad lines by
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


def write_items(items: list[Item], path: Path | str) -> None:
    """Items as `.jsonl`, one a line, which `load_items` reads back exactly. Raises: OSError, for a
    folder or in none."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise OSError(
            f"{path} is a folder, or lies in none: give a .jsonl file in a folder that there is"
        )
    write_whole(Path(path), "".join(json.dumps(asdict(item)) + "\n" for item in items))


def _counts(items: list[Item], column: str) -> dict:
    return dict(sorted(Counter(getattr(item, column) for item in items).items()))


def item_files(path: Path) -> list[Path]:
    """The files under `path` that can hold items, in order. Raises: OSError; BadFile, for a pipe or
    device."""
    if not path.is_dir():
        return [regular_file(path)]
    for folder in FACTCC_FOLDERS:  # the paired copy first: it has the articles
        if found := sorted((path / folder).glob("*/data-dev.jsonl")):
            return found
    return sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]) or sorted(
        path.glob("*/*.jsonl")
    )


def _lines(file: Path, name: str, problems: list[Problem]) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank; what cannot be read on is a problem of the
    line where that begins."""
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


def _object(line: bytes, number: int) -> dict:
    """The object in one line; the first may begin with a byte order mark. Raises: BadFile."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
    except UnicodeError as error:
        raise BadFile(f"not UTF-8: {error.reason}, at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(
            f"not JSON: {getattr(error, 'msg', error)} at column {getattr(error, 'colno', 1)}"
        ) from None
    if not isinstance(row, dict):
        raise BadFile(f"a {type(row).__name__}, not an object")
    return row


def _recognise(file: Path) -> str | None:
    """The source that the first object of the file is of; None where it is of none."""
    for number, line in itertools.islice(_lines(file, "", []), 1000):
        try:
            keys = set(_object(line, number))
        except BadFile:
            continue
        known = (
            ("generated", {"uid", "doc", "claim", "label"}),
            ("summedits", {"doc", "summary", "edit_types"}),
            ("boolq", {"question", "passage"}),
            ("factcc", {"claim", "label"}),
        )
        return next((source for source, wanted in known if wanted <= keys), None)
    return None


def _first(files: dict[Path, str]) -> str:
    """What the first line is that stands in the files, which are no items."""
    problems: list[Problem] = []
    for file, name in files.items():
        for number, line in _lines(file, name, problems):
            try:
                return (
                    f"{name}, line {number}, has the fields"
                    f" {', '.join(_object(line, number))[:200]}"
                )
            except BadFile as error:
                pointer = (
                    ", but a pointer of Git LFS: git lfs pull brings the file"
                    * line.startswith(b"version https://git-lfs")
                )
                return f"{name}, line {number}: {error}{pointer}"
    return problems[0].message if problems else "there is no line at all"


def _take(row: dict, key: str, kind: type = str):
    if key not in row:
        raise BadFile(f"no {key!r}; it has {', '.join(sorted(row))}")
    if not isinstance(row[key], kind) or row[key] == "":
        raise BadFile(f"{key} is {row[key]!r}: expected {'text' if kind is str else kind.__name__}")
    return row[key]


def _label(value) -> int:
    if isinstance(value, str | int) and value in LABELS:
        return LABELS[value]
    raise BadFile(
        f"label is {value!r}: expected CORRECT, INCORRECT, CONSISTENT, INCONSISTENT, 1 or 0"
    )


def _split_by_document(group: str) -> str:
    """60 / 15 / 25 by a hash of the document: the same on every machine, and no document in two
    splits."""
    share = _share(group)
    return "train" if share < 0.6 else "val" if share < 0.75 else "test"


def held_out(group: str) -> bool:
    """Whether a document is in the tenth that validates where a source has no split for it; the
    same on every machine."""
    return _share(group) < 0.1


def _share(group: str) -> float:
    """0 to 1, by a hash."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8


def _split_of(file: Path) -> str:
    """The split that the file's name or folder says; `data-dev.jsonl` sits in the folder that says
    it."""
    for name in (file.parent.name, file.name.split(".")[0].removeprefix("data-")):
        if name in SPLIT_NAMES:
            return SPLIT_NAMES[name]
    return "test"


class _Factcc:
    """Lines of the released directory. The article is `text`, or found by `filepath` among the
    stories."""

    def __init__(self, stories: Path | str | None):
        self.stories = Path(stories) if stories else None
        self.absent: set[str] = set()

    def __call__(self, row: dict, file: Path, number: int) -> Item:
        group = str(row.get("filepath") or row.get("id") or number)
        claim, label = _take(row, "claim"), _label(row.get("label"))
        doc = _take(row, "text") if row.get("text") else self._story(group)
        split = _split_of(file)
        return Item(
            f"factcc-{split}-{number}",
            "factcc",
            "news",
            split,
            doc,
            claim,
            label,
            str(row.get("augmentation") or ""),
            "none",
            group,
        )

    def _story(self, filepath: str) -> str:
        if not self.stories:
            self.absent.add(filepath)
            raise BadFile(
                "no article text: the release has none; give the CNN/DM stories with --stories"
                " FOLDER"
            )
        name = Path(filepath)
        if name.is_absolute() or ".." in name.parts:
            raise BadFile(f"story {filepath} leaves the folder of the stories")
        for path in (
            self.stories / name,
            self.stories / Path(*name.parts[1:]),
            self.stories / name.name,
        ):
            if path.is_file():
                return story_text(read_text(path))
        self.absent.add(filepath)
        raise BadFile(f"story {filepath} is not under {self.stories.name}")


def story_text(story: str) -> str:
    """The article of a CNN/DM story: what stands before the first @highlight, lines joined by one
    space."""
    body = story.split("@highlight", 1)[0]
    return " ".join(line.strip() for line in body.splitlines() if line.strip())


def _unexpected(items: list[Item], absent: set[str]) -> list[Problem]:
    """The annotated release has known sizes; a copy that differs is not the benchmark."""
    found = []
    for split, (size, consistent) in FACTCC_SIZES.items():
        inside = [item.label for item in items if item.split == split]
        wanted = f"{size} items" + (f", {consistent} consistent" if consistent else "")
        if inside and (len(inside) != size or consistent not in (None, sum(inside))):
            found.append(
                Problem(
                    0,
                    split,
                    f"{len(inside)} items, {sum(inside)} consistent: the annotated release has"
                    f" {wanted}" + (f"; {len(absent)} articles are missing" if absent else ""),
                )
            )
    return found


class _Unlabelled(Exception):
    """A line that is meant to have no label: a benchmark's hidden test set."""


def _boolq(row: dict, file: Path, number: int) -> Item:
    """Original: `answer` is a bool. SuperGLUE: `label`, a bool or 0/1, -1 or absent where hidden.
    The question, without its mark, is the claim."""
    question, passage = _take(row, "question"), _take(row, "passage")
    label = row.get("answer", row.get("label"))
    if label in (None, -1):
        raise _Unlabelled
    group = hashlib.sha256(passage.encode()).hexdigest()[:16]
    split = _split_of(file)
    return Item(
        f"boolq-{split}-{row.get('idx', number)}",
        "boolq",
        "boolq",
        split,
        passage,
        question.rstrip("? "),
        _label(label),
        "",
        "none",
        group,
    )


def _summedits(row: dict, file: Path, number: int) -> Item:
    """The domain is the file's name. The release's `split` says evaluation or test of the authors'
    prompts, not documents, so splits are made by document here."""
    doc, claim, label = _take(row, "doc"), _take(row, "summary"), _label(row.get("label"))
    group = hashlib.sha256(doc.encode()).hexdigest()[:16]
    edits = row.get("edit_types") or []
    domain = file.name.split(".")[0]
    return Item(
        str(row.get("id", f"{domain}-{number}")),
        "summedits",
        domain,
        _split_by_document(group),
        doc,
        claim,
        label,
        "+".join(map(str, edits)) if isinstance(edits, list) else str(edits),
        "none",
        group,
    )


def _generated(row: dict, file: Path, number: int) -> Item:
    own = {entry.name: row[entry.name] for entry in fields(Item) if entry.name in row}
    item = typed(Item, {**own, "label": _label(row.get("label"))}, "the item")
    _take(row, "doc"), _take(row, "claim")
    if item.split not in SPLITS:
        raise BadFile(f"split is {item.split!r}: expected {', '.join(SPLITS)}")
    return item
