"""The base model: a small Baichuan-2 pre-trained once, here, by a recorded recipe, and kept by the hash of what made it.

Checking a claim against a document is looking things up, and a model from random weights does not find that out from
yes/no answers: the gradient of a balanced data set is zero to first order. So the recipe teaches copying first, then to
write and judge claims about documents, in made-up languages and then in the `general` domain (see `lessons`). Of news,
law and medicine it meets single words in random order, never a sentence; they stay new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .baichuan import BaichuanForCausalLM, BaichuanTokenizer, ModelSpec
from .baichuan.tokenizer import ASSISTANT_ID, train_tokenizer
from .factcc.generator import GeneratorConfig, generate_items
from .factcc.items import DOMAINS, Item
from .factcc.prompt import CLAIM, IGNORED, answer_ids
from .factcc.questions import QUESTIONS_PER_PASSAGE, QuestionConfig, generate_questions
from .factcc.scoring import score_items
from .factcc.statistics import balanced_accuracy, choose_threshold
from .lessons import checked_batches, copies, echoes, invented_items
from .progress import bar
from .trainer import Schedule

SPACE = "\u2581"
"""How SentencePiece spells a space."""


@dataclass(frozen=True)
class Recipe:
    """How the base is made. Steps of each stage, their learning rates and batch sizes; everything is in the hash."""

    copy_steps: int = 900
    """At most; the stage ends when copying is learned, which happens all at once after 250 to 350 steps."""
    copy_until: float = 0.12
    copy_lr: float = 4e-3
    drill_batch: int = 32
    echo_steps: int = 300
    invented_steps: int = 300
    general_steps: int = 1200
    lr: float = 3e-3
    answer_weight: float = 0.4
    agrees_weight: float = 0.3
    embedding_std: float = 0.4
    """Embeddings begin this wide: Adam moves every weight by its learning rate, and narrow ones would be new each step,
    too unsteady for attention to learn to find a token again."""
    batch: int = 16
    seed: int = 0
    documents: int = 16000

    @staticmethod
    def named(name: str) -> Recipe:
        """`standard`; `reading`, which goes on from it; or `smoke`, a few steps of each stage, for tests: it knows nothing."""
        known = {"standard": Recipe(), "reading": Reading(),
                 "smoke": Recipe(copy_steps=2, echo_steps=2, invented_steps=2, general_steps=2, batch=4, drill_batch=4,
                                 documents=40)}
        if name not in known:
            raise ValueError(f"no recipe {name!r}: there are {', '.join(known)}, and none")
        return known[name]

    def hash(self, spec: ModelSpec) -> str:
        content = {"recipe": asdict(self), "model": spec.fingerprint(), "generator": GeneratorConfig().hash(), "version": 3}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reading(Recipe):
    """Goes on from `standard`: questions on general passages, for who fine-tunes on questions of another domain. First short
    passages, then those of several lengths, as many tokens a batch."""

    lr: float = 1.5e-3
    question_steps: int = 400
    length_steps: int = 240
    records: tuple[int, ...] = (2, 5, 8)
    """Of a passage, by turns. 8 make a sequence of some 260 tokens; longer ones stay unknown."""


def base_model(spec: ModelSpec, cache_dir: Path | str, recipe: Recipe | None = None,
               progress: bool = True) -> tuple[BaichuanForCausalLM, BaichuanTokenizer, dict]:
    """The base of `spec`, from the cache or made now. The record says how it was made and what it reached.

    Written whole or not at all, so a run cut short leaves nothing to trip over.
    """
    recipe = recipe or Recipe()
    logging.disable_progress_bar()  # transformers' own, over a millisecond of reading and writing
    folder = Path(cache_dir) / f"base-{spec.name}-{recipe.hash(spec)}"
    if not (folder / "recipe.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as partial:
            (_go_on if isinstance(recipe, Reading) else _make)(spec, recipe, Path(partial), progress)
            if not folder.exists():
                os.replace(shutil.copytree(partial, f"{partial}-whole"), folder)
    model = BaichuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), BaichuanTokenizer.from_pretrained(folder), json.loads((folder / "recipe.json").read_text())


def random_model(spec: ModelSpec, cache_dir: Path | str, seed: int) -> tuple[BaichuanForCausalLM, BaichuanTokenizer, dict]:
    """Random weights, as the config initialises them, and the tokenizer of every base of that vocabulary, from the cache or
    made now: what pre-training begins with."""
    size = spec.config.vocab_size
    content = json.dumps({"vocabulary": size, "generator": GeneratorConfig().hash()})
    folder = Path(cache_dir) / f"tokenizer-{size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokenizer-") as partial:
            _tokenizer(Path(partial), _vocabulary(), size).save_pretrained(Path(partial, "whole"))
            if not folder.exists():
                os.replace(Path(partial, "whole"), folder)
    torch.manual_seed(seed)
    model = BaichuanForCausalLM(spec.config)
    record = {"recipe": "none", "parameters": sum(p.numel() for p in model.parameters())}
    return model.eval(), BaichuanTokenizer.from_pretrained(folder), record


def _make(spec: ModelSpec, recipe: Recipe, folder: Path, progress: bool) -> None:
    began = time.perf_counter()
    words = _vocabulary()
    tokenizer = _tokenizer(folder, words, spec.config.vocab_size)
    torch.manual_seed(recipe.seed)
    model = BaichuanForCausalLM(spec.config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
    loss, losses = _Loss(model, recipe, tokenizer), {}
    for name, schedule, until, batches in _stages(recipe, tokenizer, words):
        losses[name] = _train(model, batches, schedule, name, progress, until, loss)
    loss.handle.remove()
    record = {"stages": losses, "general": _reached(model, tokenizer, generate_items)}
    _keep(model, tokenizer, folder, {**record, "made_in_s": round(time.perf_counter() - began, 1)}, recipe.hash(spec), recipe)


def _go_on(spec: ModelSpec, recipe: Reading, folder: Path, progress: bool) -> None:
    model, tokenizer, before = base_model(spec, folder.parent, progress=progress)
    began = time.perf_counter()
    loss, losses = _Loss(model, recipe, tokenizer), before["stages"]
    for name, steps, records in (("questions", recipe.question_steps, recipe.records[:1]),
                                 ("lengths", recipe.length_steps, recipe.records)):
        batches = _questions(tokenizer, recipe, steps, records)
        losses[name] = _train(model, batches, Schedule(recipe.lr, steps), name, progress, 0.0, loss)
    loss.handle.remove()
    record = {"from": before["hash"], "stages": losses, "general": _reached(model, tokenizer, generate_questions)}
    _keep(model, tokenizer, folder, {**record, "made_in_s": round(time.perf_counter() - began, 1)}, recipe.hash(spec), recipe)


def _questions(tokenizer: BaichuanTokenizer, recipe: Reading, steps: int, records: Sequence[int]) -> Iterator[dict]:
    """Batches of passages of so many records by turns, none of them seen twice; three questions are as long as four records."""
    streams = []
    for count in records:
        size = max(1, round(recipe.batch * (recipe.records[0] + 4) / (count + 4)))
        items = generate_questions("general", "train", -(-steps // len(records)) * size * QUESTIONS_PER_PASSAGE, recipe.seed,
                                   config=QuestionConfig(count, questions=QUESTIONS_PER_PASSAGE))
        streams.append(checked_batches(tokenizer, items, size, recipe.seed))
    return (next(stream) for stream in itertools.cycle(streams))


def _keep(model: BaichuanForCausalLM, tokenizer: BaichuanTokenizer, folder: Path, record: dict, digest: str,
          recipe: Recipe) -> None:
    record = {"recipe": asdict(recipe), "hash": digest, **record, "parameters": sum(p.numel() for p in model.parameters()),
              "threads": torch.get_num_threads()}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(record, indent=1))


def _vocabulary() -> list[str]:
    """Every word that a document or claim of any domain and shift can hold. A vocabulary says nothing about labels, and
    the published one has seen every word too."""
    texts = (f"{item.doc} {item.claim}" for domain, shift in itertools.product(DOMAINS, ("none", "mild", "moderate"))
             for item in generate_items(domain, "train", 400, 0, shift))
    return sorted({word for text in texts for word in text.split()})


def _tokenizer(folder: Path, words: list[str], size: int) -> BaichuanTokenizer:
    """One piece a word, so that a name is looked up in one step; all else is merged from the words' letters."""
    pieces = [CLAIM, SPACE, *(SPACE + word for word in words)]
    return BaichuanTokenizer(str(train_tokenizer([*words * 20, *["yes", "no"] * 400], folder / "tokenizer.model", size, pieces)))


