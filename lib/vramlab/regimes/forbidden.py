"""The prohibitions: values of different axes, or fields of one value, that are meaningless
together, each with its reason and the way out. `fields` checks what a single field may hold.

A new value of an axis adds its prohibitions here. Each has an example, a row that nothing else
forbids, which the tests try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .acts import Checkpoint, Selective
from .grads.exact import Exact
from .grads.predicted import WRITERS, Predicted, Writers
from .grads.update_head import Amortised, UpdateHead
from .grads.zeroth_order import ZerothOrder
from .head.head import Fused
from .place.host import HostEmbed, HostState
from .place.place import Fsdp
from .place.stream import HostWeights
from .rule.rules import AdamMini, NoRule, Sgd
from .trains.adapters import Lora, Prefix, Prompt, SplitLora
from .trains.parts import Chunks, Norms, Nothing
from .until.until import Backward
from .weights.storage import Master, Nearest
from .weights.types import Fp16, Nf4


class Prohibition(NamedTuple):
    """A combination of values that no `Regime` may have."""

    excludes: Callable[[Any], bool]
    """Whether a `Regime` has the combination."""
    reason: str
    example: Mapping
    """A row that only this prohibition forbids."""


NOTHING = {"trains": "none", "rule": "none"}
GUESSED = {"grads": "zeroth_order", "rule": "sgd"}


def _is(axis: str, *kinds: type) -> Callable[[Any], bool]:
    return lambda regime: isinstance(getattr(regime, axis), kinds)


_nothing, _no_rule, _in_backward = (
    _is("trains", Nothing),
    _is("rule", NoRule),
    _is("until", Backward),
)
_fsdp, _streamed, _hosted = (
    _is("place", Fsdp),
    _is("place", HostWeights),
    _is("place", HostState, HostEmbed, HostWeights),
)
_guessed, _predicted, _amortised = (
    _is("grads", ZerothOrder),
    _is("grads", Predicted),
    _is("grads", Amortised),
)
_packed, _half, _update_head = _is("weights", Nf4), _is("weights", Fp16), _is("trains", UpdateHead)


ILLEGAL: list[Prohibition] = [
    Prohibition(
        lambda r: (
            getattr(r.trains, "sample", 0) > 0
            and (r.trains.order != "random" or r.trains.delayed_lr)
        ),
        "trains.blocks.sample draws blocks, which then have no order and no cycle: use order:"
        " random and delayed_lr: false, or sample: 0",
        {"trains": {"blocks": {"sample": 2, "order": "ascending"}}},
    ),
    Prohibition(
        lambda r: getattr(r.trains, "norm", "head") == "own" and r.trains.ends != "units",
        "trains.blocks.norm is own, and the norm is a unit only where embeddings and head are: use"
        " ends: units, or norm: head",
        {"trains": {"blocks": {"norm": "own"}}},
    ),
    Prohibition(
        lambda r: isinstance(r.trains, Writers) and set(r.trains.targets) != set(WRITERS),
        "trains.writers are the two matrices that write to the residual stream, and targets names"
        " others: leave it out, or use trains: lora",
        {"trains": {"writers": {"targets": ["W_pack"]}}},
    ),
    Prohibition(
        lambda r: _predicted(r) and r.grads.by == "learned" and not r.grads.every,
        "grads.predicted.every is 0, but a learned approximator learns only at anchors: use every:"
        " 8, or by: identity",
        {"trains": "writers", "grads": {"predicted": {"every": 0}}},
    ),
    Prohibition(
        lambda r: _in_backward(r) and r.until.clip_norm > 0 and r.until.clip_value > 0,
        "until.backward has clip_norm and clip_value, and one would clip again what the other has"
        " clipped: use one of them",
        {"until": {"backward": {"clip_norm": 1.0, "clip_value": 1.0}}},
    ),
    Prohibition(
        lambda r: (
            _in_backward(r)
            and r.until.loss_scale > 0
            and not (r.until.clip_norm > 0 and r.until.norm == "this")
        ),
        "until.backward.loss_scale needs the norm of this step, because only that shows an overflow"
        " before half of it is applied: use clip_norm, with norm: this, or loss_scale: 0",
        {"until": {"backward": {"loss_scale": 8.0}}, "rule": "sgd"},
    ),
    Prohibition(
        lambda r: _nothing(r) and not _no_rule(r),
        "nothing trains, so there is nothing to update: use rule: none",
        {"trains": "none"},
    ),
    Prohibition(
        lambda r: _no_rule(r) and not _nothing(r),
        "weights train, but rule is none: use rule: adamw or sgd, or trains: none",
        {"rule": "none"},
    ),
    Prohibition(
        lambda r: _nothing(r) and _in_backward(r),
        "nothing trains, so there is no backward: use until: step",
        {**NOTHING, "until": "backward"},
    ),
    Prohibition(
        lambda r: _nothing(r) and r.values["acts"] != "keep",
        "nothing trains, so forward keeps nothing: use acts: keep",
        {**NOTHING, "acts": "offload"},
    ),
    Prohibition(
        lambda r: _nothing(r) and (r.accumulate > 1 or r.clip > 0),
        "nothing trains, so there is no gradient to accumulate or clip: use accumulate: 1 and"
        " clip: 0",
        {**NOTHING, "clip": 1.0},
    ),
    Prohibition(
        lambda r: _in_backward(r) and r.accumulate > 1,
        "until: backward updates at every micro-batch, so accumulate would change the result: use"
        " until: step, or a larger batch",
        {"until": "backward", "accumulate": 2},
    ),
    Prohibition(
        lambda r: _in_backward(r) and r.clip > 0,
        "until: backward drops each gradient before the norm of all is known: use until: {backward:"
        " {clip_norm: ...}}, which runs backward twice, or until: step, or clip: 0",
        {"until": "backward", "clip": 1.0},
    ),
    Prohibition(
        lambda r: _fsdp(r) and hasattr(r.trains, "interval"),
        "place: fsdp cuts every weight between ranks, and decides once how its gradient is reduced,"
        " so parts cannot take turns: use trains: all or lora, or place: device",
        {"place": "fsdp", "trains": "blocks"},
    ),
    Prohibition(
        lambda r: (
            type(r.weights.storage) is not Nearest and not r.rule.row_wise and not _no_rule(r)
        ),
        "this rule writes weights itself, and rounds them to nearest: use weights: bf16, or a rule"
        " that updates rows in fp32, as rule: adamw does",
        {"weights": "master", "rule": "galore"},
    ),
    Prohibition(
        lambda r: type(r.weights.storage) is not Nearest and _no_rule(r),
        "nothing is updated, so it does not matter how an update is stored: use weights: bf16",
        {**NOTHING, "weights": "master"},
    ),
    Prohibition(
        lambda r: _fsdp(r) and not r.rule.pieces,
        "this rule reads whole matrices or blocks of them, and place: fsdp cuts them between"
        " ranks: use rule: adamw or sgd, or place: device",
        {"place": "fsdp", "rule": "galore"},
    ),
    Prohibition(
        lambda r: isinstance(r.rule, AdamMini) and isinstance(r.trains, Chunks),
        "adam_mini has one second moment a head, and chunks cut heads: use trains: blocks, or rule:"
        " adamw",
        {"rule": "adam_mini", "trains": "chunks"},
    ),
    Prohibition(
        lambda r: _fsdp(r) and getattr(r.until, "clip_norm", 0) > 0,
        "until.backward.clip_norm measures only this rank's pieces, and place: fsdp cuts every"
        " gradient between ranks: use until: step and clip, or place: device",
        {"place": "fsdp", "until": {"backward": {"clip_norm": 1.0}}},
    ),
    Prohibition(
        lambda r: (
            _hosted(r) and _in_backward(r) and (r.until.clip_norm > 0 or r.until.clip_value > 0)
        ),
        "a place on the host sends each gradient down as backward forms it, and clips none: use"
        " until: step and clip, or place: device",
        {"place": "host_state", "until": {"backward": {"clip_norm": 1.0}}},
    ),
    Prohibition(
        lambda r: _half(r) and not isinstance(r.rule, Sgd) and not _no_rule(r),
        "a rule that remembers keeps squares of gradients in the weight's type, and weights: fp16"
        " has none below 6e-8: use rule: sgd, or weights: bf16",
        {"weights": "fp16"},
    ),
    Prohibition(
        lambda r: _half(r) and isinstance(r.head, Fused) and not _nothing(r),
        "head: fused rounds the logits' gradient before a loss scale reaches it, and in weights:"
        " fp16 most of it is then gone: use head: plain, or weights: bf16",
        {"weights": "fp16", "rule": "sgd", "head": "fused"},
    ),
    Prohibition(
        lambda r: (
            (_guessed(r) or getattr(r.until, "loss_scale", 0) > 0)
            and getattr(r.rule, "weight_decay", 0) > 0
        ),
        "grads: zeroth_order forms its own updates, and until.backward.loss_scale divides each"
        " step's lr, so weights would not decay as the rule has it: use weight_decay: 0",
        {**GUESSED, "rule": {"sgd": {"weight_decay": 0.1}}},
    ),
    Prohibition(
        lambda r: getattr(r.until, "loss_scale", 0) > 0 and not isinstance(r.rule, Sgd),
        "until.backward.loss_scale divides the step's lr, and only an update in proportion to its"
        " gradient takes that for a division of the gradient: use rule: sgd, or loss_scale: 0",
        {"until": {"backward": {"clip_norm": 1.0, "loss_scale": 8.0}}},
    ),
    Prohibition(
        lambda r: _fsdp(r) and _guessed(r),
        "grads: zeroth_order changes a weight while its module runs, and place: fsdp has gathered"
        " it before that: use place: device",
        {**GUESSED, "place": "fsdp"},
    ),
    Prohibition(
        lambda r: _guessed(r) and not (isinstance(r.rule, Sgd) or _no_rule(r)),
        "grads: zeroth_order never forms a gradient of which a rule could keep a moment: use"
        " rule: sgd, or grads: exact",
        {"grads": "zeroth_order"},
    ),
    Prohibition(
        lambda r: _guessed(r) and _nothing(r),
        "nothing trains, so there is no gradient to approximate: use grads: exact",
        {**NOTHING, "grads": "zeroth_order"},
    ),
    Prohibition(
        lambda r: _guessed(r) and _in_backward(r),
        "grads: zeroth_order has no backward to update in: use until: step",
        {**GUESSED, "until": "backward"},
    ),
    Prohibition(
        lambda r: _guessed(r) and not _nothing(r) and r.values["acts"] != "keep",
        "grads: zeroth_order has no backward, so forward keeps nothing: use acts: keep",
        {**GUESSED, "acts": "checkpoint"},
    ),
    Prohibition(
        lambda r: _guessed(r) and not _nothing(r) and r.clip > 0,
        "grads: zeroth_order has no gradient whose norm could be clipped: use clip: 0, or a"
        " lower lr",
        {**GUESSED, "clip": 1.0},
    ),
    Prohibition(
        lambda r: _guessed(r) and isinstance(r.weights.storage, Master) and not _nothing(r),
        "grads: zeroth_order changes the network's weights, and an fp32 master would not change"
        " with them: use weights: fp32 or bf16_sr",
        {**GUESSED, "weights": "master"},
    ),
    Prohibition(
        lambda r: _packed(r) and not isinstance(r.trains, Lora | Prompt | Norms | Nothing),
        "weights: nf4 and int8 are packed, and an update cannot move packed numbers: use trains:"
        " lora, split_lora, prompt, prefix or norms, or weights: bf16",
        {"weights": "nf4"},
    ),
    Prohibition(
        lambda r: _packed(r) and getattr(r.trains, "dora", False),
        "dora takes the norms of whole rows, and weights: nf4 and int8 are packed: use dora: false,"
        " or weights: bf16",
        {"weights": "nf4", "trains": {"lora": {"dora": True}}},
    ),
    Prohibition(
        lambda r: _packed(r) and _fsdp(r),
        "place: fsdp cuts weights between rows, and weights: nf4 and int8 are packed: use place:"
        " device, or weights: bf16",
        {"weights": "nf4", "trains": "lora", "place": "fsdp"},
    ),
    Prohibition(
        lambda r: isinstance(r.trains, Prefix) and isinstance(r.acts, Checkpoint | Selective),
        "trains: prefix goes through the key-value cache, to which a checkpointed block, formed"
        " again, would add its tokens twice (peft refuses it too): use acts: keep or offload, or"
        " trains: prompt",
        {"trains": "prefix", "acts": "checkpoint"},
    ),
    Prohibition(
        lambda r: isinstance(r.trains, SplitLora) and _fsdp(r),
        "trains: split_lora is two machines with one part each, and place: fsdp cuts every part:"
        " use place: device, or trains: lora",
        {"trains": "split_lora", "place": "fsdp"},
    ),
    Prohibition(
        lambda r: _predicted(r) and not isinstance(r.trains, Writers),
        "grads: predicted guesses the gradient of the residual stream, which is all that its"
        " writers' adapters need and no other weight's: use trains: writers, or grads: exact",
        {"grads": "predicted"},
    ),
    Prohibition(
        lambda r: (_predicted(r) or _amortised(r)) and _in_backward(r),
        "approximated gradients and their probes belong to the weights at the start of a step, and"
        " until: backward changes weights during the step: use until: step, or grads: exact",
        {"grads": "predicted", "trains": "writers", "until": "backward"},
    ),
    Prohibition(
        lambda r: _predicted(r) and r.grads.by == "learned" and r.clip > 0,
        "clip would take one norm of two losses' gradients, the task's and the approximator's: use"
        " clip: 0, or by: identity",
        {"grads": "predicted", "trains": "writers", "clip": 1.0},
    ),
    Prohibition(
        lambda r: _predicted(r) and isinstance(r.acts, Selective),
        "grads: predicted forms products in forward that it does not form again, and selective"
        " checkpointing hands back products by their order: use acts: checkpoint",
        {"grads": "predicted", "trains": "writers", "acts": "selective"},
    ),
    Prohibition(
        lambda r: (
            _predicted(r) and not (r.grads.every or r.grads.probe) and r.values["acts"] != "keep"
        ),
        "grads: predicted with no anchor and no probe never goes back through the blocks, so"
        " forward keeps nothing of them: use acts: keep, or every: 8",
        {
            "grads": {"predicted": {"by": "identity", "every": 0}},
            "trains": "writers",
            "acts": "checkpoint",
        },
    ),
    Prohibition(
        lambda r: _update_head(r) and not _guessed(r) and r.values["acts"] != "keep",
        "trains: update_head freezes every block, so forward keeps nothing of them: use acts: keep",
        {"trains": "update_head", "acts": "checkpoint"},
    ),
    Prohibition(
        lambda r: _amortised(r) and not _update_head(r),
        "grads: amortised measures the approximator of an update head: use trains: update_head, or"
        " grads: exact",
        {"grads": "amortised"},
    ),
    Prohibition(
        lambda r: (_predicted(r) or _amortised(r)) and _fsdp(r),
        "place: fsdp reduces a gradient where backward has formed it, and an approximated gradient"
        " or a probe is formed elsewhere: use place: device, or grads: exact",
        {"grads": "predicted", "trains": "writers", "place": "fsdp"},
    ),
    Prohibition(
        lambda r: _nothing(r) and isinstance(r.place, HostState),
        "nothing trains, so there is no optimizer's state to keep on the host: use place: device or"
        " host_embed",
        {**NOTHING, "place": "host_state"},
    ),
    Prohibition(
        lambda r: (
            _streamed(r)
            and not _nothing(r)
            and not (isinstance(r.acts, Checkpoint) and r.acts.every == 1)
        ),
        "place: host_weights drops a block's weights after its forward, and only forming the block"
        " again brings them back: use acts: checkpoint, of every block, or place: host_state",
        {"place": "host_weights", "acts": {"checkpoint": {"every": 2}}},
    ),
    Prohibition(
        lambda r: _streamed(r) and r.values["trains"] not in ("all", "none", "lora", "blocks"),
        "place: host_weights brings up whole weights of plain modules, not rows that train alone or"
        " modules that read the weights of others: use trains: all, blocks or lora, or place:"
        " host_embed",
        {"place": "host_weights", "acts": "checkpoint", "trains": "chunks"},
    ),
    Prohibition(
        lambda r: _hosted(r) and type(r.grads) is not Exact,
        "a place on the host takes each gradient as backward forms it, and these grads form it"
        " elsewhere: use grads: exact, or place: device",
        {**GUESSED, "place": "host_state"},
    ),
    Prohibition(
        lambda r: (
            getattr(r.trains, "ends", "") == "always"
            and (getattr(r.until, "clip_norm", 0) > 0 or type(r.grads) is not Exact)
        ),
        "with ends: always two parts are active together, and clip_norm or approximated gradients"
        " would treat each of them alone: use ends: units, or clip and until: step",
        {"trains": {"blocks": {"ends": "always"}}, "until": {"backward": {"clip_norm": 1.0}}},
    ),
]
"""All prohibitions that apply to a row are reported together."""
