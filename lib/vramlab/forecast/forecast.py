"""Forecasts: a traced step through the simulated allocator, held against a card, kept by the hash
of what made it.

    forecast(Question("baichuan2-7b", "lomo", seq=1024, batch=1),
    card("rtx4090")).reserved_peak_bytes

A trace is one step of the real regime on the virtual GPU (`trace.trace`); it is kept on disk, since
it depends on the question and on this library's code only. What the allocator and the card make of
it takes a tenth of a second and is computed each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..allocator.settings import Settings
from ..allocator.simulate import STRIDES, Simulated, rows, simulate
from ..baichuan import ModelSpec
from ..capture.work import Floor, roofline
from ..cards import AMPERE, Architecture, Card
from ..files import FORECASTS as CACHE
from ..files import checksum, read_checked, recall, write_checked, write_table
from ..reading import BadFile
from ..regimes.head.chunks import Cut
from ..regimes.parameters import model_file, model_spec, row_of
from ..regimes.regime import REGIMES_FILE, Regime
from ..timeline.events import alive_after, by_category, signed
from ..timeline.sides import sides
from .solver.loops import Loop
from .trace import Trace, trace

CODE = (
    "allocator",
    "baichuan",
    "capture",
    "cards.py",
    "forecast/shape_cache.py",
    "forecast/solver/loops.py",
    "forecast/trace.py",
    "forecast/virtual_autocast.py",
    "forecast/virtual_gpu.py",
    "forecast/virtual_ranks.py",
    "machine.py",
    "observer.py",
    "regimes",
    "timeline",
    "training",
)
"""What of this library decides a trace."""
MOST_LENGTH, MOST_TOKENS = 1 << 24, 1 << 30
"""Of a row and of a step that is asked about; what is larger is a mistake, and beyond what storages
can be counted in."""


@dataclass(frozen=True)
class Question:
    """One cell of the atlas, its row and model resolved by `parameters`. `weights` is a storage
    type in place of the row's own, for example "bf16"; empty keeps it."""

    model: str
    regime: str
    seq: int
    batch: int
    weights: str = ""
    architecture: Architecture = AMPERE
    world: int = 1
    """Ranks the model is sharded over; the forecast is rank 0's."""
    axes: str = ""
    """Answers in place of the row's, as JSON, for example '{"acts": "checkpoint"}'."""
    config: str = ""
    """Fields of the model's config in place of its file's, as JSON, for example '{"norm_head":
    false}'."""

    def __post_init__(self):
        for name, value in (("seq", self.seq), ("batch", self.batch), ("world", self.world)):
            if value < 1:
                raise ValueError(f"{name} is {value}: a step needs 1 or more")
        if (
            self.seq > MOST_LENGTH
            or self.seq * self.batch > MOST_TOKENS
            or self.world > MOST_LENGTH
        ):
            raise ValueError(
                f"seq {self.seq} x batch {self.batch} on {self.world} ranks: use a seq and a world"
                f" of {MOST_LENGTH:,} at most, and {MOST_TOKENS:,} tokens"
            )

    @classmethod
    def of_run(cls, params: Mapping, seq: int = 0) -> Question:
        """One step of the run with these parameters, on full rows of `seq` tokens, or of the
        longest that the run takes."""
        axes, config = (
            json.dumps(params[name], sort_keys=True) if params.get(name) else ""
            for name in ("axes", "config")
        )
        return cls(
            params["model"],
            params["regime"],
            seq or params["max_length"],
            params["batch_size"],
            params.get("weights", ""),
            axes=axes,
            config=config,
        )

    @property
    def row(self) -> Regime:
        """The regime, as `regimes.parameters.row_of` resolves it. Raises: IllegalRegime."""
        return _row(self.regime, self.weights, self.axes, REGIMES_FILE.stat().st_mtime_ns)

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model, json.loads(self.config or "{}"))

    @property
    def name(self) -> str:
        return self.regime + (f" ({self.weights})" if self.weights else "")

    def key(self) -> str:
        """Hash of everything a trace depends on."""
        row = self.row
        spec = _fingerprint(self.model, self.config, model_file(self.model).stat().st_mtime_ns)
        content = {
            "spec": spec,
            "row": row.axes(),
            "accumulate": row.accumulate,
            "clip": row.clip,
            "seq": self.seq,
            "batch": self.batch,
            "architecture": self.architecture,
            "world": self.world,
            "torch": torch.__version__,
            "code": _code(),
        }
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode()
        ).hexdigest()[:20]


@cache
def _fingerprint(model: str, config: str, _changed_ns: int) -> dict:
    return model_spec(model, json.loads(config or "{}")).fingerprint()


