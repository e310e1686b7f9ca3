"""The base model: a small Baichuan-2 pre-trained by a recorded recipe, and known by the hash of
what made it. That of the standard recipe ships with the project, so that it is the same on every
machine; others are trained here once and kept.

Checking a claim against a document is looking things up, and a model from random weights does not
find that out from yes/no answers: the gradient of a balanced data set is zero to first order. So
the recipe teaches copying first, then to write and judge claims about documents, in made-up
languages and then in the `general` domain (see `lessons`). Of news, law and medicine it meets
single words in random order, never a sentence; they stay new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from ...baichuan import BaichuanForCausalLM, BaichuanTokenizer, ModelSpec
from ...files import BASES, intact, remove_stale, seal
from ..generator import GeneratorConfig
from .recipe import Reading, Recipe
from .training import Base, extend_base, save_tokenizer, train_base

SEEDS = "seeds.json"  # beside a shipped base: what other seeds and CPUs reach


def base_model(
    spec: ModelSpec, cache_dir: Path | str, recipe: Recipe | None = None, progress: bool = True
) -> Base:
    """The base of `spec`: the shipped one where it is of this recipe, else from the cache, else
    trained now. A damaged copy is named on standard error and replaced."""
    recipe = recipe or Recipe()
    logging.disable_progress_bar()  # transformers' own, over a millisecond of reading and writing
    folder = shipped_base(recipe.hash(spec)) or _cached(
        Path(cache_dir) / f"base-{spec.name}-{recipe.hash(spec)}",
        lambda folder: write_base(spec, recipe, cache_dir, folder, progress),
    )
    model = BaichuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (
        model.eval(),
        BaichuanTokenizer.from_pretrained(folder),
        json.loads((folder / "recipe.json").read_text()),
    )


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
    """The folder of the shipped base whose recipe has this hash; None where none has, or where its
    files are damaged, which is said on standard error."""
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


def _cached(folder: Path, fill: Callable[[Path], object]) -> Path:
    """`folder`, whose files `fill` writes unless they are there and intact. Written whole or not at
    all, so a run cut short leaves nothing to trip over."""
    if intact(folder):
        return folder
    if folder.exists():
        print(
            f"{folder.name}: the files in the cache are damaged, they are made again",
            file=sys.stderr,
        )
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder.parent, ".partial-*")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        whole = Path(partial, "whole")
        whole.mkdir()
        fill(whole)
        seal(whole)
        if not folder.exists():  # another process may have been faster
            os.replace(whole, folder)
    return folder


def random_model(spec: ModelSpec, cache_dir: Path | str, seed: int) -> Base:
    """Random weights, as the config initialises them, and the tokenizer of every base of that
    vocabulary, from the cache or made now: what pre-training begins with."""
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
