"""Structured gradient approximation, construction B: a residual network's gradients guessed from
its head's.

LoRA on the matrices that write to the residual stream (o_proj and down_proj), A frozen. The update
of a B needs the gradient d_l of the stream after that writer, and A x of each token:

    dB_l = s d_l^T (A x_l)          (H, r) = (tokens, H)^T (tokens, r), s = alpha / r

So the backbone runs forward with no graph and keeps r numbers for each token and writer (LoRA-FA:
Zhang 2023, arXiv:2308.03303). Norm and head are differentiated for d_L, the gradient of the
stream's end, exactly; the rest are guessed:

    learned     d_l = d_L + sigma G_l(LN(h_l), d_L / sigma),  sigma = rms(d_L)
    identity    d_l = d_L: what a residual stream passes on by itself. G = 0
    random      d_l = R_l d_L, R_l fixed and random: direct feedback alignment, Nokland 2016,
                arXiv:1609.01596

G_l (Zhu 2024's light module, its depth free) reads k numbers of each and starts at zero; it costs k
more kept numbers. Every `every` steps is an anchor: a true backward, whose gradient that step uses,
and from whose d_l G learns by regression. The guesses are biased: NOT an unbiased estimate, and a
fixed point of it need not be one of the loss. Synthetic gradients: Jaderberg 2017,
arXiv:1608.05343. The seed paper gives neither sites nor targets of G; this is one reading of it.

Shapes: b batch, t tokens, H hidden, r rank of the adapters, k rank of G. d, h (b, t, H); A x (b, t,
r).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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
from .probes import Direction, Probes, ProbingUpdater

WRITERS = ("o_proj", "down_proj")
GUESS = "feedback"
"""The name in the model of the module that guesses."""


@dataclass(frozen=True)
class Writers(Lora):
    """LoRA on the writers of the residual stream, B trained and A frozen (LoRA-FA), so that r
    numbers a token are kept for it instead of the writer's input; and, with `grads: predicted`, the
    module that guesses their gradients."""

    targets: tuple[str, ...] = WRITERS  # type: ignore[assignment]  # `forbidden` checks them

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
    as described at the top of this module."""

    by: Literal["learned", "identity", "random"] = "learned"
    """The guess: learned (G), identity (G = 0) or random."""
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

    @property
    def cycle(self) -> int:
        return math.lcm(*(count for count in (self.every, self.probe) if count))

    def with_short_cycle(self) -> Predicted:
        return dataclasses.replace(self, every=min(self.every, 2), probe=min(self.probe, 2))

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        weights = [site.weight for site in sites(model)]
        with torch.random.fork_rng(), weights[0].device:
            torch.manual_seed(seed)
            guess = GUESSES[self.by](len(weights), len(weights[0]), self.rank, self.depth)
            model.add_module(GUESS, guess.to(weights[0].dtype))
        return model

    def updater(
        self,
        place: Any,
        until: Any,
        rule: Any,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        lr: float,
        observer: Observer,
    ) -> Updater:
        inner = super().updater(place, until, rule, model, named, lr, observer)
        return PredictedUpdater(self, model, inner, observer)


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
    """The writers that have an adapter, from the embeddings up; the stream after the last one is
    the end."""
    stack = decoder(model)
    following = [*(block.input_layernorm for block in stack.layers[1:]), stack.norm]
    return [
        Site(f"layers.{index}.{name}", writer, reader)
        for index, (block, next_norm) in enumerate(zip(stack.layers, following, strict=True))
        for name, writer, reader in (
            ("self_attn.o_proj", block.self_attn.o_proj, block.post_attention_layernorm),
            ("mlp.down_proj", block.mlp.down_proj, next_norm),
        )
        if hasattr(writer, "lora_B")
    ]


@dataclass
class _Forward:
    """What one forward and backward left for the guesses, by the number of the site. `stream` and
    `true` are filled at anchors only."""

    codes: dict[int, Tensor] = field(default_factory=dict)
    """A x (b, t, r)"""
    features: dict[int, Tensor] = field(default_factory=dict)
    """what G keeps of the stream (b, t, k)"""
    stream: dict[int, Tensor] = field(default_factory=dict)
    """h_l (n, H), of the tokens that G learns from"""
    true: dict[int, Tensor] = field(default_factory=dict)
    """d_l (n, H), of the same tokens"""
    end: Any = None
    """d_L (b, t, H)"""


