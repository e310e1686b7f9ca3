"""Files that are whole or not there, whoever is stopped while writing them and whoever else writes the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

SEAL = "checksums.json"
"""In a sealed folder: the name of each file, relative to the folder, with the SHA-256 of its content."""


def write_whole(path: Path, text: str) -> None:
    """Text, whole or not at all."""
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_table(frame: pd.DataFrame, path: Path, **options) -> None:
    """A parquet file, whole or not at all. `options`: of `DataFrame.to_parquet`."""
    _write(path, lambda partial: frame.to_parquet(partial, **options))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fill(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def seal(folder: Path, *names: str) -> None:
    """Record the checksums of the files called `names` (default: every file under `folder`), so that `intact` notices a file that
    was changed, cut short or removed. Call it last: a folder whose writer was killed has no seal, so it is not intact."""
    paths = [folder / name for name in names] or [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(folder)): checksum(path) for path in paths if path.name != SEAL}
    write_whole(folder / SEAL, json.dumps(sums, indent=1))


def intact(folder: Path) -> bool:
    """Whether `folder` was sealed and each sealed file still has its content. Files that came later do not count."""
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(sums) and all(checksum(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError, TypeError):  # no seal, a sealed file that is missing, or a damaged seal
        return False


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises: OSError, where there is no such file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
