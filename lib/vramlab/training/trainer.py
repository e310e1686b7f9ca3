"""One trainer for every regime.

The order in which the axes rewrite the model matters, so it is written once, in `Trainer.__init__`.
The order of a step is written in `Trainer.step`. A regime changes nothing but what those two call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..observer import Observer
from ..regimes.regime import Regime, check_machine
from ..regimes.sharded import local
from ..regimes.trains.leaves import ActiveLeaves
from ..regimes.trains.parts import Part
from ..regimes.until.until import Updater
from .labels import Batch, count_labels
from .schedule import Schedule


class Diverged(ArithmeticError):
    """A number of the training is infinite or NaN. `quantity` is `loss`, `weights` or, after the
    last step, `scores`; `step` counts from 0."""

    def __init__(self, step: int, quantity: str, message: str):
        super().__init__(f"{message}: use a lower lr, or clip gradients")
        self.step, self.quantity = step, quantity


@dataclass
class _Turn:
    """A part that has been active at least once: its leaves, and their updater with its state."""

    leaves: ActiveLeaves
    updater: Updater

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of optimizer state, named after its leaf."""
        names = {leaf: name for name, leaf in self.leaves.named.items()}
        return ((f"{names[leaf]}.{key}", tensor) for leaf, key, tensor in self.updater.state())