class PredictedUpdater(ProbingUpdater):
    """Forms the gradients of the B, guessed or, at anchors, true; and those of G. Updates as
    `inner` does."""

    def __init__(self, options: Predicted, model: nn.Module, inner: Updater, observer: Observer):
        super().__init__(options, model, inner, observer)
        self.norm, self.sites = decoder(model).norm, sites(model)
        self.guess, self._probes = getattr(model, GUESS), Probes()

    def begin(self, step: int, lr: float) -> None:
        super().begin(step, lr)
        self.is_anchor = _is_due(step, self.options.every)
        self.forms_truth = self.is_anchor or _is_due(step, self.options.probe)
        self._guessed, self._true = dict[str, Tensor](), dict[str, Tensor]()

    @contextmanager
    def run(self, number: int) -> Iterator[None]:
        # a probe's true gradients must not add to the guesses of earlier micro-batches, which stay
        # in `_guessed` meanwhile
        if self.forms_truth and not self.is_anchor:
            for site in self.sites:
                site.weight.grad = None
        with self.recorded() if self.forms_truth and self.options.drop else nullcontext():
            with self._watched() as forward:
                yield
            with self.observer.phase("backward"), torch.no_grad():
                self._add_gradients(forward)
                if self.is_anchor:
                    self._learn(forward)
            if self.forms_truth:
                self._probe()
        if not self.is_anchor:
            for site in self.sites:
                site.weight.grad = self._guessed[site.name]
            self.observer.own("gradients", self._guessed.items())

    @contextmanager
    def _watched(self) -> Iterator[_Forward]:
        """Around one forward and backward: hooks that catch what guesses need. Unless the step
        forms the true gradient, the graph ends below the final norm."""
        forward = _Forward()
        with ExitStack() as stack:
            for index, site in enumerate(self.sites):
                for handle in self._hooks(index, site, forward):
                    stack.callback(handle.remove)
                if not self.forms_truth:
                    stack.callback(site.weight.requires_grad_(False).requires_grad_, True)
            end = self.norm.register_forward_pre_hook(_end_hook(forward, self.forms_truth))
            stack.callback(end.remove)
            yield forward
        if not self.forms_truth:
            forward.end = forward.end.grad

    def _hooks(self, index: int, site: Site, forward: _Forward) -> tuple:
        teaches = self.is_anchor and self.options.by == "learned"

        def keep_code(_, __, code: Tensor) -> None:
            if not recomputing:
                forward.codes[index] = code.detach()

        def keep_gradient(_, __, written: Tensor) -> None:
            if teaches and not recomputing:
                written.register_hook(lambda d: forward.true.__setitem__(index, self._sample(d)))

        @torch.no_grad()
        def keep_stream(_, args) -> None:
            if not recomputing and index < len(self.sites) - 1:
                forward.features[index] = self.guess.read(index, args[0])
                if teaches:
                    forward.stream[index] = self._sample(args[0].detach())

        return (
            site.writer.lora_A["default"].register_forward_hook(keep_code),
            site.writer.register_forward_hook(keep_gradient),
            site.reader.register_forward_pre_hook(keep_stream),
        )

    def _sample(self, tensor: Tensor) -> Tensor:
        """Every n-th token (n, H), from another one on at each anchor."""
        flat = tensor.flatten(0, -2)
        stride = -(-len(flat) // self.options.tokens)
        return flat[self.step // self.options.every % stride :: stride].contiguous()

    def _add_gradients(self, forward: _Forward) -> None:
        """Adds each site's guessed gradient of this micro-batch to `_guessed`, and its true one to
        `_true` where the update does not use it."""
        last = len(self.sites) - 1
        for index, site in enumerate(self.sites):
            d = (
                forward.end
                if index == last
                else self.guess(index, forward.features.pop(index), forward.end)
            )
            code = forward.codes.pop(index)
            gradient = (d.to(code.dtype) * site.writer.scaling["default"]).flatten(
                0, -2
            ).mT @ code.flatten(0, -2)
            _add(self._guessed, site.name, gradient.to(site.weight.dtype))
            if self.forms_truth and not self.is_anchor:
                _add(self._true, site.name, site.weight.grad)

    def _learn(self, forward: _Forward) -> None:
        """Regression of G on the true gradients below the end, site by site."""
        end = forward.true.get(len(self.sites) - 1)
        for index in list(forward.stream):
            with torch.enable_grad():
                self.guess.loss(
                    index, forward.stream.pop(index), end, forward.true.pop(index)
                ).backward()

    @torch.no_grad()
    def _probe(self) -> None:
        true = self._true or {site.name: site.weight.grad for site in self.sites}
        self._probes.add(self.step, self._guessed, true, self.drop_ratio(self._guessed, true))

    def loss_after(self, change: Direction) -> Tensor:
        kept = [site.weight.clone() for site in self.sites]
        for site in self.sites if change else ():
            site.weight.sub_(change[site.name])
        loss = self.repeated_loss()
        for site, weight in zip(self.sites, kept, strict=True):
            site.weight.copy_(weight)
        return loss

    def probes(self) -> list[dict]:
        return self._probes.rows()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    sums[name] = sums[name] + tensor if name in sums else tensor


def _end_hook(forward: _Forward, forms_truth: bool):
    """Runs before the final norm. With the true gradient the graph goes on below, and d_L is kept
    as it passes; without, the graph ends here, in a leaf whose gradient will be d_L."""

    def hook(_, args) -> tuple[Tensor]:
        if forms_truth:
            args[0].register_hook(lambda d: setattr(forward, "end", d))
            return args
        forward.end = args[0].detach().requires_grad_()
        return (forward.end,)

    return hook
