"""Files that are whole or not there, whoever is stopped while writing them and whoever else writes the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd


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
