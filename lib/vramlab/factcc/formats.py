"""One line of a data set -> an item: FactCC as released, BoolQ, SummEdits, or our own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from ..reading import BadFile, read_text, typed
from .items import SPLITS, Item

LABELS = {  # True and False are 1 and 0
    "CORRECT": 1,
    "INCORRECT": 0,
    "CONSISTENT": 1,
    "INCONSISTENT": 0,
    1: 1,
    0: 0,
}
SOURCE_FIELDS = {
    "generated": {"uid", "doc", "claim", "label"},
    "summedits": {"doc", "summary", "edit_types"},
    "boolq": {"question", "passage"},
    "factcc": {"claim", "label"},
}
"""Source -> the fields by which an object of it is recognised, the more special source first."""
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}


def parse_object(line: bytes, number: int) -> dict:
    """The object in line `number`; the first may begin with a byte order mark. Raises: BadFile."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadFile(f"not UTF-8: {error.reason}, at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(
            f"not JSON: {getattr(error, 'msg', error)} at column {getattr(error, 'colno', 1)}"
        ) from None
    if not isinstance(row, dict):
        raise BadFile(f"a {type(row).__name__}, not an object")
    return row


def source_of(row: dict) -> str | None:
    """The source whose items have these fields; None for none."""
    return next((source for source, names in SOURCE_FIELDS.items() if names <= set(row)), None)


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise BadFile(f"no {key!r}; it has {', '.join(sorted(row))}")
    if not isinstance(row[key], str) or row[key] == "":
        raise BadFile(f"{key} is {row[key]!r}: expected text")
    return row[key]


def _label(label: object) -> int:
    if isinstance(label, str | int) and label in LABELS:
        return LABELS[label]
    raise BadFile(
        f"label is {label!r}: expected CORRECT, INCORRECT, CONSISTENT, INCONSISTENT, 1 or 0"
    )


def _split_of(file: Path) -> str:
    """The split that the folder or the file is named after, else test. `data-dev.jsonl` lies in the
    folder that is named after the split, whichever that is."""
    names = (file.parent.name, file.name.split(".")[0].removeprefix("data-"))
    return next((SPLIT_NAMES[name] for name in names if name in SPLIT_NAMES), "test")


def _group_of(doc: str) -> str:
    """An id of a document that has none: the beginning of its hash."""
    return hashlib.sha256(doc.encode()).hexdigest()[:16]


def hash_fraction(group: str) -> float:
    """A number from 0 to 1 by the hash of a document's id, the same on every machine: splits are
    made by it, so that no document is in two."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8


def read_factcc(
    row: dict, file: Path, number: int, stories: Path | str | None, absent: set[str]
) -> Item:
    """The article is `text`, or the CNN/DM story at `filepath` in the folder `stories`; `absent`
    collects the articles that are in neither."""
    group = str(row.get("filepath") or row.get("id") or number)
    claim, label, split = _text(row, "claim"), _label(row.get("label")), _split_of(file)
    return Item(
        uid=f"factcc-{split}-{number}",
        source="factcc",
        domain="news",
        split=split,
        doc=_text(row, "text") if row.get("text") else _story(group, stories, absent),
        claim=claim,
        label=label,
        transform=str(row.get("augmentation") or ""),
        shift="none",
        group=group,
    )


def _story(filepath: str, stories: Path | str | None, absent: set[str]) -> str:
    name = Path(filepath)
    if stories and (name.is_absolute() or ".." in name.parts):
        raise BadFile(f"story {filepath} leaves the folder of the stories")
    parts = (name, Path(*name.parts[1:]), name.name)
    for path in [Path(stories, part) for part in parts] if stories else []:
        if path.is_file():
            return story_text(read_text(path))
    absent.add(filepath)
    raise BadFile(
        f"story {filepath} is not under {Path(stories).name}"
        if stories
        else "no article text: the release has none; give the CNN/DM stories with --stories FOLDER"
    )


def story_text(story: str) -> str:
    """The article of a CNN/DM story: the text before the first @highlight, lines joined by one
    space."""
    body = story.split("@highlight", 1)[0]
    return " ".join(line.strip() for line in body.splitlines() if line.strip())


def read_boolq(row: dict, file: Path, number: int) -> Item | None:
    """Original: `answer` is a bool. SuperGLUE: `label`, a bool or 0/1; None where it is hidden, -1
    or absent. The question, without its question mark, is the claim."""
    question, passage = _text(row, "question"), _text(row, "passage")
    label, split = row.get("answer", row.get("label")), _split_of(file)
    if label in (None, -1):
        return None
    return Item(
        uid=f"boolq-{split}-{row.get('idx', number)}",
        source="boolq",
        domain="boolq",
        split=split,
        doc=passage,
        claim=question.rstrip("? "),
        label=_label(label),
        transform="",
        shift="none",
        group=_group_of(passage),
    )


def read_summedits(row: dict, file: Path, number: int) -> Item:
    """The domain is the file's name. The release splits its authors' prompts (evaluation or test),
    not documents, so here documents are split by their hash: 60, 15 and 25 %."""
    domain, edits = file.name.split(".")[0], row.get("edit_types") or []
    doc, claim, label = _text(row, "doc"), _text(row, "summary"), _label(row.get("label"))
    share = hash_fraction(group := _group_of(doc))
    return Item(
        uid=str(row.get("id", f"{domain}-{number}")),
        source="summedits",
        domain=domain,
        split="train" if share < 0.6 else "val" if share < 0.75 else "test",
        doc=doc,
        claim=claim,
        label=label,
        transform="+".join(map(str, edits)) if isinstance(edits, list) else str(edits),
        shift="none",
        group=group,
    )


def read_generated(row: dict, file: Path, number: int) -> Item:
    """A line that `sources.write_items` wrote. Fields that an item does not have are left out."""
    known = {field.name: row[field.name] for field in fields(Item) if field.name in row}
    item = typed(Item, {**known, "label": _label(row.get("label"))}, "the item")
    for key in ("doc", "claim"):
        _text(row, key)  # neither may be empty
    if item.split not in SPLITS:
        raise BadFile(f"split is {item.split!r}: expected {', '.join(SPLITS)}")
    return item
