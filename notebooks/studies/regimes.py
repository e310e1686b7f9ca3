"""The study of the regimes, family by family: what was published about a row beside what it does
here.

Three kinds of figures, told apart wherever they are shown. `quoted` is another's, in its own unit
and of its own model, from params/study.yml. `predicted` is the forecast of the model asked for,
with no GPU. `measured` is the wall time of real steps of the tiny model on this machine's CPU,
which shows when a regime stalls, not how long it would elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from vramlab.baichuan import BaichuanForCausalLM
from vramlab.forecast.chart import Atlas, chart
from vramlab.forecast.forecast import CACHE
from vramlab.progress import bar
from vramlab.reading import read_yaml, typed
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import REGIMES_FILE, Regime, read_regimes
from vramlab.training.clock import Clock
from vramlab.training.trainer import Schedule, Trainer

STUDY_FILE = REGIMES_FILE.parent / "study.yml"
GIB = 2**30
SHORT = 10
"""A stall that a row has more rarely than every so many steps comes every so many in a measured
run, which has to be short."""


@dataclass(frozen=True)
class Family:
    """Rows that save bytes in the same way."""

    title: str
    shown: tuple[str, ...]
    """Those that stand for the family."""
    rest: tuple[str, ...]


@dataclass(frozen=True)
class Quote:
    """A published figure, as it was written."""

    figure: str
    of: str
    """Its model and conditions, as far as its source gives them."""
    by: str
    """Whose it is: the method's `authors`, the maintainers of a `library`, or a `third party`."""
    source: str


@dataclass(frozen=True)
class Study:
    """What params/study.yml says."""

    families: Mapping[str, Family]
    quotes: Mapping[str, Quote]

    def chapters(
        self, families: Sequence[str] = (), rows: Sequence[str] = ()
    ) -> dict[str, list[str]]:
        """family -> its rows to draw: those that stand for it, or those of them that are in `rows`,
        or with "all" in `rows` all. No `families` are all of them; a family with nothing to draw is
        left out.

        Raises: ValueError, for a family or a row that there is not.
        """
        known = [row for family in self.families.values() for row in (*family.shown, *family.rest)]
        for name, given, there in (
            ("families", families, list(self.families)),
            ("rows", rows, ["all", *known]),
        ):
            if wrong := [value for value in given if value not in there]:
                raise ValueError(f"{name} has {', '.join(wrong)}; there are {', '.join(there)}")
        found = {}
        for key in families or self.families:
            its = self.families[key]
            every = [*its.shown, *its.rest]
            found[key] = (
                every
                if "all" in rows
                else [row for row in every if row in rows]
                if rows
                else list(its.shown)
            )
        return {key: names for key, names in found.items() if names}


def read_study(path: Path = STUDY_FILE) -> Study:
    """The file. Raises: BadFile, for a field that is missing, unknown or of another type."""
    content = typed(Study, read_yaml(path), str(path))
    families = {
        key: typed(Family, row, f"{path}: families.{key}") for key, row in content.families.items()
    }
    return Study(
        families,
        {
            row: typed(Quote, quote, f"{path}: quotes.{row}")
            for row, quote in content.quotes.items()
        },
    )


def storage(row: Regime) -> str:
    """The storage type a row is forecast with: bf16, as one would at this size, unless the row is
    about storage, and `full`, which is what all are compared with. Empty keeps the row's own."""
    return "" if row.name == "full" or row.values["weights"] != "fp32" else "bf16"


def predicted(
    chapters: Mapping[str, Sequence[str]],
    model: str,
    seq: int,
    card: str,
    progress: bool = True,
    cache_dir: Path | None = CACHE,
) -> dict[str, dict]:
    """row -> the atlas's cell of one row of `seq` tokens, held against `card` (a key), plus `card`
    and `capacity_bytes`. Seconds for a row the first time; kept by the hash of all it depends
    on."""
    known, cells = read_regimes(), {}
    names = [name for rows in chapters.values() for name in rows]
    with bar("forecasts", len(names), progress) as shown:
        for name in names:
            asked = Atlas(
                "study",
                (model,),
                (seq,),
                (1,),
                (storage(known[name]),),
                regimes=(name,),
                cards=(card,),
            )
            said = chart(asked, cache_dir, progress=False, jobs=1)
            cells[name] = {
                **said["cells"][0],
                "card": said["cards"][card]["name"],
                "capacity_bytes": said["cards"][card]["capacity_bytes"],
            }
            shown.update()
    return cells


def event(row: Regime, step: int, count: int) -> str:
    """What a step does that not every step does; `count` is the number of the row's parts. Empty
    where there is nothing."""
    if hasattr(row.rule, "gap") and step % row.rule.gap == 0:
        return "new projection"
    if count > 1 and (
        step == 0 or row.trains.active(step, count) != row.trains.active(step - 1, count)
    ):
        return "switch"
    for name, words in (("every", "anchor"), ("probe", "probe")):
        gap = getattr(row.grads, name, 0)
        if gap and step % gap == 0:
            return words
    return ""


def hurried(row: Regime) -> Regime:
    """The row with its stalls at most `SHORT` steps apart."""
    for axis, name in (
        ("rule", "gap"),
        ("trains", "interval"),
        ("grads", "probe"),
        ("grads", "every"),
    ):
        value = getattr(row, axis)
        if getattr(value, name, 0) > SHORT:
            row = dataclasses.replace(row, **{axis: dataclasses.replace(value, **{name: SHORT})})
    return row


def stalls(
    rows: Iterable[str], steps: int = 7 * SHORT // 2, model: str = "tiny", progress: bool = True
) -> pd.DataFrame:
    """Measured: `row`, `step`, `step_s`, `event` of real steps on this CPU, of those rows whose
    steps are not all alike. One step of another trainer goes before, so that the first is not the
    library's own first."""
    known, found = read_regimes(), []
    asked = [name for name in rows if _uneven(hurried(known[name]))]
    with bar("steps on this CPU", len(asked), progress and bool(asked)) as shown:
        for name in asked:
            row = hurried(known[name])
            _timed(model, row, 1)
            trainer, clock = _timed(model, row, steps)
            found += [
                {
                    "row": name,
                    "step": timed["step"],
                    "step_s": timed["step_s"],
                    "event": event(row, timed["step"], len(trainer.parts)),
                }
                for timed in clock.rows
            ]
            shown.update()
    return pd.DataFrame(found, columns=["row", "step", "step_s", "event"])


def _uneven(row: Regime) -> bool:
    """Whether the row has something that it does not do at every step, or takes turns."""
    return hasattr(row.rule, "gap") or any(
        getattr(value, name, 0)
        for value, name in ((row.trains, "interval"), (row.grads, "every"), (row.grads, "probe"))
    )


def _timed(model: str, row: Regime, steps: int) -> tuple[Trainer, Clock]:
    torch.manual_seed(0)
    spec, clock = model_spec(model), Clock()
    trainer = Trainer(
        BaichuanForCausalLM(spec.config), row, Schedule(row.lr, steps), observer=clock
    )
    for _ in range(steps):
        ids = torch.randint(3, spec.config.vocab_size, (4, 64))
        trainer.step(
            [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
            * row.accumulate
        )
    return trainer, clock
