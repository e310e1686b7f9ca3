"""The learning pass of a run: timed, with nothing but a clock watching."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ..progress import bar
from ..training.clock import clock
from ..training.logit_watch import LogitWatch
from .preparation import Prepared


@dataclass(frozen=True)
class Learned:
    """What the learning pass recorded."""

    steps: pd.DataFrame
    """One row for each step."""
    result: dict
    """Speed, sizes and losses."""
    probes: pd.DataFrame
    """Guessed gradients against true ones, see `regimes.grads.probes.Probes.rows`; empty where none
    was guessed or measured."""


def learn(prepared: Prepared, progress: bool) -> tuple[Learned, nn.Module]:
    """Train for `steps` steps with only a clock watching. Returns the record and the trained model.
    Raises: Diverged."""
    device, steps = prepared.params["device"], prepared.params["steps"]
    watch = clock(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)
    trainer = prepared.trainer(prepared.regime, copy.deepcopy(prepared.model), watch)
    logits = None
    if prepared.params["watch_logits"]:
        logits = LogitWatch(trainer.model, prepared.model.config.z_loss_weight)
    rows = []
    with bar(f"train {prepared.regime.name}", steps, progress) as progress_bar:
        for step, batches in enumerate(itertools.islice(prepared.batches(), steps)):
            row = {
                "loss": trainer.check(trainer.step(batches)),
                "tokens": sum(int(batch["attention_mask"].count_nonzero()) for batch in batches),
                "lr": trainer.lr(step),
            }
            rows.append({**row, **(logits.take() if logits else {})})
            progress_bar.update(1)
    if logits:
        logits.stop()
    frame = pd.DataFrame([{**timed, **row} for timed, row in zip(watch.rows, rows, strict=True)])
    result = {
        "speed": speed(warm(frame)),
        "trainable_parameters": trainer.trainable_parameters(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loss_first": float(frame["loss"].iloc[0]),
        "loss_last": float(frame["loss"].tail(10).mean()),
        "train_s": float(frame["step_s"].sum()),
        "allocator": _allocator(device),
    }
    return Learned(frame, result, pd.DataFrame(trainer.probes())), trainer.finish()


def _allocator(device: str) -> dict | None:
    """Torch's own record of the pass on CUDA: peaks, how often it had to flush its cache to go on,
    and how often it gave up."""
    if not device.startswith("cuda"):
        return None
    stats = torch.cuda.memory_stats(device)
    return {
        "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
        "reserved_peak_bytes": stats["reserved_bytes.all.peak"],
        "retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }


def warm(frame: pd.DataFrame) -> pd.DataFrame:
    """The steps after the first tenth, which fills caches and creates optimizer state."""
    return frame.iloc[max(1, len(frame) // 10) :] if len(frame) > 1 else frame


def speed(timed: pd.DataFrame) -> dict:
    """Tokens a second over the steps `timed`, rows of a clock with their `tokens`; quartiles of a
    step's seconds, and medians of its phases."""
    q25, q50, q75 = (float(timed["step_s"].quantile(q)) for q in (0.25, 0.5, 0.75))
    return {
        "tokens_per_s": float(timed["tokens"].sum() / timed["step_s"].sum()),
        "step_s_median": q50,
        "step_s_q25": q25,
        "step_s_q75": q75,
        "forward_s": float(timed["forward_s"].median()),
        "backward_s": float(timed["backward_s"].median()),
        "update_s": float(timed["update_s"].median()),
        "steps_timed": len(timed),
    }
