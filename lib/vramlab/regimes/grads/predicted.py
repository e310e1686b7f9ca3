"""Structured gradient approximation, construction B: a residual network's gradients guessed from
its head's.

LoRA on the matrices that write to the residual stream (o_proj and down_proj), A frozen. What the
update of a B needs is the gradient d_l of the stream after that writer and the A x of each token:

    dB_l = s d_l^T (A x_l)          (H, r) = (tokens, H)^T (tokens, r), s = alpha / r

So the backbone runs forward with no graph, keeping r numbers a token and writer (LoRA-FA: Zhang
2023, arXiv:2308.03303). Norm and head are differentiated for d_L, the gradient of the stream's end,
exactly; the rest are guessed:

    learned     d_l = d_L + sigma G_l(LN(h_l), d_L / sigma),  sigma = rms(d_L)
    identity    d_l = d_L: what a residual stream passes on by its own. G = 0
    random      d_l = R_l d_L, R_l fixed and random: direct feedback alignment, Nokland 2016,
                arXiv:1609.01596

G_l (Zhu 2024's light module, its depth free) reads k numbers of each and starts at zero; it costs k
kept numbers more. Every `every` steps is an anchor: a true backward, whose gradient that step uses,
and whose d_l G learns by regression. The guesses are biased: NOT an unbiased estimate, and a fixed
point of it need not be one of the loss. Synthetic gradients: Jaderberg 2017, arXiv:1608.05343. The
seed paper gives neither sites nor targets of G; this is one reading of it.

Shapes: b batch, t tokens, H hidden, r rank of the adapters, k rank of G. d, h (b, t, H); A x (b, t,
r).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...baichuan.model import decoder
from ...observer import Observer, recomputing
from ..fields import Count, CountOrNone, Range, Width
from ..trains.adapters import Lora
from ..trains.leaves import Leaf
from ..trains.parts import Part
from ..until.until import Updater
from .approximators import GUESSES
from .exact import Exact
from .probes import Again, Probes, drop_ratio

WRITERS = ("o_proj", "down_proj")
GUESS = "feedback"
"""The name in the model of what guesses."""


@dataclass(frozen=True)
class Writers(Lora):
    """LoRA on the writers of the residual stream, B trained and A frozen (LoRA-FA), so that r
    numbers a token are kept for it instead of the writer's input; and, with `grads: predicted`,
    what guesses their gradients."""

    targets: tuple[str, ...] = WRITERS

    def parts(self, model: nn.Module) -> list[Part]:
        return [
            tuple(
                Leaf(name, 0, len(param), len(param))
                for name, param in model.named_parameters()
                if ".lora_B." in name or name.startswith(f"{GUESS}.")
            )
        ]


@dataclass(frozen=True)
class Predicted(Exact):
    """Only the head is differentiated; below it gradients are guessed, except at anchors. Zhu 2024,
    as in `feedback`."""

    by: Literal["learned", "identity", "random"] = "learned"
    """What guesses: learned (G), identity (G = 0) or random."""
    every: CountOrNone = 8
    """Steps from anchor to anchor, the first step being one; 1 is every step, 0 is never."""
    depth: Annotated[int, Range(1, 100)] = 1
    """Layers of G, of which all but the first follow a nonlinearity."""
    rank: Width = 16
    """k, the width of G."""
    tokens: Count = 256
    """Most tokens of an anchor's micro-batch that G learns from, evenly spaced: the rest of their
    gradients is not kept."""
    probe: CountOrNone = 0
    """Steps between true backwards for measurement alone, which the update does not use; 0 leaves
    it to the anchors."""
    drop: bool = False
    """Whether a probe also measures how far the loss falls along the guess: three forwards more."""

    def anchor(self, step: int) -> bool:
        """Whether the step uses the true gradient."""
        return bool(self.every) and step % self.every == 0

    def truth(self, step: int) -> bool:
        """Whether the step forms the true gradient."""
        return self.anchor(step) or (bool(self.probe) and step % self.probe == 0)

    @property
    def cycle(self) -> int:
        return math.lcm(*(count for count in (self.every, self.probe) if count))

    def hurried(self) -> Predicted:
        return dataclasses.replace(self, every=min(self.every, 2), probe=min(self.probe, 2))

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        found = sites(model)
        like = found[0].weight
        with torch.random.fork_rng(), like.device:
            torch.manual_seed(seed)
            model.add_module(
                GUESS,
                GUESSES[self.by](len(found), like.shape[0], self.rank, self.depth).to(like.dtype),
            )
        return model

    def updater(
        self,
        place,
        until,
        rule,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        lr: float,
        observer: Observer,
    ) -> Feedback:
        return Feedback(
            self, model, super().updater(place, until, rule, model, named, lr, observer), observer
        )


@dataclass(frozen=True)
class Site:
    """A writer with its adapter, and the norm that reads the stream after it."""

    name: str
    writer: nn.Module
    reader: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """B (H, r)."""
        return self.writer.lora_B["default"].weight


def sites(model: nn.Module) -> list[Site]:
    """From the embeddings up; the last one's stream is the end."""
    stack = decoder(model)
    ends = [*(block.input_layernorm for block in stack.layers[1:]), stack.norm]
    found = []
    for index, (block, end) in enumerate(zip(stack.layers, ends, strict=True)):
        found += [
            Site(
                f"layers.{index}.self_attn.o_proj",
                block.self_attn.o_proj,
                block.post_attention_layernorm,
            ),
            Site(f"layers.{index}.mlp.down_proj", block.mlp.down_proj, end),
        ]
    return [site for site in found if hasattr(site.writer, "lora_B")]


