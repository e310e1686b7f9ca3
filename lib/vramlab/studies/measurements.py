"""What studies ask for besides runs: forecasts, and bytes and seconds of real steps on this
machine. An arm's `call:` names one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from ..baichuan import BaichuanForCausalLM
from ..capture.meter import Meter
from ..cards import card as read_card
from ..forecast.forecast import Question, forecast
from ..observer import Observer
from ..regimes.parameters import model_spec, row_of
from ..regimes.regime import Regime
from ..regimes.updates import updates
from ..training.clock import Clock
from ..training.trainer import Batch, Schedule, Trainer


def predicted(
    model: str,
    regime: str,
    seq: int,
    batch: int = 1,
    weights: str = "",
    axes: Mapping | None = None,
    card: str = "",
    world: int = 1,
) -> pd.DataFrame:
    """The forecast of one step as one row: peaks, phase, host bytes, `ledger` and `owners` (JSON),
    FLOPs, in all and by phase (JSON), bytes moved, and with a card whether it fits. With `place:
    fsdp`, of one of `world` ranks that holds most. Raises: IllegalRegime."""
    question = Question(
        model, regime, seq, batch, weights, world=world, axes=json.dumps(axes or {}, sort_keys=True)
    )
    said = forecast(question, read_card(card) if card else None).to_json()
    kept = (
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "peak_requested_bytes",
        "phase",
        "host_bytes",
        "fits",
        "margin_bytes",
        "floor_s",
    )
    flops = {phase: sum(work["flops"].values()) for phase, work in said["work"].items()}
    work = {
        "flops": sum(flops.values()),
        "phase_flops": json.dumps(flops),
        "moved_bytes": sum(work["moved_bytes"] for work in said["work"].values()),
    }
    return pd.DataFrame(
        [
            {
                **{name: said[name] for name in kept},
                "ledger": json.dumps(said["ledger"]),
                "owners": json.dumps(said["owners"]),
                **work,
            }
        ]
    )


def metered(model: str, rows: Mapping[str, Mapping], seq: int, batch: int = 1) -> pd.DataFrame:
    """Real steps of random weights under the event meter: `row`, `peak_bytes`, `phase`, `ledger`
    (JSON), `host_bytes`. `rows`: name -> {regime, axes, weights}. Two steps, the second has
    optimizer state; regimes that take turns are refused.
    """
    found = []
    for name, said in rows.items():
        meter = Meter()
        trainer = _trainer(model, _row(said), meter)
        if len(trainer.parts) > 1:
            raise ValueError(
                f"{name} takes turns between {len(trainer.parts)} parts: two steps would not show"
                " its peak"
            )
        batches = _batches(trainer, model, seq, batch)
        with meter:
            for _ in range(2):
                trainer.step(batches)
        peak = meter.peak()
        found.append(
            {
                "row": name,
                "peak_bytes": peak["peak_bytes"],
                "phase": peak["phase"],
                "ledger": json.dumps(peak["categories"]),
                "host_bytes": meter.host_peak_bytes,
            }
        )
    return pd.DataFrame(found)


def timed(
    model: str,
    rows: Mapping[str, Mapping],
    seq: int,
    batch: int = 1,
    steps: int = 6,
    repeats: int = 5,
) -> pd.DataFrame:
    """Seconds of real steps in turns, so that whatever else the machine does falls on all rows
    alike: `row`, `repeat`, `step_s` (median of the steps but the first), `forward_s`, `backward_s`,
    `update_s`. Ratios within a repeat are what counts.
    """
    found = []
    for said in rows.values():
        _timed(model, _row(said), seq, batch, 2)  # the library's own first step is nobody's
    for repeat in range(repeats):
        for name, said in rows.items():
            frame = _timed(model, _row(said), seq, batch, steps)
            medians = frame.iloc[1:][["step_s", "forward_s", "backward_s", "update_s"]].median()
            found.append({"row": name, "repeat": repeat, **medians.to_dict()})
    return pd.DataFrame(found)


def cost(
    model: str, rows: Mapping[str, Mapping], seq: int, batch: int = 1, rounds: int = 4
) -> pd.DataFrame:
    """CPU seconds of a step, which other processes do not lengthen, over whole cycles: every part
    has its turns, a projection is made as often as in training. In rounds of all rows: `row`,
    `round`, `step_s`, `steps`, and of 1,000 steps `updates` of a parameter, their mean, `least` and
    `most`. One thread, or the seconds of all are added up."""
    trainers = {name: _trainer(model, _row(said), Observer()) for name, said in rows.items()}
    counts = {
        name: updates(model_spec(model), trainer.regime) for name, trainer in trainers.items()
    }
    found = []
    for number in range(-1, rounds):  # the first round makes optimizer state, and counts for nobody
        for name, trainer in trainers.items():
            batches, steps = _batches(trainer, model, seq, batch), _cycle(trainer)
            began = time.process_time()
            for _ in range(steps):
                trainer.step(batches)
            found.append(
                {
                    "row": name,
                    "round": number,
                    "step_s": (time.process_time() - began) / steps,
                    "steps": steps,
                    "updates": counts[name].mean,
                    "least": counts[name].least,
                    "most": counts[name].most,
                }
            )
    return pd.DataFrame(found).query("round >= 0").reset_index(drop=True)


def _cycle(trainer: Trainer, least: int = 8) -> int:
    """Steps after which a row has done everything it does."""
    row, parts = trainer.regime, len(trainer.parts)
    cycle = max(getattr(row.trains, "interval", 1) * parts, getattr(row.rule, "gap", 1))
    return cycle * -(-least // cycle)


def _timed(model: str, row: Regime, seq: int, batch: int, steps: int) -> pd.DataFrame:
    clock = Clock()
    trainer = _trainer(model, row, clock)
    batches = _batches(trainer, model, seq, batch)
    for _ in range(steps):
        trainer.step(batches)
    return pd.DataFrame(clock.rows)


def _row(said: Mapping) -> Regime:
    return row_of(said["regime"], said.get("weights", ""), said.get("axes"))


def _trainer(model: str, row: Regime, observer: Observer) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        BaichuanForCausalLM(model_spec(model).config), row, Schedule(row.lr, 100), observer=observer
    )


def _batches(trainer: Trainer, model: str, seq: int, batch: int) -> Sequence[Batch]:
    ids = torch.randint(
        3,
        model_spec(model).config.vocab_size,
        (batch, seq),
        generator=torch.Generator().manual_seed(0),
    )
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ] * trainer.regime.accumulate
