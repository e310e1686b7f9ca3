"""The project's folders; and files that are written whole or not at all, even when the writer is
killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .reading import BadFile, read_json

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs" / "cache"
"""Bases and forecasts, which can be made again."""
FORECASTS = CACHE / "forecasts"
BASES = ROOT / "outputs" / "reference" / "bases"
"""The base models that ship with the project, one folder each, named after model and recipe."""
SEAL = "checksums.json"
"""In a sealed folder: the name of each file, relative to the folder, with the SHA-256 of its
content."""


def write_whole(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_table(frame: pd.DataFrame, path: Path, **options) -> None:
    """Write a parquet file with checksums, whole or not at all. `options` are those of
    `DataFrame.to_parquet`."""
    _write(path, lambda partial: frame.to_parquet(partial, write_page_checksum=True, **options))


def remove_stale(folder: Path, pattern: str, age_s: float = 86_400.0) -> None:
    """Remove the files and folders that match and are older than `age_s` seconds: a killed process
    left them."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - path.lstat().st_mtime > age_s:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


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
def notice(sentence: str) -> None:
    """Print a sentence to standard error, once in a process: what was skipped or made again."""
    print(f"vramlab: {sentence}", file=sys.stderr)


def write_checked(path: Path, content: Mapping) -> None:
    """Write a JSON file with a checksum of its content, whole or not at all."""
    write_whole(path, json.dumps({**content, "checksum": _digest(content)}, separators=(",", ":")))


def read_checked(path: Path) -> dict:
    """Read what `write_checked` wrote. Raises: OSError; BadFile, for a file that is not JSON or
    does not match its checksum."""
    content = read_json(path)
    if content.pop("checksum", None) != _digest(content):
        raise BadFile(f"{path} does not match its checksum, or has none")
    return content


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def recall(
    path: Path, read: Callable[[Path], Any] = read_checked, say: Callable[[str], object] = notice
) -> Any:
    """Read the file at `path`; None, where it is missing or damaged. A damaged file is named
    in a sentence that `say` gets."""
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
    whose writer was killed then has no seal, and is not intact.
    """
    paths = [folder / name for name in names] or filter(Path.is_file, sorted(folder.rglob("*")))
    sums = {str(path.relative_to(folder)): checksum(path) for path in paths if path.name != SEAL}
    write_whole(folder / SEAL, json.dumps(sums, indent=1))


def intact(folder: Path) -> bool:
    """Whether `folder` was sealed and each sealed file still has its content. Files that were added
    later do not count."""
    try:
        sums = read_json(folder / SEAL)
        return bool(sums) and all(checksum(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError):  # no seal, a damaged one, or a sealed file that is missing
        return False


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises: OSError, where there is no such file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
