"""Where the project's files lie; and files that are whole or not there, whoever is stopped while
writing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .reading import BadFile, read_json

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs" / "cache"
"""What can be made again: bases and forecasts."""
FORECASTS = CACHE / "forecasts"
BASES = ROOT / "outputs" / "reference" / "bases"
"""The base models that ship with the project, one folder each, named after model and recipe."""
SEAL = "checksums.json"
"""In a sealed folder: the name of each file, relative to the folder, with the SHA-256 of its
content."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Text as UTF-8, or bytes, whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    _write(path, lambda partial: partial.write_bytes(data))


def write_table(frame: pd.DataFrame, path: Path, **options) -> None:
    """A parquet file with checksums, whole or not at all. `options`: of `DataFrame.to_parquet`."""
    _write(path, lambda partial: frame.to_parquet(partial, write_page_checksum=True, **options))


def remove_stale(folder: Path, pattern: str, age_s: float = 86_400.0) -> None:
    """Remove files and folders that match and are older than `age_s` seconds: parts that a killed
    process left."""
    for path in folder.glob(pattern):
        try:
            old = time.time() - path.lstat().st_mtime > age_s
        except FileNotFoundError:  # whoever wrote it has just finished
            continue
        if old and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif old:
            path.unlink(missing_ok=True)


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    remove_stale(path.parent, f"{path.name}.*.part")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fill(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@cache
def notice(words: str) -> None:
    """Say on standard error, once a process, what was passed over or made again."""
    print(f"vramlab: {words}", file=sys.stderr)


def write_checked(path: Path, content: Mapping) -> None:
    """A JSON file with a checksum of its content, whole or not at all."""
    write_whole(path, json.dumps({**content, "checksum": _digest(content)}, separators=(",", ":")))


def read_checked(path: Path) -> dict:
    """What `write_checked` wrote. Raises: OSError; BadFile, for a file that is not JSON or does not
    match its checksum."""
    content = read_json(path)
    if content.pop("checksum", None) != _digest(content):
        raise BadFile(f"{path} does not match its checksum, or has none")
    return content


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def recall(
    path: Path, read: Callable[[Path], Any] = read_checked, say: Callable[[str], object] = notice
) -> Any:
    """What is kept at `path`; None where nothing is, or what does not read back: then `say` gets a
    sentence that names it."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (BadFile, OSError) as error:
        say(f"{error}; it counts as not there")
        return None


def seal(folder: Path, *names: str) -> None:
    """Record the checksums of the files called `names` (default: every file under `folder`), so
    that `intact` notices a file that was changed, cut short or removed. Call it last: a folder
    whose writer was killed has no seal, so it is not intact.
    """
    paths = [folder / name for name in names] or [
        path for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    sums = {str(path.relative_to(folder)): checksum(path) for path in paths if path.name != SEAL}
    write_whole(folder / SEAL, json.dumps(sums, indent=1))


def intact(folder: Path) -> bool:
    """Whether `folder` was sealed and each sealed file still has its content. Files that came later
    do not count."""
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(sums) and all(
            checksum(folder / name) == digest for name, digest in sums.items()
        )
    except (
        OSError,
        ValueError,
        AttributeError,
        TypeError,
    ):  # no seal, a sealed file that is missing, or a damaged seal
        return False


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises: OSError, where there is no such file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
