"""The base model: a small Baichuan-2 pre-trained by a recorded recipe, and known by the hash of
what made it. The one of the standard recipe ships with the project, so that it is the same on every
machine; others are trained once and cached.

Checking a claim against a document is looking things up, and a model with random weights does not
learn that from yes/no answers: the gradient of a balanced data set is zero to first order. So the
recipe teaches copying first, then writing and judging claims about documents, in invented languages
and then in the `general` domain (see `curriculum`). Of news, law and medicine the model sees single
words in random order, never a sentence; these domains stay new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from ...baichuan import BaichuanForCausalLM, BaichuanTokenizer, ModelSpec
from ...files import BASES, intact, remove_stale, seal
from ..generator import GeneratorConfig
from .recipe import Reading, Recipe
from .training import Base, extend_base, save_tokenizer, train_base

SEEDS = "seeds.json"
"""Beside a shipped base: the scores of other seeds and CPUs."""


def base_model(
    spec: ModelSpec, cache_dir: Path | str, recipe: Recipe | None = None, progress: bool = True
) -> Base:
    """The base of `spec`: the shipped one if it is of this recipe, else from the cache, else
    trained now. A damaged copy is named on standard error and replaced."""
    recipe = recipe or Recipe()
    logging.disable_progress_bar()  # transformers' own, over a millisecond of reading and writing
    folder = shipped_base(recipe.hash(spec)) or _cached(
        Path(cache_dir) / f"base-{spec.name}-{recipe.hash(spec)}",
        lambda folder: write_base(spec, recipe, cache_dir, folder, progress),
    )
    model = BaichuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    record = json.loads((folder / "recipe.json").read_text())
    return model.eval(), BaichuanTokenizer.from_pretrained(folder), record


def write_base(
    spec: ModelSpec, recipe: Recipe, cache_dir: Path | str, folder: Path, progress: bool
) -> None:
    """Train the base of `spec` by `recipe`, and write model, tokenizer and record (`recipe.json`)
    into `folder`."""
    if isinstance(recipe, Reading):
        extend_base(spec, recipe, base_model(spec, cache_dir, progress=progress), folder, progress)
    else:
        train_base(spec, recipe, folder, progress)


def shipped_base(digest: str) -> Path | None:
    """The folder of the shipped base whose recipe has this hash; None if no intact one has it. A
    damaged one is named on standard error."""
    for folder in sorted({path.parent for path in BASES.glob("[!.]*/*") if path.name != SEEDS}):
        if not intact(folder):
            print(
                f"{folder.name}: the shipped base is damaged, it is trained anew (git checkout"
                " brings it back)",
                file=sys.stderr,
            )
        elif json.loads((folder / "recipe.json").read_text())["hash"] == digest:
            return folder
    return None


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder inside `parent`, to be filled and moved to its final name; what is not moved is
    removed."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale(parent, ".partial-*")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as partial:
        folder = Path(partial, "whole")
        folder.mkdir()
        yield folder


def _cached(folder: Path, fill: Callable[[Path], object]) -> Path:
    """`folder`, whose files `fill` writes unless they exist and are intact. It is written whole or
    not at all, so an interrupted run leaves nothing behind."""
    if intact(folder):
        return folder
    if folder.exists():
        print(
            f"{folder.name}: the files in the cache are damaged, they are made again",
            file=sys.stderr,
        )
        shutil.rmtree(folder)
    with partial_folder(folder.parent) as whole:
        fill(whole)
        seal(whole)
        if not folder.exists():  # another process may have been faster
            os.replace(whole, folder)
    return folder


def random_model(spec: ModelSpec, cache_dir: Path | str, seed: int) -> Base:
    """The starting point of pre-training: random weights, as the config initialises them, and the
    tokenizer that all bases of that vocabulary share, from the cache or trained now."""
    size = spec.config.vocab_size
    content = json.dumps({"vocabulary": size, "generator": GeneratorConfig().hash()})
    folder = _cached(
        Path(cache_dir) / f"tokenizer-{size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}",
        lambda whole: save_tokenizer(whole, size),
    )
    torch.manual_seed(seed)
    model = BaichuanForCausalLM(spec.config)
    record = {"recipe": "none", "parameters": sum(p.numel() for p in model.parameters())}
    return model.eval(), BaichuanTokenizer.from_pretrained(folder), record
