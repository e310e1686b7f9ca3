"""How a base model is trained: every number that decides its weights, and the hash of all of
them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ...baichuan import ModelSpec
from ..generator import GeneratorConfig


@dataclass(frozen=True)
class Recipe:
    """Steps of each stage, their learning rates and batch sizes. Every field is in the hash."""

    copy_steps: int = 900
    """At most; the stage ends when copying is learned, which happens suddenly after 250 to 350
    steps."""
    copy_until: float = 0.12
    """Mean loss of twenty steps below which copying counts as learned."""
    copy_lr: float = 4e-3
    drill_batch: int = 32
    echo_steps: int = 300
    invented_steps: int = 300
    general_steps: int = 4400
    lr: float = 3e-3
    answer_weight: float = 1.0
    """With less than 1 for answers and agreement, training stops in the middle of learning to judge
    claims, which comes last: the result then depends on the seed and the CPU."""
    agrees_weight: float = 1.0
    average_steps: int = 400
    """The base is the mean of the weights after each of this many last steps of the last stage; 0
    takes the last weights alone."""
    embedding_std: float = 0.4
    """Width of the initial embeddings: Adam moves every weight by its learning rate, so narrow ones
    would change too much per step for attention to learn to find a token again."""
    batch: int = 16
    seed: int = 0
    documents: int = 16000
    held_out: tuple[int, int] = (500, 1000)
    """General items, of documents outside its training, that choose its thresholds and that it is
    scored on."""

    @staticmethod
    def named(name: str) -> Recipe:
        """`standard`; `reading`, which continues it; or `smoke`, a few steps of each stage for
        tests, whose model has learned nothing."""
        known = {
            "standard": Recipe(),
            "reading": Reading(),
            "smoke": Recipe(
                copy_steps=2,
                echo_steps=2,
                invented_steps=2,
                general_steps=2,
                batch=4,
                drill_batch=4,
                documents=40,
                answer_weight=0.4,
                agrees_weight=0.3,
                average_steps=0,
                held_out=(20, 40),
            ),
        }
        if name not in known:
            raise ValueError(f"no recipe {name!r}: there are {', '.join(known)}, and none")
        return known[name]

    def hash(self, spec: ModelSpec) -> str:
        """The identity of the base that this recipe makes of `spec`."""
        content = {
            "recipe": asdict(self),
            "model": spec.fingerprint(),
            "generator": GeneratorConfig().hash(),
            "version": 4,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reading(Recipe):
    """Continues `standard` with questions on general passages, for fine-tuning on questions of
    another domain. Short passages come first, then several lengths, with as many tokens in a
    batch."""

    lr: float = 1.5e-3
    question_steps: int = 400
    length_steps: int = 240
    records: tuple[int, ...] = (2, 5, 8)
    """Records per passage, in turn. 8 make a sequence of about 260 tokens; the model never sees
    longer ones."""
