"""What `gpu_check` measures, and in which order.

A cell is measured if its forecast fits the card, with what a process holds besides, and host memory
holds what the row puts there. The most informative cells come first, so that a deadline cuts off
the least. One cell that does not fit is measured all the same, to run out of memory on purpose. A
row that could not be forecast is measured after all those that could.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..cards import Card, read_cards
from ..forecast.arithmetic import STORED, count_parameters
from ..forecast.chart import Atlas
from ..forecast.forecast import Question

FIRST = (
    "lora",
    "bf16",
    "lomo",
    "checkpoint",
    "adam8bit",
    "badam",
    "chunkft_128",
    "lora_checkpoint",
    "mezo",
    "mixed",
    "offload",
    "adalomo",
    "adafactor_backward",
    "qlora",
    "zero_shot",
    "approx_residual",
    "apollo",
    "host_state",
    "host_weights",
    "full",
)
"""Rows from most to least informative: each is another mechanism. The rest follow in the order of
regimes.yml."""
LAST = ("galore", "galore_layerwise")
"""They decompose every matrix at each recorded step, which takes minutes."""
AS_WRITTEN = ("mixed", "master", "qlora", "int8_lora", "bf16_sr")
"""Rows whose point is the type that they are stored in."""
CANNOT_RUN = ("ImpossibleHere", "IllegalRegime", "ImportError", "ModuleNotFoundError")
"""Reasons against a forecast that hold for the measurement too."""
SMALL_SHAPE = (256, 16)
"""Tokens of a row and rows of a step, of a run of the small sweep."""
HOST_SHARE = 0.7
"""Of host memory, for what a row puts there and for the model, which is made there."""


@dataclass(frozen=True)
class Cell:
    """One thing to do in a process of its own. `kind` is a key of `cell.KINDS`."""

    kind: str
    question: Question
    """The step to take; for a run of the small sweep, one on full rows."""
    forecast: Mapping = field(default_factory=dict)
    """Of that step, see `forecasts.predict_step`; empty where there is none."""
    limit_bytes: int = 0
    """What the device has for the allocator; 0: all of it."""

    @property
    def name(self) -> str:
        """Its folder."""
        if self.kind == "tiny":
            return f"tiny-{self.question.regime}"
        regime, weights = self.question.regime, self.question.weights
        stored = [weights] if weights not in ("", regime) else []
        suffix = ["trainer"] if self.kind == "peer" else []
        suffix += ["oom"] if self.meant_to_run_out else []
        return "-".join([regime, *stored, f"{self.question.batch}x{self.question.seq}", *suffix])

    @property
    def meant_to_run_out(self) -> bool:
        """Whether running out of memory is the expected end."""
        return self.limit_bytes > 0 or self.forecast.get("fits") is False


def questions(model: str, seq: Sequence[int], only: Sequence[str] = ()) -> list[Question]:
    """Every row at every length, in bf16 where the row allows it: all rows of the first length
    first, in the order of `FIRST`; those of `LAST` after all others. Rows that shard need several
    cards and are left out."""
    atlas = Atlas(
        "gpu-check", (model,), tuple(seq), (1,), ("bf16", ""), AS_WRITTEN, regimes=tuple(only)
    )
    on_one_card = [
        question
        for question in atlas.questions()
        if "fsdp" not in question.row.values["place"]
        and not (question.weights and question.regime in AS_WRITTEN)
    ]
    rank = {name: place for place, name in enumerate(FIRST)}
    return sorted(
        on_one_card,
        key=lambda question: (
            question.regime in LAST,
            seq.index(question.seq),
            rank.get(row_name(question), len(FIRST)),
        ),
    )


def row_name(question: Question) -> str:
    """The row's name in `FIRST`: full in bf16 is the row called bf16."""
    full_in_bf16 = (question.regime, question.weights) == ("full", "bf16")
    return "bf16" if full_in_bf16 else question.regime