class Trainer:
    """Trains `model` in place under `regime` and reports each step to `observer`.

    The attribute `model` is the rewritten model (wrapped by peft for LoRA, cast, checkpointed).
    Raises: ImpossibleHere, if the device cannot do what the regime needs.
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
        # 1. the storage type: adapters and leaves have to be made in the type they train in
        model = regime.weights.prepare(model)
        # 2. the device, so that nothing below is made twice; a model that will be sharded stays on
        #    the host until then
        model = regime.place.move(model, self.device)
        # 3. adapters, which wrap modules, so before anything that looks modules up
        model = regime.trains.prepare(model, seed)
        # 4. approximators of the adapters' gradients, which are made for the adapters
        model = regime.grads.prepare(model, seed)
        # 5. checkpointing, which wraps blocks with their adapters, and the head, which is no block
        self.model = regime.head.prepare(regime.acts.prepare(model), self.observer)
        # 6. sharding, which replaces parameters and gathers them around a block and all that wraps
        #    it; it needs whole parameters, before leaves are cut out of them
        self._weights = regime.place.shard(self.model, self.device, regime.weights, self.observer)
        # 7. last, the leaves are cut out of the finished network; nothing else requires a gradient
        self.parts: list[Part] = regime.trains.parts(self.model)
        self.model.requires_grad_(False)
        self._turns: dict[int, _Turn] = {}
        self._active: tuple[int, ...] = ()
        self.observer.own("weights", self.model.named_parameters())
        self.observer.own("buffers", self.model.named_buffers())

    def step(self, batches: Sequence[Batch], shares: Sequence[float] | None = None) -> Tensor:
        """One update from `regime.accumulate` micro-batches. Returns the loss: the mean over all
        their labelled tokens, a detached 0-d tensor on the device. The caller synchronizes by
        reading it.

        `shares` are the micro-batches' shares of those tokens. Without them labels are counted and
        checked, which waits for labels that are on the device. With them no label is read, and a
        fused head trains on a label outside the vocabulary without an error. A micro-batch without
        a label contributes nothing. Each rank gives its own micro-batches, of the same number;
        tokens and loss are then those of all ranks together.

        Raises: ValueError, before any weight changes, if the number of micro-batches is not
        `regime.accumulate`, one has no `labels`, a label is outside the vocabulary, or no token of
        the step is labelled.
        """
        if len(batches) != self.regime.accumulate:
            raise ValueError(
                f"{len(batches)} micro-batches for accumulate: {self.regime.accumulate}: "
                f"give step() exactly {self.regime.accumulate}"
            )
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError(
                    f"a micro-batch of step {self.steps_done} has no labels, only"
                    f" {', '.join(sorted(batch))}: a batch needs labels, the input_ids with -100"
                    " where nothing is to be learned"
                )
        shares = self._shares(batches) if shares is None else shares
        self.observer.begin_step(self.steps_done)
        self._take_turns()
        self.model.train(bool(self.parts))
        # all ranks gather together, so each also runs a micro-batch without labels: with made-up
        # labels, at a share of 0
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
                            # one backward forms the gradients of all active parts
                            updater = self._active_turns()[0].updater
                            with self.observer.phase("backward"):
                                updater.take(loss if share == 1.0 else loss * share)
                        del loss
        if self.parts:
            with self.observer.phase("update"):
                self._update()
        self.observer.end_step()
        self.steps_done += 1
        return self.regime.place.mean(total)

    def check(self, loss: Tensor) -> float:
        """Returns the loss of the last step as a number, which waits for the device, and reads each
        weight that the step trained once: a gradient that is not finite shows in the weights, not
        in the loss. It does not show if `clip_value` cut it or `loss_scale` left its step out. All
        ranks come to the same result.

        Raises: Diverged, if the loss or a weight is not finite.
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
        """Each micro-batch's share of the tokens that the loss counts. With them the sum of the
        gradients is the large batch's gradient, and so is its mean over ranks. Raises: ValueError.
        """
        counts = count_labels(
            batches, self.regime.trains.predicted, self.model.config.vocab_size, self.steps_done
        )
        total = self._mean_of_ranks(sum(counts))
        if not total:
            raise ValueError(
                f"no token of step {self.steps_done} is labelled, in none of its {len(batches)}"
                " micro-batches: every label is -100, or the first of its document, which nothing"
                " predicts: leave such a step out, or put its rows together with labelled ones"
            )
        return [count / total for count in counts]

    def _mean_of_ranks(self, number: float) -> float:
        if self.regime.place.ranks == 1:
            return number
        value = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        return float(self.regime.place.mean(value))

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
        """How often a step runs each micro-batch."""
        return max((turn.updater.runs for turn in self._active_turns()), default=1)

    @contextmanager
    def _run(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for turn in self._active_turns():
                stack.enter_context(turn.updater.run(number))
            yield

    @property
    def active(self) -> dict[str, nn.Parameter]:
        """The leaves that train in this step, by name; some rows of a matrix are called
        `weight[start:stop]`."""
        return {
            name: leaf for turn in self._active_turns() for name, leaf in turn.leaves.named.items()
        }

    def lr(self, step: int) -> float:
        return self.schedule.at(self.regime.trains.lr_step(step, len(self.parts)))

    def _take_turns(self) -> None:
        """Activate the parts whose turn it is and set the learning rate. A part that stays active
        keeps its state."""
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
        # the observer's hooks first: an updater inside backward drops the gradient
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
            leaves.switch_on(updater.row_receiver)
        else:
            turn.leaves.switch_on(turn.updater.row_receiver)
            if self.regime.trains.state == "host":
                turn.updater.move_state(self.observer, "device")
                self.observer.own("optimizer", turn.state())

    def _rest(self, indices: set[int]) -> None:
        """Put the parts `indices` to rest. Disarms all parts, so that the observer's hooks can come
        first again."""
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
        """Everything that another trainer of the same regime and model needs to go on exactly here.
        As in torch, the tensors are the trainer's own: save or copy them before the next step. Not
        included: probes, the last step's gradient norm and the loss scale of `until: backward`,
        which start anew."""
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
        """Go on from a `state_dict`, whose tensors are copied. Raises: ValueError, if this trainer
        has taken steps already."""
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
        """Bytes of optimizer state that exist now, on the device and on the host."""
        return sum(tensor.nbytes for turn in self._turns.values() for _, tensor in turn.state())

    def probes(self) -> list[dict]:
        """The probes of approximated gradients so far: one row for each step and site."""
        return [row for turn in self._turns.values() for row in turn.updater.probes()]

    def trainable_parameters(self) -> int:
        """How many numbers of the model some part trains, each counted once."""
        params = dict(self.model.named_parameters())
        return sum(leaf.numel(params[leaf.name]) for part in self.parts for leaf in part)

    def finish(self) -> nn.Module:
        """Put the active parts to rest and return the trained model, ready to be scored."""
        self._rest(set(self._active))
        self._active = ()
        return self.model.eval()
