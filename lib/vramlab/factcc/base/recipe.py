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
    """How the base is made. Steps of each stage, their learning rates and batch sizes; everything
    is in the hash."""

    copy_steps: int = 900
    """At most; the stage ends when copying is learned, which happens all at once after 250 to 350
    steps."""
    copy_until: float = 0.12
    copy_lr: float = 4e-3
    drill_batch: int = 32
    echo_steps: int = 300
    invented_steps: int = 300
    general_steps: int = 4400
    lr: float = 3e-3
    answer_weight: float = 1.0
    """With less than 1 for answers and agreement, the judging of claims, which is learned last, is
    cut off half-way: what a base then reaches hangs on its seed and on the CPU."""
    agrees_weight: float = 1.0
    average_steps: int = 400
    """The base is the mean of the weights after each of the last stage's last so many steps; 0 is
    the last weights alone."""
    embedding_std: float = 0.4
    """Embeddings begin this wide: Adam moves every weight by its learning rate, and narrow ones
    would be new each step, too unsteady for attention to learn to find a token again."""
    batch: int = 16
    seed: int = 0
    documents: int = 16000
    held_out: tuple[int, int] = (500, 1000)
    """General items, of documents it never saw, that choose its thresholds and that it is scored
    on."""

    @staticmethod
    def named(name: str) -> Recipe:
        """`standard`; `reading`, which goes on from it; or `smoke`, a few steps of each stage, for
        tests: it knows nothing."""
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
        content = {
            "recipe": asdict(self),
            "model": spec.fingerprint(),
            "generator": GeneratorConfig().hash(),
            "version": 4,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reading(Recipe):
    """Goes on from `standard`: questions on general passages, for who fine-tunes on questions of
    another domain. First short passages, then those of several lengths, as many tokens a batch."""

    lr: float = 1.5e-3
    question_steps: int = 400
    length_steps: int = 240
    records: tuple[int, ...] = (2, 5, 8)
    """Of a passage, by turns. 8 make a sequence of some 260 tokens; longer ones stay unknown."""