def card_of(machine: Mapping) -> Card | None:
    """The card of this machine, with its own total and context. Its rates are from
    params/cards.yml, of the card of the same capability whose memory is nearest. None without a
    GPU."""
    if machine["total_bytes"] is None:
        return None
    cards = list(read_cards().values())
    alike = [c for c in cards if list(c.compute_capability) == machine["compute_capability"]]
    near = min(alike or cards, key=lambda c: abs(c.total_bytes - machine["total_bytes"]))
    return dataclasses.replace(
        near,
        key="here",
        name=machine["name"],
        total_gib=machine["total_bytes"] / 2**30,
        compute_capability=tuple(machine["compute_capability"]),
        context_mib=machine["context_bytes"] / 2**20,
        source={"rates": f"of {near.name}"},
    )


def plan(
    questions: Sequence[Question],
    forecasts: Mapping[str, Mapping],
    machine: Mapping,
    small: Sequence[str] = (),
    peers: Sequence[str] = (),
) -> list[Cell]:
    """Cells in the order in which they are worth measuring: three rows, the one that runs out, the
    rows of the last length that have a peer, each before its peer; the rest of the first length;
    the small sweep of the rows `small`; the rest of the other lengths; what takes minutes; what
    could not be forecast. `peers` names the rows that have one."""
    fitting, too_large, unknown = sort_out(questions, forecasts, machine["host_bytes"] * HOST_SHARE)
    head = [*fitting[:3], *running_out(fitting, too_large)]
    for cell in fitting:
        if cell.question.seq == questions[-1].seq and row_name(cell.question) in peers:
            head += [cell, Cell("peer", cell.question, cell.forecast)]
    head = list({cell.name: cell for cell in head}.values())
    rest = [cell for cell in fitting if cell not in head]
    short = [cell for cell in rest if cell.question.seq == questions[0].seq]
    first = [cell for cell in short if cell.question.regime not in LAST]
    return [
        *head,
        *first,
        *(Cell("tiny", Question("tiny", regime, *SMALL_SHAPE)) for regime in small),
        *(cell for cell in rest if cell not in first),
        *unknown,
    ]


def sort_out(
    questions: Sequence[Question], forecasts: Mapping[str, Mapping], host_bytes: float
) -> tuple[list[Cell], list[Cell], list[Cell]]:
    """Cells that fit card and host, cells that do not fit the card, and cells that were not
    forecast though they may run."""
    fitting, too_large, unknown = list[Cell](), list[Cell](), list[Cell]()
    for question in questions:
        bare = Cell("measure", question)
        forecast = forecasts.get(bare.name, {"reason": "no forecast in time"})
        cell = Cell("measure", question, forecast)
        if forecast["reason"]:
            unknown += [] if forecast["reason"].startswith(CANNOT_RUN) else [bare]
        elif cell.meant_to_run_out:
            too_large.append(cell)
        elif forecast["host_bytes"] + _model_bytes(question) <= host_bytes:
            fitting.append(cell)
    return fitting, too_large, unknown


def running_out(fitting: Sequence[Cell], too_large: Sequence[Cell]) -> list[Cell]:
    """The cell that runs out of memory on purpose: of those that do not fit, the one with the
    lowest peak, so that it gets far; where all fit, the one with the highest peak, on three
    quarters of what it takes."""
    if too_large:
        return [min(too_large, key=lambda cell: cell.forecast["reserved_peak_bytes"])]
    if not fitting:
        return []
    highest = max(fitting, key=lambda cell: cell.forecast["requested_peak_bytes"])
    limit_bytes = highest.forecast["reserved_peak_bytes"] * 3 // 4
    return [dataclasses.replace(highest, limit_bytes=limit_bytes)]


def _model_bytes(question: Question) -> int:
    """On the host while the model is made: as published, and once more in the type that the row
    stores it in, where that is another."""
    stored = STORED.get(question.row.values["weights"], 2)
    return round(count_parameters(question.spec) * (2 + (stored if stored != 2 else 0)))
