"""What each rank of a real process group does, started by test_fsdp: trains its half of every
batch, and writes what came out.

torchrun --nproc-per-node 2 tests/ranked_steps.py FOLDER
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import distributed

import micro
from vramlab.capture.meter import Meter
from vramlab.regimes.regime import read_row
from vramlab.regimes.sharded import is_sharded
from vramlab.training.trainer import Schedule, Trainer

ROWS = {
    "full": {},
    "clip": {"clip": 0.05},
    "accumulate": {"accumulate": 2},
    "lomo": {"until": "backward", "rule": "sgd"},
    "checkpoint": {"acts": "checkpoint"},
    "offload": {"acts": {"offload": {"min_bytes": 0}}},
    "lora": {"trains": "lora"},
    "mixed": {"weights": "mixed"},
    "fsdp_offload": {"place": "fsdp_offload"},
    "fsdp_offload, lomo": {"place": "fsdp_offload", "until": "backward", "rule": "sgd"},
    "fsdp_offload, clip": {"place": "fsdp_offload", "clip": 0.05},
    "fsdp_offload, accumulate": {"place": "fsdp_offload", "accumulate": 2},
}
STEPS = 3


def halves(number: int) -> Iterator[dict]:
    """The two halves of micro-batch `number`. The second has fewer labels, so that half the tokens
    are not half the loss, and in the second micro-batch none at all: that rank contributes nothing,
    and still gathers with the other.
    """
    for rank in range(2):
        batch = micro.batch(2 * number + rank)
        if rank:
            batch["labels"][:, : None if number == 1 else 5] = -100
        yield batch


def train(row: dict, mine: slice) -> dict:
    """Losses, and weights made whole, after training on `mine` of the halves of every
    micro-batch."""
    trainer = Trainer(micro.model(), read_row("row", row), Schedule(1e-2, STEPS))
    numbers, losses = itertools.count(), []
    for _ in range(STEPS):
        parts = [list(halves(next(numbers)))[mine] for _ in range(trainer.regime.accumulate)]
        losses.append(
            float(
                trainer.step(
                    [
                        {key: torch.cat([half[key] for half in part]) for key in part[0]}
                        for part in parts
                    ]
                )
            )
        )
    weights = trainer.finish().state_dict()
    return {
        "losses": losses,
        "weights": {
            key: tensor.full_tensor() if is_sharded(tensor) else tensor
            for key, tensor in weights.items()
        },
    }


def births(frame: pd.DataFrame) -> Counter:
    """What is made in the second step, in number. Left out: gloo's own copy of what it reduces,
    seen when gloo cuts it up, which a GPU's collectives do not make; and whatever holds the
    batch."""
    born = frame.query(
        "event == 'alloc' and step == 1 and bytes > 0 and category != 'inputs' and op !="
        " 'aten.split.Tensor'"
    )
    return Counter(
        zip(born["category"], born["phase"], born["module"], born["op"], born["bytes"], strict=True)
    )


def metered(row: dict) -> Counter:
    """What a second step makes, of a step as a forecast would run it."""
    meter = Meter()
    trainer = Trainer(micro.model(), read_row("row", row), Schedule(1e-3, 2), observer=meter)
    with meter:
        for _ in range(2):
            ids = torch.zeros(3, 11, dtype=torch.long)
            trainer.step([{"input_ids": ids, "labels": ids.clone()}], [1.0])
    return births(meter.frame())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    sharded = {name: {"place": "fsdp", **row} for name, row in ROWS.items()}
    out = {
        "trained": {name: train(row, slice(rank, rank + 1)) for name, row in sharded.items()},
        "metered": {
            name: metered(row) for name, row in sharded.items() if not row.get("accumulate")
        },
    }
    torch.save(out, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
