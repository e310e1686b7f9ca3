"""One rank of many: the sharded regime over worlds of 1 to 1,024 ranks, held against every card,
with no GPU.

    content = {**chart(atlas), "worlds": chart_worlds(atlas)}

Each rank takes its own rows, so only what is sharded falls with the world: weights, gradients,
optimizer state. The figures are rank 0's, which never holds less than another. Not included: what
NCCL holds for itself, 1 to 2 GiB a rank.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .chart import Atlas, chart
from .forecast import CACHE, Question

REGIME = "fsdp"
KEPT = (
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


@dataclasses.dataclass(frozen=True)
class _Worlds(Atlas):
    """The atlas whose cells are worlds."""

    def questions(self) -> list[Question]:
        return [
            Question(model, REGIME, self.world_seq, 1, world=world)
            for model in self.models
            for world in self.worlds
        ]


def chart_worlds(
    atlas: Atlas, cache_dir: Path | None = CACHE, progress: bool = True, jobs: int | None = None
) -> list[dict]:
    """A cell for each of the atlas's models and worlds, of one row of `world_seq` tokens a rank;
    kept as other cells are."""
    asked = _Worlds(
        **{field.name: getattr(atlas, field.name) for field in dataclasses.fields(atlas)}
        | {"allocators": ()}
    )
    if not asked.worlds:
        return []
    cells = chart(asked, cache_dir, progress, jobs)["cells"]
    return [
        {"world": question.world, **{key: cell[key] for key in KEPT if key in cell}}
        for question, cell in zip(asked.questions(), cells, strict=True)
    ]
