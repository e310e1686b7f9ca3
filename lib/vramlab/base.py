"""The base model: a small Baichuan-2 pre-trained once, here, by a recorded recipe, and kept by the hash of what made it.

Checking a claim against a document is looking things up, and a model from random weights does not find that out from
yes/no answers: the gradient of a balanced data set is zero to first order. So the recipe teaches copying first (random
tokens said twice), then to write true claims about general documents, then to answer yes or no about them. Only the
`general` domain is shown; news, law and medicine stay new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .baichuan import BaichuanForCausalLM, BaichuanTokenizer, ModelSpec
from .baichuan.tokenizer import train_tokenizer
from .factcc.generator import GeneratorConfig, generate_items
from .factcc.grammar import GRAMMARS
from .factcc.items import DOMAINS
from .factcc.prompt import training_batches
from .factcc.scoring import score_items
from .factcc.statistics import balanced_accuracy, choose_threshold
from .progress import bar
from .trainer import Schedule

FIRST_PIECE = 453
"""Ids below are control pieces and bytes."""


@dataclass(frozen=True)
class Recipe:
    """How the base is made. Steps of each stage, their learning rates and batch sizes; everything is in the hash."""

    drill_steps: int = 900
    """At most; the stage ends when copying is learned, which happens all at once after 250 to 350 steps."""
    drill_until: float = 0.12
    drill_lr: float = 4e-3
    drill_batch: int = 32
    write_steps: int = 250
    write_lr: float = 3e-3
    answer_steps: int = 250
    answer_lr: float = 3e-3
    embedding_std: float = 0.4
    """Embeddings begin this wide: Adam moves every weight by its learning rate, and narrow ones would be new each step,
    too unsteady for attention to learn to find a token again."""
    batch: int = 16
    seed: int = 0
    documents: int = 4000

    @staticmethod
    def named(name: str) -> Recipe:
        """`standard`, or `smoke`: a few steps of each stage, for tests; its model knows nothing."""
        known = {"standard": Recipe(),
                 "smoke": Recipe(drill_steps=2, write_steps=2, answer_steps=2, batch=4, drill_batch=4, documents=40)}
        if name not in known:
            raise ValueError(f"no recipe {name!r}: there are {', '.join(known)}")
        return known[name]

    def hash(self, spec: ModelSpec) -> str:
        content = {"recipe": asdict(self), "model": spec.fingerprint(), "generator": GeneratorConfig().hash(), "version": 1}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def base_model(spec: ModelSpec, cache_dir: Path | str, recipe: Recipe | None = None,
               progress: bool = True) -> tuple[BaichuanForCausalLM, BaichuanTokenizer, dict]:
    """The base of `spec`, from the cache or made now. The record says how it was made and what it reached.

    Written whole or not at all, so a run cut short leaves nothing to trip over.
    """
    recipe = recipe or Recipe()
    folder = Path(cache_dir) / f"base-{spec.name}-{recipe.hash(spec)}"
    if not (folder / "recipe.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as partial:
            _make(spec, recipe, Path(partial), progress)
            if not folder.exists():
                os.replace(shutil.copytree(partial, f"{partial}-whole"), folder)
    model = BaichuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), BaichuanTokenizer.from_pretrained(folder), json.loads((folder / "recipe.json").read_text())


def _make(spec: ModelSpec, recipe: Recipe, folder: Path, progress: bool) -> None:
    began = time.perf_counter()
    tokenizer = BaichuanTokenizer(str(train_tokenizer(_text(recipe), folder / "tokenizer.model", spec.config.vocab_size)))
    torch.manual_seed(recipe.seed)
    model = BaichuanForCausalLM(spec.config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
    losses = {}
    for name, schedule, until, batches in _stages(recipe, tokenizer):
        losses[name] = _train(model, batches, schedule, name, progress, until)
    record = {"recipe": asdict(recipe), "hash": recipe.hash(spec), "stages": losses, "general": _reached(model, tokenizer),
              "parameters": sum(p.numel() for p in model.parameters()), "made_in_s": round(time.perf_counter() - began, 1),
              "threads": torch.get_num_threads()}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(record, indent=1))


def _text(recipe: Recipe) -> Iterator[str]:
    """What the tokenizer is trained on: documents and claims of every domain and shift, and the answers. A vocabulary
    says nothing about labels, and the published one has seen every word too."""
    for domain, shift in itertools.product(DOMAINS, ("none", "mild", "moderate")):
        for item in generate_items(domain, "train", 400, recipe.seed, shift):
            yield f" {item.doc}"
            yield f" {item.claim}"
    yield from ["\nClaim:", "yes", "no"] * 400
    for grammar in GRAMMARS.values():  # often enough to become pieces of their own
        yield from [f" {word}" for word in (*grammar.names, *grammar.places, *grammar.objects)] * 100


def _stages(recipe: Recipe, tokenizer: BaichuanTokenizer) -> Iterator[tuple[str, Schedule, float, Iterator[dict]]]:
    general = generate_items("general", "train", 4 * recipe.documents, recipe.seed, config=GeneratorConfig(claims=4))
    true = [item for item in general if item.label]
    copying = Schedule(recipe.drill_lr, recipe.drill_steps, floor=1.0)
    yield "copy", copying, recipe.drill_until, _drills(tokenizer, recipe)
    yield "write", Schedule(recipe.write_lr, recipe.write_steps), 0.0, training_batches(
        tokenizer, true, recipe.batch, 512, recipe.seed)
    yield "answer", Schedule(recipe.answer_lr, recipe.answer_steps), 0.0, training_batches(
        tokenizer, general, recipe.batch, 512, recipe.seed)


def _drills(tokenizer: BaichuanTokenizer, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """Rows of distinct random words said again and again, with a period of 3 to 16 that differs by row, so that neither
    statistics nor a fixed distance help: only finding the last time helps. Learned from the second time on."""
    generator = torch.Generator().manual_seed(recipe.seed)
    position = torch.arange(40)[None]
    words = torch.tensor([i for i in range(FIRST_PIECE, tokenizer.vocab_size) if tokenizer.sp.id_to_piece(i).startswith("\u2581")])
    while True:
        period = torch.randint(3, 17, (recipe.drill_batch, 1), generator=generator)
        order = torch.rand(recipe.drill_batch, len(words), generator=generator).topk(16).indices
        ids = words[order.gather(1, position % period)]
        yield {"input_ids": ids, "labels": ids.where(position > period, -100)}


def _train(model: BaichuanForCausalLM, batches: Iterator[dict], schedule: Schedule, name: str, progress: bool,
           until: float = 0.0) -> dict:
    """AdamW, gradients clipped to norm 1, for the schedule's steps or until the last twenty losses' mean is below `until`.
    Returns what happened to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses: list[float] = []
    model.train()
    with bar(f"base: {name}", schedule.steps, progress) as shown:
        for step, batch in enumerate(itertools.islice(batches, schedule.steps)):
            optimizer.param_groups[0]["lr"] = schedule.at(step)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            shown.update(1)
            if len(losses) >= 20 and sum(losses[-20:]) / 20 < until:
                break
    model.eval()
    return {"steps": len(losses), "loss_first": losses[0], "loss_last": sum(losses[-10:]) / len(losses[-10:])}


def _reached(model: BaichuanForCausalLM, tokenizer: BaichuanTokenizer) -> dict:
    """Balanced accuracy on general documents it never saw, threshold from another set: the recipe's own test."""
    val, test = (score_items(model, tokenizer, generate_items("general", split, 200, 1), 64, 512) for split in ("val", "test"))
    return {scoring: balanced_accuracy(test["label"], test[scoring], choose_threshold(val["label"], val[scoring]))
            for scoring in ("yesno", "likelihood")}
