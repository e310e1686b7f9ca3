"""One rank of many: the sharded regime over worlds of 1 to 1,024 ranks, compared with every card,
with no GPU.

    content = {**chart(atlas), "worlds": chart_worlds(atlas)}

Each rank takes its own rows, so only what is sharded falls with the world: weights, gradients,
optimizer state. The figures are rank 0's, which never holds less than another. Not included: what
NCCL holds for itself, 1 to 2 GiB a rank.
"""

from __future__ import annotations

from pathlib import Path

from .chart import Atlas, SummaryCache, chart_cells
from .question import CACHE, Question

REGIME = "fsdp"
FIELDS = (
    "model",
    "regime",
    "weights",
    "name",
    "seq",
    "batch",
    "reason",
    "phase",
    "requested_bytes",
    "ledger",
    "device",
    "cards",
)
"""Of an atlas cell: enough for a stack by category, a verdict and a table."""


def chart_worlds(
    atlas: Atlas, cache_dir: Path | None = CACHE, progress: bool = True, jobs: int | None = None
) -> list[dict]:
    """A cell for each of the atlas's models and worlds, in which every rank takes a single row of
    `world_seq` tokens; kept as other cells are."""
    questions = [
        Question(model, REGIME, atlas.world_seq, 1, world=world)
        for model in atlas.models
        for world in atlas.worlds
    ]
    kept = SummaryCache(atlas.cards_by_key(), (), cache_dir)
    cells = chart_cells(questions, kept, progress, jobs)
    return [
        {"world": question.world, **{name: cell[name] for name in FIELDS if name in cell}}
        for question, cell in zip(questions, cells, strict=True)
    ]