def _stages(recipe: Recipe, tokenizer: BaichuanTokenizer, words: list[str]
            ) -> Iterator[tuple[str, Schedule, float, Iterator[dict]]]:
    ids = torch.tensor([tokenizer.sp.piece_to_id(SPACE + word) for word in words])
    yield "copy", Schedule(recipe.copy_lr, recipe.copy_steps, floor=1.0), recipe.copy_until, copies(
        ids, recipe.drill_batch, recipe.seed)
    yield "echo", Schedule(recipe.copy_lr, recipe.echo_steps), 0.0, echoes(ids, recipe.drill_batch, recipe.seed)
    invented = invented_items(words, recipe.documents // 3, recipe.seed)
    yield "invented", Schedule(recipe.lr, recipe.invented_steps), 0.0, checked_batches(
        tokenizer, invented, recipe.batch, recipe.seed)
    general = generate_items("general", "train", 4 * recipe.documents, recipe.seed, config=GeneratorConfig(claims=4))
    # a quarter stays invented: looking up must not come to hang on the one domain's phrases
    yield "general", Schedule(recipe.lr, recipe.general_steps), 0.0, checked_batches(
        tokenizer, general + invented, recipe.batch, recipe.seed)


def _train(model: BaichuanForCausalLM, batches: Iterator[dict], schedule: Schedule, name: str, progress: bool,
           until: float, loss_of: Callable[[dict], Tensor]) -> dict:
    """AdamW, gradients clipped to norm 1, for the schedule's steps or until the last twenty losses' mean is below `until`.
    Returns what happened to the loss."""
    began = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses: list[float] = []
    model.train()
    with bar(f"base: {name}", schedule.steps, progress) as shown:
        for step, batch in enumerate(itertools.islice(batches, schedule.steps)):
            optimizer.param_groups[0]["lr"] = schedule.at(step)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            shown.update(1)
            if len(losses) >= 20 and sum(losses[-20:]) / 20 < until:
                break
    model.eval()
    return {"steps": len(losses), "loss_first": losses[0], "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "cpu_s": round(time.process_time() - began, 1)}


class _Loss:
    """What a batch costs: of drills, the mean over their tokens; of claims, the weighted sum of three means.

    The words of true claims; the answers; and, at each word of a claim, whether it still agrees with the document, read as
    yes or no from what enters the last block, which is then left to carry it to where the answer is given.
    """

    def __init__(self, model: BaichuanForCausalLM, recipe: Recipe, tokenizer: BaichuanTokenizer):
        self.model, self.recipe, (self.no, self.yes) = model, recipe, answer_ids(tokenizer)
        self.entering: Tensor | None = None
        self.handle = model.model.layers[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _, inputs: tuple) -> None:
        self.entering = inputs[0]

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if "agrees" not in batch:
            return self.model(**batch, use_cache=False).loss
        logits = self.model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED).view(labels.shape)
        answers = batch["input_ids"] == ASSISTANT_ID
        words = (labels != IGNORED) & ~answers
        head = self.model.lm_head.rows(self.model.lm_head.weight)
        leaning = self.model.model.norm(self.entering) @ (head[self.yes] - head[self.no])
        known = ~batch["agrees"].isnan()
        agrees = F.binary_cross_entropy_with_logits(leaning[known], batch["agrees"][known])
        return each[words].mean() + self.recipe.answer_weight * each[answers].mean() + self.recipe.agrees_weight * agrees


def _reached(model: BaichuanForCausalLM, tokenizer: BaichuanTokenizer, make: Callable[..., list[Item]]) -> dict:
    """Balanced accuracy on general documents it never saw, threshold from another set: the recipe's own test."""
    val, test = (score_items(model, tokenizer, make("general", split, count, 1), 64, 512)
                 for split, count in (("val", 300), ("test", 500)))
    return {scoring: balanced_accuracy(test["label"], test[scoring], choose_threshold(val["label"], val[scoring]))
            for scoring in ("yesno", "likelihood")}
