"""What studies measure besides runs: forecasts, and bytes and seconds of real steps on this
machine. An arm's `call:` names one of the functions.

`rows` is always {name: {regime, weights, axes}}.
"""

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
from ..regimes.updates import updates
from ..training.clock import Clock
from ..training.trainer import Batch, Schedule, Trainer

PREDICTED = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_requested_bytes",
    "phase",
    "host_bytes",
    "fits",
    "margin_bytes",
    "floor_s",
)
"""Fields of a forecast that a study keeps as they are."""
SECONDS = ["step_s", "forward_s", "backward_s", "update_s"]


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
    """The forecast of a step: peaks, phase, host bytes, `ledger` and `owners` (JSON), FLOPs in
    all and by phase (JSON), bytes moved, and with a card whether it fits. With `place: fsdp`, of
    that one of `world` ranks that needs most. Raises: IllegalRegime."""
    changes = json.dumps(axes or {}, sort_keys=True)
    question = Question(model, regime, seq, batch, weights, world=world, axes=changes)
    content = forecast(question, read_card(card) if card else None).to_json()
    flops = {phase: sum(work["flops"].values()) for phase, work in content["work"].items()}
    row = {
        **{name: content[name] for name in PREDICTED},
        "ledger": json.dumps(content["ledger"]),
        "owners": json.dumps(content["owners"]),
        "flops": sum(flops.values()),
        "phase_flops": json.dumps(flops),
        "moved_bytes": sum(work["moved_bytes"] for work in content["work"].values()),
    }
    return pd.DataFrame([row])


def metered(model: str, rows: Mapping[str, Mapping], seq: int, batch: int = 1) -> pd.DataFrame:
    """Real steps of random weights under the event meter: `row`, `peak_bytes`, `phase`, `ledger`
    (JSON), `host_bytes`. There are two steps; the second has optimizer state. Raises: ValueError,
    for a regime that takes turns."""
    return pd.DataFrame([_metered(model, name, spec, seq, batch) for name, spec in rows.items()])


def _metered(model: str, name: str, spec: Mapping, seq: int, batch: int) -> dict:
    meter = Meter()
    trainer = _trainer(model, spec, meter)
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
    return {
        "row": name,
        "peak_bytes": peak["peak_bytes"],
        "phase": peak["phase"],
        "ledger": json.dumps(peak["categories"]),
        "host_bytes": meter.host_peak_bytes,
    }


def timed(
    model: str,
    rows: Mapping[str, Mapping],
    seq: int,
    batch: int = 1,
    steps: int = 6,
    repeats: int = 5,
) -> pd.DataFrame:
    """Seconds of real steps, the rows in turns, so that other work of the machine slows all rows
    alike: `row`, `repeat`, `step_s` (median of the steps after the first), `forward_s`,
    `backward_s`, `update_s`. Compare rows within a repeat."""
    for spec in rows.values():
        _timed(model, spec, seq, batch, 2)  # the first step of the library itself is not counted
    medians = [
        {"row": name, "repeat": repeat, **_timed(model, spec, seq, batch, steps)}
        for repeat in range(repeats)
        for name, spec in rows.items()
    ]
    return pd.DataFrame(medians)


def _timed(model: str, spec: Mapping, seq: int, batch: int, steps: int) -> dict:
    """Median seconds of the steps after the first."""
    clock = Clock()
    trainer = _trainer(model, spec, clock)
    batches = _batches(trainer, model, seq, batch)
    for _ in range(steps):
        trainer.step(batches)
    return pd.DataFrame(clock.rows).iloc[1:][SECONDS].median().to_dict()


def cost(
    model: str, rows: Mapping[str, Mapping], seq: int, batch: int = 1, rounds: int = 4
) -> pd.DataFrame:
    """CPU seconds of a step, which other processes do not lengthen, over whole cycles, in which
    every part has its turns and a projection is made as often as in training. In rounds of all
    rows: `row`, `round`, `step_s`, `steps`, and the `updates` of a parameter in 1,000 steps, their
    mean, `least` and `most`. Use one thread: the seconds of all threads are added up."""
    trainers = {name: _trainer(model, spec, Observer()) for name, spec in rows.items()}
    counts = {
        name: updates(model_spec(model), trainer.regime) for name, trainer in trainers.items()
    }
    costs = []
    for number in range(-1, rounds):  # round -1 creates optimizer state, and is not counted
        for name, trainer in trainers.items():
            batches, steps = _batches(trainer, model, seq, batch), _cycle(trainer)
            began_s = time.process_time()
            for _ in range(steps):
                trainer.step(batches)
            costs.append(
                {
                    "row": name,
                    "round": number,
                    "step_s": (time.process_time() - began_s) / steps,
                    "steps": steps,
                    "updates": counts[name].mean,
                    "least": counts[name].least,
                    "most": counts[name].most,
                }
            )
    return pd.DataFrame(costs).query("round >= 0").reset_index(drop=True)


def _cycle(trainer: Trainer, least: int = 8) -> int:
    """At least so many steps in which everything that a row does occurs equally often."""
    row, parts = trainer.regime, len(trainer.parts)
    cycle = max(getattr(row.trains, "interval", 1) * parts, getattr(row.rule, "gap", 1))
    return cycle * -(-least // cycle)


def _trainer(model: str, spec: Mapping, observer: Observer) -> Trainer:
    row = row_of(spec["regime"], spec.get("weights", ""), spec.get("axes"))
    torch.manual_seed(0)
    network = BaichuanForCausalLM(model_spec(model).config)
    return Trainer(network, row, Schedule(row.lr, 100), observer=observer)


def _batches(trainer: Trainer, model: str, seq: int, batch: int) -> Sequence[Batch]:
    vocabulary, random = model_spec(model).config.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (batch, seq), generator=random)
    micro_batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return [micro_batch] * trainer.regime.accumulate