@cache
def _row(regime: str, weights: str, axes: str, _changed_ns: int) -> Regime:
    """Read once for each version of the file: an atlas asks hundreds of times."""
    return row_of(regime, weights, json.loads(axes or "{}"))


@cache
def _code() -> str:
    here, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in CODE:
        path = here / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a question's step does to one card (or to a card without end). Bytes are integers, of
    the reported step unless said otherwise; `predicted`, never measured."""

    question: Question
    card: Card | None
    settings: Settings
    trace: Trace
    simulated: Simulated
    """Through an allocator without end; where it collects garbage and fits, through the card's."""
    allocated_peak_bytes: int
    """`allocated` at its highest: requests rounded as the allocator rounds them."""
    reserved_peak_bytes: int
    """Most the allocator has taken from the driver, up to the end of the reported step."""
    ledger: Mapping[str, int]
    """category -> bytes at the peak of allocated: the trace's categories, `rounding`, `cached`
    (reserved, not allocated) and, with a card, `context`. Their sum is what the driver would
    report."""
    fits: bool | None
    """Whether the step runs on the card, the allocator flushing its cache when it must; None
    without a card."""
    retries: int
    """How often it had to flush to fit."""
    margin_bytes: int | None
    """What the card has left at the reserved peak; negative: what it lacks, flushing aside."""
    floor: Floor | None
    """No step on this card can be faster; not an estimate of the time. None without a card."""
    took_s: float

    @property
    def max_positions(self) -> int:
        """Tokens of a row that the model's config says it knows; longer ones are forecast too."""
        return self.question.spec.config.max_position_embeddings

    @cached_property
    def reserved_range_bytes(self) -> tuple[int, int]:
        """Least and most of `reserved_peak_bytes` over several orders of the segments' addresses,
        which the driver chooses; they decide which of several equally large free blocks is used.
        Simulates the step once for each of `STRIDES`.
        """
        collects = (
            self.card
            and self.fits
            and self.settings.collects_above_bytes(self.card.total_bytes) is not None
        )
        limits = (self.card.capacity_bytes, self.card.total_bytes) if collects else (None, None)
        events, before = list(rows(self.trace.events)), slice(self.trace.reported.stop)
        peaks = [
            simulate(events, self.settings, *limits, stride).reserved_bytes[before].max()
            for stride in STRIDES
        ]
        return int(min(self.reserved_peak_bytes, *peaks)), int(
            max(self.reserved_peak_bytes, *peaks)
        )

    def _reserved_range_words(self) -> str:
        """Empty where the order of addresses changes nothing."""
        least, most = (f"{size / 2**30:.2f}" for size in self.reserved_range_bytes)
        return (
            f"{least} to {most} GiB, depending on where the driver places segments"
            if least != most
            else ""
        )

    def to_json(self) -> dict:
        """Plain data for `--json` and the report."""
        question, card = self.question, self.card
        owners = [
            {"category": category, "module": module, "bytes": size}
            for category, module, size in self.trace.owners(8)
        ]
        return {
            "kind": "predicted",
            "model": question.model,
            "regime": question.regime,
            "weights": self.weights,
            "seq": question.seq,
            "batch": question.batch,
            "max_positions": self.max_positions,
            "world": question.world,
            "card": card and card.key,
            "device": self.trace.device,
            "compute_capability": list(self.trace.architecture),
            "allocator": self.simulated.label,
            "peak_allocated_bytes": self.allocated_peak_bytes,
            "peak_reserved_bytes": self.reserved_peak_bytes,
            "peak_requested_bytes": self.trace.peak_bytes,
            "phase": self.trace.phase,
            "ledger": dict(self.ledger),
            "owners": owners,
            "host_bytes": self.trace.host_bytes,
            "fits": self.fits,
            "margin_bytes": self.margin_bytes,
            "num_alloc_retries": self.retries,
            "work": {phase: dict(work) for phase, work in self.trace.work.items()},
            "floor_s": self.floor_s,
            "floor": self.floor and {**dataclasses.asdict(self.floor), "binds": self.floor.binds},
            "took_s": round(self.took_s, 2),
            **({"sides": self.sides()} if self.trace.crossed else {}),
        }

    def sides(self) -> dict[str, dict[str, int]]:
        """What client and server hold where the model is cut between them, in requested bytes, see
        `timeline.sides.sides`."""
        return sides(
            self.trace.frame, self.trace.step, self.question.row.trains.cut, self.trace.crossed
        )

    def words(self) -> str:
        """The forecast as text."""
        gib = 2**30
        lines = [
            (
                f"predicted, {self.trace.device}: {self.question.model}, {self.question.name},"
                f" {self.question.batch} x {self.question.seq} tokens"
            ),
            f"peak allocated  {self.allocated_peak_bytes / gib:8.2f} GiB  in {self.trace.phase}",
            (
                f"peak reserved   {self.reserved_peak_bytes / gib:8.2f} GiB  allocator:"
                f" {self.simulated.label}"
            ),
            *([f"  between       {words}"] if (words := self._reserved_range_words()) else []),
            f"host memory     {self.trace.host_bytes / gib:8.2f} GiB",
            "at the peak:",
        ]
        lines += [f"  {name:<14}{size / gib:8.2f} GiB" for name, size in self.ledger.items()]
        lines += ["largest owners:"] + [
            f"  {size / gib:6.2f} GiB  {category} {module}"
            for category, module, size in self.trace.owners(5)
        ]
        lines += [
            f"{name:<16}{held['peak_bytes'] / gib:8.2f} GiB  sends"
            f" {held['sends_bytes'] / 2**20:.1f} MiB a step"
            for name, held in (self.sides() if self.trace.crossed else {}).items()
        ]
        if self.card:
            usable_bytes = self.settings.usable_bytes(
                self.card.capacity_bytes, self.card.total_bytes
            )
            verdict = "fits" if self.fits else "does not fit"
            flushed = (
                f", after flushing its cache {self.retries} times"
                if self.fits and self.retries
                else ""
            )
            lines += [
                (
                    f"{self.card.name}: {verdict}{flushed}; margin {self.margin_bytes / gib:+.2f}"
                    f" GiB of {usable_bytes / gib:.2f}"
                ),
                (
                    f"no step faster than {self.floor.s:.3f} s, bound by {self.floor.binds}"
                    f" (roofline floor, not an estimate): compute {self.floor.compute_s:.3f},"
                    f" memory {self.floor.memory_s:.3f}, bus {self.floor.bus_s:.3f}"
                ),
            ]
        if self.max_positions < self.question.seq:
            lines.append(
                f"note: rows of {self.question.seq:,} tokens, and {self.question.model} knows"
                f" {self.max_positions:,} positions: their memory is forecast all the same"
            )
        return "\n".join([*lines, f"took {self.took_s:.1f} s"])

    def takeaway(self) -> str:
        """One number, in Markdown: what is left of the card."""
        between = f" Reserved: {words}." if (words := self._reserved_range_words()) else ""
        if self.card is None:
            return (
                f"**{self.reserved_peak_bytes / 2**30:.1f} GiB** reserved at the peak,"
                f" predicted.{between}"
            )
        flushed = " after flushing its cache" if self.fits and self.retries else ""
        return (
            f"**{self.margin_bytes / 2**30:+.1f} GiB** is what {self.question.name} of"
            f" {self.question.model}, {self.question.batch} x {self.question.seq} tokens, leaves of"
            f" a {self.card.name}: it {'fits' if self.fits else 'does not fit'}{flushed},"
            f" predicted.{between}"
        )

    @property
    def floor_s(self) -> float | None:
        return self.floor and self.floor.s

    @property
    def weights(self) -> str:
        return self.question.row.values["weights"]


