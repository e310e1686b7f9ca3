"""What all passes of a run share: the data set, the base that it starts from, and the batches."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..baichuan import BaichuanTokenizer, load_model
from ..factcc.base.base_model import base_model, random_model
from ..factcc.base.recipe import Recipe
from ..factcc.dataset import Dataset, dataset
from ..factcc.prompt import HALF, check_items, check_room, sequences, training_batches
from ..files import CACHE
from ..observer import Observer
from ..regimes.parameters import run_row, run_spec
from ..regimes.regime import Regime
from ..training.trainer import Batch, Schedule, Trainer

PUBLISHED_VOCABULARY = 125_696


@dataclass(frozen=True)
class Prepared:
    """Everything that the passes share. `model` stays untouched: each pass trains a copy."""

    params: Mapping
    regime: Regime
    model: nn.Module
    tokenizer: BaichuanTokenizer
    base_record: dict
    data: Dataset

    def batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step, without end: the same for every pass and every regime."""
        stream = training_batches(
            self.tokenizer,
            self.data.train,
            self.params["batch_size"],
            self.params["max_length"],
            self.params["seed"],
            self.params["objective"],
        )
        while True:
            yield list(itertools.islice(stream, self.regime.accumulate))

    def trainer(self, regime: Regime, model: nn.Module, observer: Observer) -> Trainer:
        """A trainer for `model` with the run's schedule, device and seed."""
        torch.manual_seed(self.params["seed"])
        return Trainer(
            model,
            regime,
            Schedule(self.params["lr"], self.params["steps"]),
            device=self.params["device"],
            seed=self.params["seed"],
            observer=observer,
        )


def prepare(params: Mapping, progress: bool) -> Prepared:
    """Make the data set, and load or pre-train the base. Raises: ValueError, for items that the run
    would fail on later."""
    data = dataset(params)  # checked first: a base may take minutes
    check_items(data.train, params["batch_size"], HALF)
    base = base_of(params, progress)
    groups = [
        *sequences(data.train, random.Random(params["seed"])),
        *([item] for item in data.val + data.test),
    ]
    check_room(base[1], groups, params["max_length"])
    return Prepared(params, run_row(params), *base, data)


def base_of(params: Mapping, progress: bool) -> tuple[nn.Module, BaichuanTokenizer, dict]:
    """The model that the run starts from, its tokenizer, and their record: published weights, or
    the base of the recipe, made now unless it is cached, or with recipe `none` random weights drawn
    with the run's seed.

    Raises: ValueError, for a shape whose vocabulary only the published tokenizer has.
    """
    spec = run_spec(params)
    if spec.path:
        record = {"path": Path(spec.path).name, "recipe": "published weights"}
        return (
            load_model(spec.path, config=params["config"]),
            BaichuanTokenizer.from_pretrained(spec.path),
            record,
        )
    if spec.config.vocab_size == PUBLISHED_VOCABULARY:
        raise ValueError(
            f"model {spec.name} has no weights: give the folder of the downloaded checkpoint as"
            " `path:` in its file in params/models; a base that is made here has a vocabulary of"
            " its own"
        )
    if params["recipe"] == "none":
        return random_model(spec, CACHE, params["seed"])
    return base_model(spec, CACHE, recipe=Recipe.named(params["recipe"]), progress=progress)


def make_bases(runs: Iterable[Mapping], progress: bool) -> None:
    """Make each base that `runs` (their parameters) start from, once and here, where progress is
    shown, and not inside the first run that needs it. A base that cannot be made is named on
    standard error; its own runs will fail, and others go on.
    """
    bases = {(run["model"], run["recipe"], str(run["config"])): run for run in runs}
    for params in bases.values():
        try:
            if not run_spec(params).path:
                base_of(params, progress)
        except Exception as error:
            print(
                f"the base of {params['model']} could not be made: {type(error).__name__}: {error}",
                file=sys.stderr,
            )
