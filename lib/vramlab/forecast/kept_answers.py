"""Whole answers of the command line, kept on disk: a command that is repeated reads one small file
and does not import torch.

An answer depends on its request, on the rows, cards and models of params/, on this library's code
and on torch's version. A hash of all of them is in the name of its file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from .. import files
from ..files import FORECASTS, ROOT


def predict(options: Mapping, report: Callable[[str], object] = lambda _: None) -> dict:
    """The answer of `vramlab predict` with these options, see `answer.answer`."""

    def compute() -> dict:
        from .answer import answer

        return answer(**options, report=report)

    model = Path(options["model"])
    own_file = model.read_bytes() if model.suffix == ".yml" and model.is_file() else b""
    request = json.dumps(options, sort_keys=True).encode() + own_file
    return recall_or_compute("predict", request, compute)


def chart(path: Path, progress: bool = True) -> dict:
    """The content of `forecast.json` for the atlas file at `path`: its chart and, where it has any,
    its worlds."""

    def compute() -> dict:
        from .chart import chart, read_atlas
        from .chart_worlds import chart_worlds

        atlas = read_atlas(path)
        content = chart(atlas, progress=progress)
        worlds = {"worlds": chart_worlds(atlas, progress=progress)} if atlas.worlds else {}
        return {**content, **worlds}

    return recall_or_compute("atlas", path.read_bytes() if path.exists() else b"", compute)


def recall_or_compute(kind: str, request: bytes, compute: Callable[[], dict]) -> dict:
    """The kept answer, if nothing that it depends on has changed; else that of `compute`, kept
    unless a cell of it failed: that cell is to be tried again."""
    path = _path(kind, request)
    content = files.recall(path)
    if content is None:
        content = compute()
        cells = (*content.get("cells", ()), *content.get("worlds", ()))
        if not any(cell["reason"] for cell in cells):
            FORECASTS.mkdir(parents=True, exist_ok=True)
            files.write_checked(path, content)
    return content


def _path(kind: str, request: bytes) -> Path:
    digest, params = hashlib.sha256(request), ROOT / "params"
    digest.update(importlib.metadata.version("torch").encode())
    for file in (
        params / "regimes.yml",
        params / "cards.yml",
        *sorted((params / "models").rglob("*.yml")),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
    ):
        digest.update(file.read_bytes())
    return FORECASTS / f"{kind}-{digest.hexdigest()[:20]}.json"
