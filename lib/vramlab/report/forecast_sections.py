"""The sections of the report that say what is predicted; nothing of them was measured."""

from __future__ import annotations

from . import forecast_figures, planner, rank_figures
from . import forecast_tables as tables
from .forecast_tables import Forecasts
from .rendering import Section

CAVEATS = (
    (
        "What is marked `predicted` was computed with no GPU: the real step of the real model on a"
        " virtual one, its requests through a simulation of PyTorch's allocator. The card's"
        " capacity and context are public figures, each with its source in params/cards.yml."
    ),
    (
        "Cells are traced for compute capability (8, 0), with each card's own cuBLAS workspaces. On"
        " Hopper the attention kernels of half types may take other scratch: `vramlab predict"
        " --card h100` is exact there."
    ),
    (
        "Of a row with many sizes some are traced and those between solved from them, event by"
        " event, where they follow exactly; cells say which in forecast.json (`solved`). The"
        " planner interpolates between cells, and says so."
    ),
)
"""What a reader has to know before quoting a predicted figure."""


def forecast_sections(forecasts: Forecasts) -> list[Section]:
    """The atlas, what explains it, and the planner."""
    atlas = tables.atlas_table(forecasts)
    if not forecasts.cells:
        about = "No cell could be forecast; the reasons are here."
        return [Section("The atlas", about, None, atlas, "predicted")]
    badge = f"predicted, {forecasts.detailed[0]['device']}"
    return [
        Section(
            "The atlas",
            "What each card has left at the reserved peak of one training step, in GiB. Blue fits,"
            " red lacks. `fits flushing`: it runs, but the allocator must give its cache back on"
            " the way.",
            forecast_figures.atlas(forecasts),
            atlas,
            badge,
        ),
        *_details(forecasts, badge),
        *_worlds(forecasts),
        Section(
            "Planner",
            "Pick a regime, a card and a size. Between two forecasts it draws a straight line and"
            " says so; outside them it refuses.",
            None,
            atlas[["name", "model", "seq", "batch"]],
            badge,
            extra=planner.embed(forecasts),
        ),
    ]


def _details(forecasts: Forecasts, badge: str) -> list[Section]:
    """The sections that draw cells one by one."""
    cells, count = forecasts.detailed, len(forecasts.cells)
    only = "" if len(cells) == count else f" Of {count} cells the first {len(cells)} are here."
    savings = tables.settings_that_save(forecasts) or [
        "In no cell here does a setting make a step fit that does not fit without it."
    ]
    return [
        Section(
            "Why this peak",
            "The largest groups alive at the peak, all blocks as one. `without` is the peak had"
            " that group never been allocated: where it falls by less than the group's size,"
            " another moment becomes the peak." + only,
            forecast_figures.why(cells),
            tables.peak_table(forecasts),
            badge,
        ),
        Section(
            "The predicted timeline",
            "One step of the real model, in requested bytes; the strip is the phase, the dashed"
            " line what the card has for the allocator. Pick a regime and a card. Reserved bytes"
            " are more: see the atlas." + only,
            forecast_figures.timeline(cells, forecasts.cards),
            tables.curve_table(forecasts),
            badge,
        ),
        Section(
            "Allocator what-if",
            "The same events under other settings of PyTorch's allocator. The default's rules"
            " reproduce CUDA snapshots that others published (this project has recorded none yet);"
            " the others follow PyTorch's source, by which `garbage_collection_threshold` does"
            " nothing unless `per_process_memory_fraction` is below 1." + only,
            forecast_figures.allocators(forecasts),
            tables.allocator_table(forecasts),
            badge,
            [*savings, *tables.settings_that_lose(forecasts)],
        ),
        Section(
            "Regime diff",
            "Bytes at the peak of two cells, by category and part of the model. The table has what"
            " moved from full fine-tuning to each other row." + only,
            forecast_figures.difference(cells),
            tables.moved_table(forecasts),
            badge,
        ),
    ]


def _worlds(forecasts: Forecasts) -> list[Section]:
    if not forecasts.content.get("worlds"):
        return []
    title, table = "One rank of many", tables.worlds_table(forecasts)
    if not forecasts.worlds:
        about = "No world could be forecast; the reasons are here."
        return [Section(title, about, None, table, "predicted")]
    return [
        Section(
            title,
            "Requested bytes at one rank's peak of fsdp as written, each rank with rows of its own."
            " Weights, gradients and optimizer state are cut between ranks; activations,"
            " temporaries and the buffers of gathers and reductions (`collectives`) are not. The"
            " mark is the reserved peak (`flush`: it fits if the allocator gives its cache back),"
            " the dashed line what the card has for the allocator. What NCCL holds for itself, 1 to"
            " 2 GiB a rank, is not included.",
            rank_figures.worlds(forecasts),
            table,
            f"predicted, {forecasts.worlds[0]['device']}",
            tables.smallest_worlds(forecasts),
        )
    ]
