"""One trainer for every regime.

The order in which the axes rewrite the model carries meaning, so it stands here once, in
`Trainer.__init__`. The order of a step stands in `Trainer.step`. Everything a regime changes hangs
on those two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..observer import Observer
from ..regimes.regime import Regime, check_machine
from ..regimes.sharded import local
from ..regimes.trains.leaves import ActiveLeaves
from ..regimes.trains.parts import Part
from ..regimes.until.until import Updater

Batch = Mapping[str, Tensor]
"""input_ids, labels, and where wanted attention_mask and position_ids: each (batch, tokens),
integers; labels are -100 where nothing is to be learned."""


class Diverged(ArithmeticError):
    """A number of the training is infinite or nan: `what` of step `step`, counted from 0, which is
    `loss`, `weights` or, after the last step, `scores`."""

    def __init__(self, step: int, what: str, words: str):
        super().__init__(f"{words}: use a lower lr, or clip gradients")
        self.step, self.what = step, what


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up over `warmup` of the steps, then cosine to `floor` of
    the peak."""

    lr: float
    steps: int
    warmup: float = 0.06
    floor: float = 0.1

    def at(self, step: int) -> float:
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, self.steps - warmup_steps))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class _Turn:
    """A part that has been active at least once: its leaves, and their updater with whatever state
    it holds."""

    leaves: ActiveLeaves
    updater: Updater

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of optimizer state, named after its leaf."""
        names = {leaf: name for name, leaf in self.leaves.named.items()}
        return ((f"{names[leaf]}.{key}", tensor) for leaf, key, tensor in self.updater.state())


class Trainer:
    """Trains `model` in place under `regime`, telling `observer` what it is doing.

    After construction `model` is the rewritten one (peft-wrapped for LoRA, cast, checkpointed).
    Raises: ImpossibleHere, when the device cannot do what the regime needs.
    """

    def __init__(
        self,
        model: nn.Module,
        regime: Regime,
        schedule: Schedule,
        *,
        device: str = "cpu",
        seed: int = 0,
        observer: Observer | None = None,
    ):
        check_machine(regime, device)
        self.regime, self.schedule, self.device = regime, schedule, torch.device(device)
        self.observer = observer or Observer()
        self.steps_done = 0
        # 1. storage type first: adapters and leaves must be made in the type they train in
        model = regime.weights.prepare(model)
        # 2. then the device, so that nothing below is made twice; a model to be sharded stays on
        #    the host until it is
        model = regime.place.move(model, self.device)
        # 3. adapters wrap modules, so they come before anything that looks modules up
        model = regime.trains.prepare(model, seed)
        # 4. what guesses the adapters' gradients is made for them
        model = regime.grads.prepare(model, seed)
        # 5. checkpointing wraps blocks, adapters included; the head is no block
        self.model = regime.head.prepare(regime.acts.prepare(model), self.observer)
        # 6. sharding replaces parameters and gathers them around a block, so around all that is
        # done to it; it needs them before any leaf is cut out of one
        self._weights = regime.place.shard(self.model, self.device, regime.weights, self.observer)
        # 7. last, what trains is cut out of the finished network; everything else stops asking for
        #    a gradient
        self.parts: list[Part] = regime.trains.parts(self.model)
        self.model.requires_grad_(False)
        self._turns: dict[int, _Turn] = {}
        self._active: tuple[int, ...] = ()
        self.observer.own("weights", self.model.named_parameters())
        self.observer.own("buffers", self.model.named_buffers())

    def step(self, batches: Sequence[Batch], shares: Sequence[float] | None = None) -> Tensor:
        """One update from `regime.accumulate` micro-batches. Returns the loss: the mean over all
        their labelled tokens, a detached 0-d tensor on the device (reading it is the caller's
        synchronization, not ours). `shares` are the micro-batches' shares of those tokens, for a
        caller that knows them, or whose labels are on the device and should not be waited for; else
        they are counted, and the labels checked: where `shares` are given nothing looks at a label,
        and the fused head trains on one outside the vocabulary without an error. A micro-batch
        without a label contributes nothing. Where there are ranks, each gives its own
        micro-batches, of the same number; tokens and loss are then all ranks' together.

        Raises: ValueError, before any weight changes, when the number of micro-batches is not what
        the regime accumulates, one has no `labels`, a label is outside the vocabulary, or no token
        of the step is labelled.
        """
        if len(batches) != self.regime.accumulate:
            raise ValueError(
                f"{len(batches)} micro-batches for accumulate: {self.regime.accumulate}: "
                f"give step() exactly {self.regime.accumulate}"
            )
        if bare := [sorted(batch) for batch in batches if batch.get("labels") is None]:
            raise ValueError(
                f"a micro-batch of step {self.steps_done} has no labels, only {', '.join(bare[0])}:"
                " a batch needs labels, the input_ids with -100 where nothing is to be learned"
            )
        shares = self._shares(batches) if shares is None else shares
        self.observer.begin_step(self.steps_done)
        self._take_turns()
        self.model.train(bool(self.parts))
        # a rank runs what is not labelled too, since all gather together: with made-up labels, at a
        # share of 0
        counted = [
            (batch if share else {**batch, "labels": torch.zeros_like(batch["labels"])}, share)
            for batch, share in zip(batches, shares, strict=True)
            if share or self.regime.place.ranks > 1
        ]
        total = torch.zeros((), device=self.device)
        with self.regime.weights.compute(self.device.type):
            for batch, share in counted:
                for run in range(self._runs):
                    with self._run(run):
                        loss = self._forward(batch)
                        total += loss.detach() * (share / self._runs)
                        if self.parts:
                            with self.observer.phase(
                                "backward"
                            ):  # one backward, whatever parts it serves
                                self._active_turns()[0].updater.take(
                                    loss if share == 1.0 else loss * share
                                )
                        del loss
        if self.parts:
            with self.observer.phase("update"):
                self._update()
        self.observer.end_step()
        self.steps_done += 1
        return self.regime.place.mean(total)

    def check(self, loss: Tensor) -> float:
        """The loss that the last step returned, as a number; waits for the device. Then each weight
        that the step trained is read once, of which the loss says nothing yet: a gradient that is
        not finite shows in them, unless `clip_value` cut it or `loss_scale` left its step out. All
        ranks find the same.

        Raises: Diverged, when the loss or a weight is not finite.
        """
        step, number = self.steps_done - 1, float(loss)
        if not math.isfinite(number):
            raise Diverged(step, "loss", f"the loss of step {step} is {number}")
        ends = [
            end
            for leaf in self.active.values()
            if local(leaf).numel()
            for end in local(leaf.detach()).aminmax()
        ]
        if self._mean_of_ranks(sum(not end.isfinite() for end in ends)):
            raise Diverged(
                step,
                "weights",
                f"step {step} left weights that are not finite though its loss of {number:.3g} is:"
                " a gradient was not finite, or its update too large",
            )
        return number

    def _shares(self, batches: Sequence[Batch]) -> list[float]:
        """Each micro-batch's share of the tokens that the loss counts, so that the sum of gradients
        is the large batch's gradient, and so is its mean over ranks. Counted where the labels are,
        unseen by whoever watches the step. Raises: ValueError, when a label that counts is outside
        the vocabulary, or there is none."""
        words = self.model.config.vocab_size
        with _disable_current_modes():
            labels = [
                predicted[predicted != -100]
                for predicted in map(self.regime.trains.predicted, batches)
            ]
            outside = [
                int(label)
                for counted in labels
                for label in counted[(counted < 0) | (counted >= words)][:1]
            ]
        if outside:
            raise ValueError(
                f"a label of step {self.steps_done} is {outside[0]}, outside the vocabulary of"
                f" {words}: use 0 to {words - 1}, or -100 where nothing is to be learned"
            )
        counts = [len(counted) for counted in labels]
        whole = self._mean_of_ranks(sum(counts))
        if not whole:
            raise ValueError(
                f"no token of step {self.steps_done} is labelled, in none of its {len(batches)}"
                " micro-batches: every label is -100, or the first of its document, which nothing"
                " predicts: leave such a step out, or put its rows together with labelled ones"
            )
        return [count / whole for count in counts]

    def _mean_of_ranks(self, number: float) -> float:
        if self.regime.place.ranks == 1:
            return number
        return float(
            self.regime.place.mean(
                torch.tensor(float(number), dtype=torch.float64, device=self.device)
            )
        )

    def _forward(self, batch: Batch) -> Tensor:
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.observer.own("inputs", batch.items())
        with ExitStack() as stack:
            stack.enter_context(self.observer.phase("forward"))
            if self.parts and self.regime.grads.backward:
                stack.enter_context(self.regime.acts.saving(self.observer, self._weights))
            else:
                stack.enter_context(torch.no_grad())
            stack.enter_context(self.regime.weights.forward(self.device.type))
            return self.model(**batch, use_cache=False).loss

    def _update(self) -> None:
        for turn in self._active_turns():
            turn.updater.gather()
        if self.regime.clip > 0:
            nn.utils.clip_grad_norm_(self.active.values(), self.regime.clip)
        for turn in self._active_turns():
            turn.updater.apply()
            self.observer.own("optimizer", turn.state())

    def _active_turns(self) -> list[_Turn]:
        return [self._turns[index] for index in self._active]

    @property
    def _runs(self) -> int:
        """How often a step looks at each micro-batch."""
        return max((turn.updater.runs for turn in self._active_turns()), default=1)

    @contextmanager
    def _run(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for turn in self._active_turns():
                stack.enter_context(turn.updater.run(number))
            yield

    @property
    def active(self) -> dict[str, nn.Parameter]:
        """The leaves that train at this step, by name; a cut matrix's leaf is named
        `weight[start:stop]`."""
        return {
            name: leaf for turn in self._active_turns() for name, leaf in turn.leaves.named.items()
        }

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        return self.schedule.at(self.regime.trains.lr_step(step, len(self.parts)))

    def _take_turns(self) -> None:
        """Hand over to the parts whose turn it is, and set the learning rate. A part that stays
        active keeps its state."""
        due = self.regime.trains.active(self.steps_done, len(self.parts)) if self.parts else ()
        if due != self._active:
            self._rest(set(self._active) - set(due))
            for index in sorted(set(due) - set(self._active)):
                self._wake(index)
            self._arm(due)
        for turn in self._active_turns():
            turn.updater.begin(self.steps_done, self.lr(self.steps_done))

    def _arm(self, indices: tuple[int, ...]) -> None:
        self._active = indices
        # the observer first: an updater inside backward drops the gradient it is handed
        self.observer.trains(self.active.items())
        for turn in self._active_turns():
            turn.updater.arm()

    def _wake(self, index: int) -> None:
        turn = self._turns.get(index)
        if turn is None:
            leaves = ActiveLeaves(self.model, self.parts[index])
            rule = self.regime.rule_for(self.model, leaves.named)
            updater = self.regime.grads.updater(
                self.regime.place,
                self.regime.until,
                rule,
                self.model,
                leaves.named,
                self.schedule.lr,
                self.observer,
            )
            self._turns[index] = _Turn(leaves, updater)
            leaves.switch_on(updater.taker)
        else:
            turn.leaves.switch_on(turn.updater.taker)
            if self.regime.trains.state == "host":
                turn.updater.move_state(self.observer, "device")
                self.observer.own("optimizer", turn.state())

    def _rest(self, indices: set[int]) -> None:
        """Disarm all, since whoever watches is to come first again; put the parts `indices` to
        rest."""
        for turn in self._active_turns():
            turn.updater.disarm()
        for index in sorted(indices):
            turn = self._turns[index]
            turn.leaves.switch_off()
            if self.regime.trains.state == "reset":
                del self._turns[index]
            elif self.regime.trains.state == "host":
                turn.updater.move_state(self.observer, "host")

    def state_dict(self) -> dict:
        """What another trainer of the same regime and model goes on from as if this one had never
        stopped. As torch's: tensors are the trainer's own, so save or copy them before the next
        step. Probes are not in it, nor the norm of the last step and the loss scale of `until:
        backward`, which begin anew."""
        turns = {
            index: [optimizer.state_dict() for optimizer in turn.updater.optimizers]
            for index, turn in self._turns.items()
        }
        return {
            "steps_done": self.steps_done,
            "active": self._active,
            "model": self.model.state_dict(),
            "turns": turns,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from `state_dict`, whose tensors are copied. Raises: ValueError, when steps have
        been taken already."""
        if self.steps_done or self._turns:
            raise ValueError(
                f"{self.steps_done} steps are done: load the state into a trainer that has taken"
                " none"
            )
        self.model.load_state_dict(state["model"])
        for index, saved in state["turns"].items():
            self._wake(index)
            for optimizer, entry in zip(
                self._turns[index].updater.optimizers, copy.deepcopy(saved), strict=True
            ):
                optimizer.load_state_dict(entry)
        self._rest(set(state["turns"]) - set(state["active"]))
        self._arm(tuple(state["active"]))
        self.steps_done = state["steps_done"]

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that exist now, wherever they live."""
        return sum(tensor.nbytes for turn in self._turns.values() for _, tensor in turn.state())

    def probes(self) -> list[dict]:
        """What was measured of guessed gradients so far, in plain numbers: one row a step and
        site."""
        return [row for turn in self._turns.values() for row in turn.updater.probes()]

    def trainable_parameters(self) -> int:
        """Parameters that some part trains, each counted once."""
        params = dict(self.model.named_parameters())
        return sum(
            params[leaf.name].numel() // leaf.rows * (leaf.stop - leaf.start)
            for part in self.parts
            for leaf in part
        )

    def finish(self) -> nn.Module:
        """Put the active parts to rest and return the trained model, ready to be scored."""
        self._rest(set(self._active))
        self._active = ()
        return self.model.eval()