def forecast(
    question: Question,
    card: Card | None = None,
    settings: Settings = Settings(),  # noqa: B008, frozen
    cache_dir: Path | None = CACHE,
) -> Forecast:
    """The forecast of `question` on `card`. The trace comes from the cache or is made, in seconds,
    and kept."""
    began = time.perf_counter()
    if card is not None and question.architecture != card.compute_capability:
        question = dataclasses.replace(question, architecture=card.compute_capability)
    traced = traced_step(question, cache_dir)
    free = simulate(traced.events, settings)
    held = (
        simulate(traced.events, settings, card.capacity_bytes, card.total_bytes) if card else None
    )
    if held and held.oom is None and settings.collects_above_bytes(card.total_bytes) is not None:
        free = held
    step = traced.reported
    at = step.start + int(free.allocated_bytes[step].argmax())
    allocated, reserved = int(free.allocated_bytes[at]), int(free.reserved_bytes[: step.stop].max())
    alive = by_category(alive_after(traced.device_rows(), at))
    ledger = {**alive, "cached": int(free.reserved_bytes[at]) - allocated}
    ledger["rounding"] = allocated - sum(size for name, size in ledger.items() if name != "cached")
    ledger |= {"context": card.context_bytes} if card else {}
    return Forecast(
        question,
        card,
        settings,
        traced,
        free,
        allocated,
        reserved,
        ledger,
        held and held.oom is None,
        held.num_alloc_retries if held else 0,
        card and settings.usable_bytes(card.capacity_bytes, card.total_bytes) - reserved,
        card
        and roofline(
            traced.work, card.bf16_tflops, card.fp32_tflops, card.gb_per_s, card.host_gb_per_s
        ),
        time.perf_counter() - began,
    )


