"""The training of a base model, stage by stage; see `curriculum` for what each stage teaches."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
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
"""A model in evaluation mode, its tokenizer, and the record of its training and its scores."""
Stage = tuple[str, Schedule, float, Iterator[dict]]
"""Name, learning rates, the loss at which the stage ends early (0: never), batches."""
SPACE = "\u2581"
"""SentencePiece's spelling of a space."""


def save_tokenizer(folder: Path, size: int) -> None:
    """Train the tokenizer of every base with a vocabulary of `size` pieces, and write it into
    `folder`."""
    _tokenizer(folder, _vocabulary(), size).save_pretrained(folder)


def train_base(spec: ModelSpec, recipe: Recipe, folder: Path, progress: bool) -> None:
    """Train the base of `spec` from random weights; write model, tokenizer and record
    (`recipe.json`) into `folder`."""
    words = _vocabulary()
    tokenizer = _tokenizer(folder, words, spec.config.vocab_size)
    torch.manual_seed(recipe.seed)
    model = BaichuanForCausalLM(spec.config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
    record = {"recipe": asdict(recipe), "hash": recipe.hash(spec)}
    record["stages"] = _train_stages(
        model, tokenizer, recipe, _stages(recipe, tokenizer, words), progress
    )
    _save((model, tokenizer, record), generate_items, recipe, folder)


def extend_base(
    spec: ModelSpec, recipe: Reading, start: Base, folder: Path, progress: bool
) -> None:
    """Continue from the base `start` by the stages of `recipe`; write as `train_base` does."""
    model, tokenizer, before = start
    stages = (
        (name, Schedule(recipe.lr, steps), 0.0, _questions(tokenizer, recipe, steps, records))
        for name, steps, records in (
            ("questions", recipe.question_steps, recipe.records[:1]),
            ("lengths", recipe.length_steps, recipe.records),
        )
    )
    record = {"recipe": asdict(recipe), "hash": recipe.hash(spec), "from": before["hash"]}
    record["stages"] = before["stages"] | _train_stages(model, tokenizer, recipe, stages, progress)
    _save((model, tokenizer, record), generate_questions, recipe, folder)


def _questions(
    tokenizer: BaichuanTokenizer, recipe: Reading, steps: int, records: Sequence[int]
) -> Iterator[dict]:
    """Batches of passages with each number of records in turn, none seen twice. Batches have equal
    tokens: three questions are as long as four records."""
    streams = []
    for count in records:
        size = max(1, round(recipe.batch * (recipe.records[0] + 4) / (count + 4)))
        questions = -(-steps // len(records)) * size * QUESTIONS_PER_PASSAGE
        config = QuestionConfig(count, questions=QUESTIONS_PER_PASSAGE)
        items = generate_questions("general", "train", questions, recipe.seed, config=config)
        streams.append(checked_batches(tokenizer, items, size, recipe.seed))
    return (next(stream) for stream in itertools.cycle(streams))


def _save(base: Base, generate: Callable[..., list[Item]], recipe: Recipe, folder: Path) -> None:
    """Score the base on held-out items of `generate`, and write model, tokenizer and record."""
    model, tokenizer, record = base
    record |= _scores(model, tokenizer, generate, recipe) | {
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
    nothing about labels, and the published one has every word too."""
    texts = (
        f"{item.doc} {item.claim}"
        for domain, shift in itertools.product(DOMAINS, ("none", "mild", "moderate"))
        for item in generate_items(domain, "train", 400, 0, shift)
    )
    return sorted({word for text in texts for word in text.split()})


def _tokenizer(folder: Path, words: list[str], size: int) -> BaichuanTokenizer:
    """One piece per word, so that a name is looked up in one step; other pieces are merged from the
    words' letters."""
    texts = [*words * 20, *["yes", "no"] * 400]
    pieces = [CLAIM, SPACE, *(SPACE + word for word in words)]
    return BaichuanTokenizer(str(train_tokenizer(texts, folder / "tokenizer.model", size, pieces)))


def _stages(recipe: Recipe, tokenizer: BaichuanTokenizer, words: list[str]) -> Iterator[Stage]:
    """The stages of a base that is trained from random weights."""
    ids = torch.tensor([tokenizer.sp.piece_to_id(SPACE + word) for word in words])
    schedule = Schedule(recipe.copy_lr, recipe.copy_steps, floor=1.0)
    yield "copy", schedule, recipe.copy_until, copies(ids, recipe.drill_batch, recipe.seed)
    schedule = Schedule(recipe.copy_lr, recipe.echo_steps)
    yield "echo", schedule, 0.0, echoes(ids, recipe.drill_batch, recipe.seed)
    invented = invented_items(words, recipe.documents // 3, recipe.seed)
    general = generate_items(
        "general", "train", 4 * recipe.documents, recipe.seed, config=GeneratorConfig(claims=4)
    )
    for name, steps, items in (
        ("invented", recipe.invented_steps, invented),
        # a quarter stays invented: looking up must not depend on the one domain's phrases
        ("general", recipe.general_steps, general + invented),
    ):
        batches = checked_batches(tokenizer, items, recipe.batch, recipe.seed)
        yield name, Schedule(recipe.lr, steps), 0.0, batches


def _train_stages(
    model: BaichuanForCausalLM,
    tokenizer: BaichuanTokenizer,
    recipe: Recipe,
    stages: Iterable[Stage],
    progress: bool,
) -> dict[str, dict]:
    """Train one stage after the other; the record of each by name. Only `general` ends with
    averaged weights."""
    loss_of, records = partial(_loss, model, recipe, answer_ids(tokenizer)), {}
    for stage in stages:
        average_steps = recipe.average_steps if stage[0] == "general" else 0
        records[stage[0]] = _train(model, loss_of, stage, average_steps, progress)
    return records


def _train(
    model: BaichuanForCausalLM,
    loss_of: Callable[[dict], Tensor],
    stage: Stage,
    average_steps: int,
    progress: bool,
) -> dict:
    """AdamW with gradients clipped to norm 1, for the schedule's steps or until the mean of the
    last twenty losses is below `until`.

    The model then has the mean of its weights after each of the last `average_steps` steps; with 0
    the last weights. Returns the number of steps, the first and last loss, and the CPU time.
    """
    name, schedule, until, batches = stage
    began = time.process_time()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    weights, losses = list(model.parameters()), []
    means = [weight.detach().clone() for weight in weights]
    model.train()
    with bar(f"base: {name}", schedule.steps, progress) as progress_bar:
        for step, batch in enumerate(itertools.islice(batches, schedule.steps)):
            optimizer.param_groups[0]["lr"] = schedule.at(step)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            progress_bar.update(1)
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


def _loss(
    model: BaichuanForCausalLM, recipe: Recipe, answers: tuple[int, int], batch: dict[str, Tensor]
) -> Tensor:
    """The loss of a batch: of drills, the mean over their tokens; of claims, the weighted sum of
    three means.

    These are the cross-entropy of the words of true claims, that of the answers and, at each word
    of a claim, the binary cross-entropy of whether it still agrees with the document. The last is
    read as yes or no from the input of the last block, which then only has to carry it to the
    position where the answer is given. `answers` are the ids of no and yes.
    """
    if "agrees" not in batch:
        return model(**batch, use_cache=False).loss
    output = model(
        batch["input_ids"], batch["attention_mask"], use_cache=False, output_hidden_states=True
    )
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(
        output.logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view(labels.shape)
    at_answers = batch["input_ids"] == ASSISTANT_ID
    at_words = (labels != IGNORED) & ~at_answers
    no, yes = answers
    head = model.lm_head.rows(model.lm_head.weight)
    yes_over_no = model.model.norm(output.hidden_states[-2]) @ (head[yes] - head[no])
    known = ~batch["agrees"].isnan()
    agrees = F.binary_cross_entropy_with_logits(yes_over_no[known], batch["agrees"][known])
    return (
        losses[at_words].mean()
        + recipe.answer_weight * losses[at_answers].mean()
        + recipe.agrees_weight * agrees
    )


def _scores(
    model: BaichuanForCausalLM,
    tokenizer: BaichuanTokenizer,
    generate: Callable[..., list[Item]],
    recipe: Recipe,
) -> dict:
    """`general`: balanced accuracy by scoring on the recipe's held-out items of the general domain,
    with thresholds from others; `intervals`: their 95 % intervals over documents; `items`: how
    many."""
    items = [
        item
        for split, count in zip(("val", "test"), recipe.held_out, strict=True)
        for item in generate("general", split, count, 1)
    ]
    table = summarise(score_items(model, tokenizer, items, 64, 512))
    accuracy = table["metric"].eq("balanced_accuracy") & table["scoring"].isin(MODEL_SCORINGS)
    rows = table[accuracy].set_index("scoring")
    return {
        "general": rows["value"].to_dict(),
        "intervals": {name: [row.low, row.high] for name, row in rows.iterrows()},
        "items": recipe.held_out[1],
    }