@dataclass
class _Seen:
    """What one forward left for the guesses, by the number of the site; `stream` and `true` only
    where the truth is formed."""

    codes: dict[int, Tensor] = field(default_factory=dict)
    """A x (b, t, r)"""
    read: dict[int, Tensor] = field(default_factory=dict)
    """what G keeps of the stream (b, t, k)"""
    stream: dict[int, Tensor] = field(default_factory=dict)
    """h_l (n, H), of the tokens G learns from"""
    true: dict[int, Tensor] = field(default_factory=dict)
    """d_l (n, H), of the same"""
    end: Tensor | None = None
    """d_L (b, t, H)"""


class Feedback(Updater):
    """Forms the gradients of the B, guessed or, at anchors, true; and those of G. Updates as
    `inner` does."""

    def __init__(self, value: Predicted, model: nn.Module, inner: Updater, observer: Observer):
        super().__init__(inner.optimizers)
        self.value, self.inner, self.norm = value, inner, decoder(model).norm
        self.guess, self.sites = getattr(model, GUESS), sites(model)
        self.observer, self.again, self._probes = observer, Again(model, observer), Probes()

    def begin(self, step: int, lr: float) -> None:
        self.inner.begin(step, lr)
        self.step, self.anchor, self.truth = step, self.value.anchor(step), self.value.truth(step)
        self._guessed, self._true = {}, {}

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        if (
            self.truth and not self.anchor
        ):  # what the other micro-batches have guessed is kept meanwhile
            for site in self.sites:
                site.weight.grad = None
        with self.again.watching() if self.truth and self.value.drop else nullcontext():
            with self._watched() as seen:
                yield
            with self.observer.phase("backward"), torch.no_grad():
                self._feed(seen)
                if self.anchor:
                    self._learn(seen)
            if self.truth:
                self._probe()
        if not self.anchor:
            for site in self.sites:
                site.weight.grad = self._guessed[site.name]
            self.observer.own("gradients", self._guessed.items())

    @contextmanager
    def _watched(self) -> Iterator[_Seen]:
        """Around one forward and backward: hooks that catch what guesses need; and, unless the
        truth is to be formed, an end of the graph below the final norm."""
        seen, frozen = _Seen(), [] if self.truth else [site.weight for site in self.sites]
        handles = [
            handle
            for index, site in enumerate(self.sites)
            for handle in self._hooks(index, site, seen)
        ]
        handles.append(self.norm.register_forward_pre_hook(_ended(seen, self.truth)))
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            yield seen
        finally:
            for weight in frozen:
                weight.requires_grad_(True)
            for handle in handles:
                handle.remove()
        if not self.truth:
            seen.end = seen.end.grad

    def _hooks(self, index: int, site: Site, seen: _Seen):
        teaches = self.anchor and self.value.by == "learned"

        def wrote(_, __, code: Tensor) -> None:
            if not recomputing:
                seen.codes[index] = code.detach()

        def added(_, __, written: Tensor) -> None:
            if teaches and not recomputing:
                written.register_hook(lambda d: seen.true.__setitem__(index, self._sample(d)))

        @torch.no_grad()
        def read(_, args) -> None:
            if not recomputing and index < len(self.sites) - 1:
                seen.read[index] = self.guess.read(index, args[0])
                if teaches:
                    seen.stream[index] = self._sample(args[0].detach())

        return (
            site.writer.lora_A["default"].register_forward_hook(wrote),
            site.writer.register_forward_hook(added),
            site.reader.register_forward_pre_hook(read),
        )

    def _sample(self, tensor: Tensor) -> Tensor:
        """Every n-th token (n, H), from another one on at each anchor."""
        flat = tensor.flatten(0, -2)
        stride = -(-len(flat) // self.value.tokens)
        return flat[self.step // self.value.every % stride :: stride].contiguous()

    def _feed(self, seen: _Seen) -> None:
        """Adds each site's guessed gradient of this micro-batch, and its true one where that is not
        in `.grad` to stay."""
        for index, site in enumerate(self.sites):
            d = (
                seen.end
                if index == len(self.sites) - 1
                else self.guess(index, seen.read.pop(index), seen.end)
            )
            code = seen.codes.pop(index)
            gradient = (d.to(code.dtype) * site.writer.scaling["default"]).flatten(
                0, -2
            ).mT @ code.flatten(0, -2)
            _add(self._guessed, site.name, gradient.to(site.weight.dtype))
            if self.truth and not self.anchor:
                _add(self._true, site.name, site.weight.grad)

    def _learn(self, seen: _Seen) -> None:
        """Regression of G on the true gradients below the end, site by site."""
        end = seen.true.get(len(self.sites) - 1)
        for index in list(seen.stream):
            with torch.enable_grad():
                self.guess.loss(index, seen.stream.pop(index), end, seen.true.pop(index)).backward()

    @torch.no_grad()
    def _probe(self) -> None:
        true = self._true or {site.name: site.weight.grad for site in self.sites}
        self._probes.add(
            self.step,
            self._guessed,
            true,
            drop_ratio(self._loss_after, self._guessed, true) if self.value.drop else None,
        )

    def _loss_after(self, change: Mapping[str, Tensor]) -> Tensor:
        kept = [site.weight.clone() for site in self.sites]
        for site in self.sites if change else ():
            site.weight.sub_(change[site.name])
        loss = self.again.loss()
        for site, weight in zip(self.sites, kept, strict=True):
            site.weight.copy_(weight)
        return loss

    def apply(self) -> None:
        self.inner.apply()

    def probes(self) -> list[dict]:
        return self._probes.rows()


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    sums[name] = sums[name] + tensor if name in sums else tensor


def _ended(seen: _Seen, truth: bool):
    """Before the final norm: with the truth the graph goes on below, and d_L is caught as it
    passes; without, it ends here, in a leaf that is kept for the d_L it will be given."""

    def hook(_, args) -> tuple[Tensor]:
        if truth:
            args[0].register_hook(lambda d: setattr(seen, "end", d))
            return args
        seen.end = args[0].detach().requires_grad_()
        return (seen.end,)

    return hook