def traced_step(question: Question, cache_dir: Path | None = CACHE, counted: bool = True) -> Trace:
    """The trace of `question`, from `cache_dir` when it is there; with `counted` only one that has
    its `work`."""
    folder = cache_dir and cache_dir / question.key()
    kept = recall(folder, _read) if folder else None
    if kept and (kept.work or not counted):
        return kept
    made = trace(
        question.spec,
        question.row,
        question.seq,
        question.batch,
        card=question.architecture,
        world=question.world,
        counted=counted,
    )
    if folder:
        _write(made, folder)
    return made


def _write(made: Trace, folder: Path) -> None:
    """The frame first, then the rest, which has the frame's checksum and its own."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = made.frame.drop(columns="t_s")
    frame = frame.astype({name: "category" for name in frame.select_dtypes(exclude="number")})
    write_table(frame, folder / "frame.parquet", compression="zstd")
    rest = {
        field.name: getattr(made, field.name)
        for field in dataclasses.fields(made)
        if field.name != "frame"
    }
    rest["alive"] = [[*owner, size] for owner, size in made.alive.items()]
    rest["loops"] = [dataclasses.asdict(loop) for loop in made.loops]
    write_checked(folder / "trace.json", {**rest, "frame": checksum(folder / "frame.parquet")})


def _read(folder: Path) -> Trace:
    rest: dict[str, Any] = read_checked(folder / "trace.json")
    if rest.pop("frame") != checksum(folder / "frame.parquet"):
        raise BadFile(f"{folder / 'frame.parquet'} does not match its checksum")
    rest["alive"] = {(module, category, op): size for module, category, op, size in rest["alive"]}
    rest |= {name: tuple(rest[name]) for name in ("architecture", "parts")}
    rest["loops"] = tuple(Loop(Cut(**loop.pop("cut")), **loop) for loop in rest["loops"])
    rest["ranked"] = {int(step): size for step, size in rest["ranked"].items()}
    frame = pd.read_parquet(folder / "frame.parquet")
    return Trace(
        **rest, frame=frame.astype({name: object for name in frame.select_dtypes("category")})
    )


def largest(
    question: Question,
    axis: str,
    card: Card,
    settings: Settings = Settings(),  # noqa: B008, frozen
    limit: int = 1 << 20,
    said: Callable[[str], object] = lambda _: None,
) -> tuple[int, Forecast | None]:
    """The largest `axis` ("seq" or "batch") with which the step still fits on the card: (value, its
    forecast), or (0, None) when not even the smallest does. Doubles from 1 (a sequence from 64, in
    steps of 64), then halves the gap.

    Raises: ValueError, for another axis.
    """
    if axis not in ("seq", "batch"):
        raise ValueError(f"max is {axis!r}: it searches seq or batch")
    grain, fitting, best, above = (64 if axis == "seq" else 1), 0, None, None
    value = 1
    while above is None or above - fitting > 1:
        found = forecast(dataclasses.replace(question, **{axis: value * grain}), card, settings)
        said(f"{axis} {value * grain}: {'fits' if found.fits else 'does not fit'}")
        if found.fits:
            fitting, best = value, found
        else:
            above = value
        if above is None and value * 2 * grain > limit:
            break
        value = value * 2 if above is None else (fitting + above) // 2
    return fitting * grain, best


def assert_peak(
    regime: str, model: str, seq: int, batch: int, most_bytes: int, weights: str = ""
) -> Forecast:
    """A memory regression test: the forecast's peak allocated bytes are at most `most_bytes`.

    Raises: AssertionError, with what is alive at the peak, largest first.
    """
    found = forecast(Question(model, regime, seq, batch, weights))
    if found.allocated_peak_bytes > most_bytes:
        owners = "\n".join(
            f"  {size:>16,}  {category} {module}"
            for category, module, size in found.trace.owners(12)
        )
        over = found.allocated_peak_bytes - most_bytes
        raise AssertionError(
            f"{found.question.name} on {model}, {batch} x {seq} tokens, peaks at"
            f" {found.allocated_peak_bytes:,} bytes in {found.trace.phase}, {over:,} more than"
            f" {most_bytes:,}; alive then:\n{owners}"
        )
    return found


def without(traced: Trace, storages: np.ndarray) -> int:
    """The reported step's peak of requested bytes had `storages` never been allocated: a
    counterfactual from the events."""
    rows = traced.device_rows()
    changes = np.where(rows["storage"].isin(storages), 0, signed(rows))
    return int(np.cumsum(changes)[traced.reported].max())
