"""The training loops that `peers` and `trainer_peers` compare: ours, and what a user would run
instead, each at its best.

A loop takes a job, trains its model and returns when each step ended and what its loss was. The
batches of all loops come from a DataLoader without workers over the same rows, in order. A peer
under the Trainer of transformers does not log, save, evaluate, report, clip, or check whether
losses are finite: only the training is left.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from vramlab.observer import Observer
from vramlab.regimes.regime import Regime
from vramlab.regimes.trains.adapters import Lora
from vramlab.regimes.trains.parts import Blocks
from vramlab.training.trainer import Schedule, Trainer


@dataclass(frozen=True)
class Job:
    """What to train, on what. `data`: one dict a row, of tensors (tokens,)."""

    model: nn.Module
    data: list[dict[str, Tensor]]
    batch_size: int
    steps: int
    lr: float
    seed: int

    def batches(self) -> DataLoader:
        from transformers import default_data_collator

        return DataLoader(self.data, self.batch_size, collate_fn=default_data_collator)


@dataclass
class Seen:
    """`ends_s`: when the loop began and when each step ended, by one clock. The losses are read
    when all is over."""

    ends_s: list[float] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        self.ends_s.append(time.perf_counter())

    def step_ended(self, loss: Tensor) -> None:
        self.kept.append(loss)
        self.ends_s.append(time.perf_counter())

    @property
    def losses(self) -> list[float]:
        return [loss.item() for loss in self.kept]


Loop = Callable[[Job, Observer], Seen]
"""Trains the job's model. The observer learns of backward at least, where the event meter looks
closer."""


def ours(regime: Regime) -> Loop:
    """This project's trainer, at a constant learning rate."""

    def loop(job: Job, observer: Observer) -> Seen:
        schedule = Schedule(job.lr, job.steps, warmup=0.0, floor=1.0)
        trainer, seen = (
            Trainer(job.model, regime, schedule, seed=job.seed, observer=observer),
            Seen(),
        )
        seen.begin()
        for batch in job.batches():
            seen.step_ended(trainer.step([batch]))
        return seen

    return loop


def hugging_face(optim: str, checkpointing: bool = False, cpu: bool = True, **arguments) -> Loop:
    """The Trainer of transformers with that optimizer, on the CPU or on the GPU there is;
    `arguments` are TrainingArguments."""

    def loop(job: Job, observer: Observer) -> Seen:
        from transformers import (
            PrinterCallback,
            TrainerCallback,
            TrainingArguments,
            default_data_collator,
        )
        from transformers import Trainer as Theirs

        class InOrder(Theirs):
            def _get_train_sampler(self, *_):
                return SequentialSampler(self.train_dataset)

            def training_step(self, *inputs):
                self.last_loss = super().training_step(*inputs)
                return self.last_loss

        class Clock(TrainerCallback):
            def on_train_begin(self, *_, **__):
                seen.begin()

            def on_step_end(self, *_, **__):
                seen.step_ended(trainer.last_loss)

        seen = Seen()
        with tempfile.TemporaryDirectory(prefix="vramlab-") as folder:
            settings = TrainingArguments(
                folder,
                optim=optim,
                learning_rate=job.lr,
                lr_scheduler_type="constant",
                max_steps=job.steps,
                max_grad_norm=0.0,
                per_device_train_batch_size=job.batch_size,
                weight_decay=0.0,
                seed=job.seed,
                use_cpu=cpu,
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                logging_nan_inf_filter=False,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                **(_checkpointing() if checkpointing else {}),
                **arguments,
            )
            trainer = InOrder(
                job.model, settings, default_data_collator, job.data, callbacks=[Clock()]
            )
            trainer.remove_callback(PrinterCallback)
            backward = trainer.accelerator.backward

            def observed_backward(*inputs, **named) -> None:
                with observer.phase("backward"):
                    backward(*inputs, **named)

            trainer.accelerator.backward = observed_backward
            trainer.train()
        if "bnb" in optim:
            _forget_overrides()
        return seen

    return loop


def _forget_overrides() -> None:
    """The Trainer asks bitsandbytes for 32-bit moments of embeddings, and bitsandbytes remembers
    that for the whole process, by a parameter's place in its group: it would hold for the next
    optimizer too, also for ours."""
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()


def _checkpointing() -> dict:
    """Under the names that this version of transformers has: version 6 drops the older ones."""
    from transformers import TrainingArguments

    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def peft_lora(adapters: Lora, **arguments) -> Loop:
    """Adapters of the same shape and first values, by peft, under the Trainer; `arguments` are
    those of `hugging_face`."""

    def loop(job: Job, observer: Observer) -> Seen:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(job.seed)
        config = LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.alpha,
            target_modules=list(adapters.targets),
            lora_dropout=0.0,
        )
        wrapped = Job(
            get_peft_model(job.model, config), job.data, job.batch_size, job.steps, job.lr, job.seed
        )
        return hugging_face("adamw_torch_fused", **arguments)(wrapped, observer)

    return loop


def badam(blocks: Blocks, checkpointing: bool = False) -> Loop:
    """BlockOptimizer around AdamW, as its authors show it, and torch's fused kernel; blocks from
    the bottom up."""

    def loop(job: Job, observer: Observer) -> Seen:
        from badam import BlockOptimizer

        with redirect_stdout(io.StringIO()):  # it prints which parameters will train
            optimizer = BlockOptimizer(
                torch.optim.AdamW(job.model.parameters(), lr=job.lr, weight_decay=0.0, fused=True),
                list(job.model.named_parameters()),
                switch_block_every=blocks.interval,
                switch_mode="ascending",
                verbose=0,
            )
        seen = Seen()
        job.model.train()
        if checkpointing:
            job.model.gradient_checkpointing_enable({"use_reentrant": False})
        seen.begin()
        for batch in job.batches():
            loss = job.model(**batch, use_cache=False).loss
            with observer.phase("backward"):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.step_ended(loss.detach())
        return seen

    return loop
