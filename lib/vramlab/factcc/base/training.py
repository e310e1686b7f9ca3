"""The training of a base model, stage by stage, see `lessons` for what each teaches."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...baichuan import BaichuanForCausalLM, BaichuanTokenizer, ModelSpec
from ...baichuan.tokenizer import ASSISTANT_ID, train_tokenizer
from ...progress import bar
from ...training.trainer import Schedule
from ..generator import GeneratorConfig, generate_items
from ..items import DOMAINS, Item
from ..prompt import CLAIM, IGNORED, answer_ids
from ..questions import QUESTIONS_PER_PASSAGE, QuestionConfig, generate_questions
from ..scoring import score_items
from ..statistics import MODEL_SCORINGS, summarise
from .curriculum import checked_batches, copies, echoes, invented_items
from .recipe import Reading, Recipe

Base = tuple[BaichuanForCausalLM, BaichuanTokenizer, dict]
"""A model in evaluation mode, its tokenizer, and the record of how it was made and what it
reached."""
SPACE = "\u2581"
"""How SentencePiece spells a space."""


def save_tokenizer(folder: Path, size: int) -> None:
    """Train the tokenizer of every base with a vocabulary of `size` pieces, and write it into
    `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        _tokenizer(Path(scratch), _vocabulary(), size).save_pretrained(folder)


def train_base(spec: ModelSpec, recipe: Recipe, folder: Path, progress: bool) -> None:
    """Train the base of `spec` from random weights; write model, tokenizer and record
    (`recipe.json`) into `folder`."""
    words = _vocabulary()
    tokenizer = _tokenizer(folder, words, spec.config.vocab_size)
    torch.manual_seed(recipe.seed)
    model = BaichuanForCausalLM(spec.config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
    loss, losses = _Loss(model, recipe, tokenizer), {}
    for name, schedule, until, batches in _stages(recipe, tokenizer, words):
        average_steps = recipe.average_steps if name == "general" else 0
        losses[name] = _train(model, batches, schedule, name, progress, until, loss, average_steps)
    loss.handle.remove()
    record = {"stages": losses, **_reached(model, tokenizer, generate_items, recipe)}
    _keep(model, tokenizer, folder, record, recipe.hash(spec), recipe)


def extend_base(
    spec: ModelSpec, recipe: Reading, start: Base, folder: Path, progress: bool
) -> None:
    """Go on from the base `start` by the stages of `recipe`; write as `train_base` does."""
    model, tokenizer, before = start
    loss, losses = _Loss(model, recipe, tokenizer), before["stages"]
    for name, steps, records in (
        ("questions", recipe.question_steps, recipe.records[:1]),
        ("lengths", recipe.length_steps, recipe.records),
    ):
        batches = _questions(tokenizer, recipe, steps, records)
        losses[name] = _train(model, batches, Schedule(recipe.lr, steps), name, progress, 0.0, loss)
    loss.handle.remove()
    record = {
        "from": before["hash"],
        "stages": losses,
        **_reached(model, tokenizer, generate_questions, recipe),
    }
    _keep(model, tokenizer, folder, record, recipe.hash(spec), recipe)


def _questions(
    tokenizer: BaichuanTokenizer, recipe: Reading, steps: int, records: Sequence[int]
) -> Iterator[dict]:
    """Batches of passages of so many records by turns, none of them seen twice; three questions are
    as long as four records."""
    streams = []
    for count in records:
        size = max(1, round(recipe.batch * (recipe.records[0] + 4) / (count + 4)))
        items = generate_questions(
            "general",
            "train",
            -(-steps // len(records)) * size * QUESTIONS_PER_PASSAGE,
            recipe.seed,
            config=QuestionConfig(count, questions=QUESTIONS_PER_PASSAGE),
        )
        streams.append(checked_batches(tokenizer, items, size, recipe.seed))
    return (next(stream) for stream in itertools.cycle(streams))


def _keep(
    model: BaichuanForCausalLM,
    tokenizer: BaichuanTokenizer,
    folder: Path,
    record: dict,
    digest: str,
    recipe: Recipe,
) -> None:
    record = {
        "recipe": asdict(recipe),
        "hash": digest,
        **record,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "process_cpu_s": round(time.process_time(), 1),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(record, indent=1))


def _vocabulary() -> list[str]:
    """Every word that a document or claim of any domain and shift can hold. A vocabulary says
    nothing about labels, and the published one has seen every word too."""
    texts = (
        f"{item.doc} {item.claim}"
        for domain, shift in itertools.product(DOMAINS, ("none", "mild", "moderate"))
        for item in generate_items(domain, "train", 400, 0, shift)
    )
    return sorted({word for text in texts for word in text.split()})


def _tokenizer(folder: Path, words: list[str], size: int) -> BaichuanTokenizer:
    """One piece a word, so that a name is looked up in one step; all else is merged from the words'
    letters."""
    pieces = [CLAIM, SPACE, *(SPACE + word for word in words)]
    return BaichuanTokenizer(
        str(
            train_tokenizer(
                [*words * 20, *["yes", "no"] * 400], folder / "tokenizer.model", size, pieces
            )
        )
    )


def _stages(
    recipe: Recipe, tokenizer: BaichuanTokenizer, words: list[str]
) -> Iterator[tuple[str, Schedule, float, Iterator[dict]]]:
    ids = torch.tensor([tokenizer.sp.piece_to_id(SPACE + word) for word in words])
    yield (
        "copy",
        Schedule(recipe.copy_lr, recipe.copy_steps, floor=1.0),
        recipe.copy_until,
        copies(ids, recipe.drill_batch, recipe.seed),
    )
    yield (
        "echo",
        Schedule(recipe.copy_lr, recipe.echo_steps),
        0.0,
        echoes(ids, recipe.drill_batch, recipe.seed),
    )
    invented = invented_items(words, recipe.documents // 3, recipe.seed)
    yield (
        "invented",
        Schedule(recipe.lr, recipe.invented_steps),
        0.0,
        checked_batches(tokenizer, invented, recipe.batch, recipe.seed),
    )
    general = generate_items(
        "general", "train", 4 * recipe.documents, recipe.seed, config=GeneratorConfig(claims=4)
    )
    # a quarter stays invented: looking up must not come to hang on the one domain's phrases
    yield (
        "general",
        Schedule(recipe.lr, recipe.general_steps),
        0.0,
        checked_batches(tokenizer, general + invented, recipe.batch, recipe.seed),
    )


def _train(
    model: BaichuanForCausalLM,
    batches: Iterator[dict],
    schedule: Schedule,
    name: str,
    progress: bool,
    until: float,
    loss_of: Callable[[dict], Tensor],
    average_steps: int = 0,
) -> dict:
    """AdamW, gradients clipped to norm 1, for the schedule's steps or until the last twenty losses'
    mean is below `until`. The model then has the mean of its weights after each of the last
    `average_steps` steps; 0: the last weights. Returns how many steps it took, the first and last
    loss, and the CPU time."""
    began = time.process_time()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    weights, losses = list(model.parameters()), []
    means = [weight.detach().clone() for weight in weights]
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
            averaged = max(1, step + 1 - (schedule.steps - average_steps))
            with torch.no_grad():
                torch._foreach_lerp_(means, weights, 1 / averaged)
            if len(losses) >= 20 and sum(losses[-20:]) / 20 < until:
                break
    with torch.no_grad():
        torch._foreach_copy_(weights, means)
    model.eval()
    return {
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "cpu_s": round(time.process_time() - began, 1),
    }


class _Loss:
    """What a batch costs: of drills, the mean over their tokens; of claims, the weighted sum of
    three means.

    The words of true claims; the answers; and, at each word of a claim, whether it still agrees
    with the document, read as yes or no from what enters the last block, which is then left to
    carry it to where the answer is given.
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
        each = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
        ).view(labels.shape)
        answers = batch["input_ids"] == ASSISTANT_ID
        words = (labels != IGNORED) & ~answers
        head = self.model.lm_head.rows(self.model.lm_head.weight)
        leaning = self.model.model.norm(self.entering) @ (head[self.yes] - head[self.no])
        known = ~batch["agrees"].isnan()
        agrees = F.binary_cross_entropy_with_logits(leaning[known], batch["agrees"][known])
        return (
            each[words].mean()
            + self.recipe.answer_weight * each[answers].mean()
            + self.recipe.agrees_weight * agrees
        )


def _reached(
    model: BaichuanForCausalLM,
    tokenizer: BaichuanTokenizer,
    make: Callable[..., list[Item]],
    recipe: Recipe,
) -> dict:
    """`general`: balanced accuracy by scoring, on the recipe's held-out items of the general
    domain, thresholds from others; `intervals`: their 95 % intervals over documents; `items`: how
    many."""
    items = [
        item
        for split, count in zip(("val", "test"), recipe.held_out, strict=True)
        for item in make("general", split, count, 1)
    ]
    rows = summarise(score_items(model, tokenizer, items, 64, 512))
    rows = rows[
        rows["metric"].eq("balanced_accuracy") & rows["scoring"].isin(MODEL_SCORINGS)
    ].set_index("scoring")
    return {
        "general": rows["value"].to_dict(),
        "intervals": {name: [row.low, row.high] for name, row in rows.iterrows()},
        "items": recipe.held_out[1],
    }
