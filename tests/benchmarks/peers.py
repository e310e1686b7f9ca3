"""Our rows against what a user would run instead: same model, batches, steps and threads, in one
process, as ratios.

    python -m benchmarks.peers [--json] [--only full,lomo] [--repeats 5]    measures, writes
      outputs/bench/peers.json
    python -m benchmarks.peers --table                                      that file as a Markdown
      table

with `tests` on the module search path, as `make bench` has it.

Three passes, as a run has them. Bytes: each side once under the event meter, weights included; this
is also the warm-up. Losses: of that pass' first steps, so that a ratio compares the same work.
Speed: nothing watches; whole runs of both sides take turns, and who begins alternates; a repetition
gives one ratio, the table their median and quartiles. First steps, which make optimizer state, are
not timed. What the operating system saw is measured apart, in one process whose allocator returns
memory. Peers: `benchmarks.peer_loops`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.peer_loops import Job, Loop, Seen, badam, hugging_face, ours, peft_lora
from vramlab import machine as environment
from vramlab.baichuan import BaichuanForCausalLM
from vramlab.capture.meter import Meter
from vramlab.files import ROOT, write_whole
from vramlab.observer import Observer
from vramlab.progress import bar
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import IllegalRegime, Regime, read_row, regime_row

SCHEMA = 1
RESULT = ROOT / "outputs" / "bench" / "peers.json"
PACKAGES = ("accelerate", "peft", "lomo-optim", "galore-torch", "badam", "bitsandbytes")


@dataclass(frozen=True)
class Settings:
    """What both sides of every pair share."""

    model: str = "tiny"
    batch_size: int = 4
    tokens: int = 256
    bytes_tokens: int = 64
    """Of one row, for the peak: few, so that weights and what trains them decide it, as they do in
    the 7B at 1,024."""
    untimed: int = 2
    """First steps, left out of the time."""
    timed: int = 10
    checked: int = 3
    """First steps whose losses are compared."""
    repeats: int = 5
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.untimed + self.timed


@dataclass(frozen=True)
class Pair:
    """A row of params/regimes.yml with what is changed in it, and the loop a user would pick
    instead."""

    regime: str
    peer: str
    """What runs there, in words."""
    loop: Callable[[Regime], Loop]
    changes: Mapping = field(default_factory=dict)
    tolerance: float = 1e-5
    """Largest relative difference of the first losses. Larger where the two are not the same to the
    last bit; `note` says why."""
    note: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.regime


RANK = 24
"""GaLore's, a quarter of the tiny model's width, as its paper has it; the default of both exceeds
the width."""


def under_trainer(optim: str, **arguments) -> Callable[[Regime], Loop]:
    """The Trainer with that optimizer, which checkpoints where our row does."""
    return lambda row: hugging_face(
        optim, checkpointing=row.values["acts"] == "checkpoint", **arguments
    )


PAIRS = (
    Pair("full", "Trainer, adamw_torch_fused", under_trainer("adamw_torch_fused")),
    Pair("checkpoint", "Trainer, activation checkpointing", under_trainer("adamw_torch_fused")),
    Pair("lora", "peft under Trainer", lambda row: peft_lora(row.trains)),
    Pair(
        "lomo",
        "Trainer, lomo (lomo-optim)",
        under_trainer("lomo"),
        note=(
            "both checkpoint; ours with the row's fused head, whose gradient is taken in rows: one"
            " more product of the head"
        ),
    ),
    Pair("adalomo", "Trainer, adalomo (lomo-optim)", under_trainer("adalomo"), tolerance=1e-3),
    Pair(
        "adafactor",
        "Trainer, adafactor",
        under_trainer("adafactor"),
        tolerance=1e-2,
        note=(
            "the Trainer's takes lr as it is, ours at most 1 / sqrt(t) of the weight's size; ours"
            " updates some rows at a time: more and smaller operations, and no update of a whole"
            " matrix is held"
        ),
    ),
    Pair(
        "badam",
        "badam's BlockOptimizer",
        lambda row: badam(row.trains, checkpointing=row.values["acts"] == "checkpoint"),
        {"trains": {"blocks": {"interval": 100, "order": "ascending"}}},
        note=(
            "the lowest block, 100 steps a block, as its authors use: no switch is timed, at which"
            " badam collects garbage twice; it holds an fp32 copy of the active block, even of an"
            " fp32 one; ours with the row's fused head; both checkpoint"
        ),
    ),
    Pair(
        "galore",
        "Trainer, galore_adamw (galore-torch)",
        under_trainer(
            "galore_adamw",
            optim_args=f"rank={RANK},update_proj_gap=200,scale=0.25",
            optim_target_modules="all-linear",
        ),
        {"rule": {"galore": {"rank": RANK}}},
        tolerance=5e-3,
        note="galore-torch's eps is 1e-6, ours 1e-8",
    ),
    Pair(
        "galore_layerwise",
        "Trainer, galore_adamw_layerwise",
        under_trainer(
            "galore_adamw_layerwise",
            optim_args=f"rank={RANK},update_proj_gap=200,scale=0.25",
            optim_target_modules="all-linear",
        ),
        {"rule": {"galore": {"rank": RANK}}},
        tolerance=5e-3,
        note=(
            "galore-torch's eps is 1e-6, ours 1e-8; both checkpoint; ours with the row's fused"
            " head, whose gradient is taken in rows as it is formed: one more product of the head"
        ),
    ),
    Pair(
        "adam8bit",
        "Trainer, adamw_bnb_8bit",
        under_trainer("adamw_bnb_8bit"),
        tolerance=1e-2,
        note="the Trainer keeps the moments of embeddings in 32 bits, so ours has more to quantise",
    ),
    Pair(
        "full",
        "our `full`, head: plain",
        lambda row: ours(read_row("full", regime_row("full"))),
        {"head": "fused"},
        tolerance=1e-5,
        name="fused head",
        note=(
            "tokens some at a time: its gain is bytes, which grow with the vocabulary, 768 words"
            " here and 125,696 in the 7B"
        ),
    ),
)


# one side -----------------------------------------------------------------------------------------


def jobs(settings: Settings, lr: float, **shape: int) -> Iterator[Job]:
    """The same job again and again, each with a model of its own. `shape`: other settings than
    those."""
    settings = replace(settings, **shape)
    torch.manual_seed(settings.seed)
    model = BaichuanForCausalLM(model_spec(settings.model).config)
    rows, tokens = settings.steps * settings.batch_size, settings.tokens
    ids = torch.randint(
        3,
        model.config.vocab_size,
        (rows, tokens),
        generator=torch.Generator().manual_seed(settings.seed),
    )
    mask = torch.ones_like(ids)
    data = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": ids[i]} for i in range(rows)]
    while True:
        yield Job(
            copy.deepcopy(model), data, settings.batch_size, settings.steps, lr, settings.seed
        )


def metered(loop: Loop, job: Job) -> tuple[int, Seen]:
    """Most bytes alive at a time, weights and inputs included, and what the run did."""
    meter = Meter()
    meter.own("weights", job.model.named_parameters())
    meter.own("buffers", job.model.named_buffers())
    with meter:
        seen = loop(job, meter)
    return meter.peak()["peak_bytes"], seen


def timed_s(loop: Loop, job: Job, untimed: int) -> float:
    """Seconds of the steps after the first `untimed`, from the end of the last of those."""
    gc.collect()
    ends = loop(job, Observer()).ends_s
    return ends[-1] - ends[untimed]


# a pair -------------------------------------------------------------------------------------------


def compare(pair: Pair, settings: Settings, tick: Callable[[], None] = lambda: None) -> dict:
    """One row of the result. `outcome`: `ok`; `no such row`, where ours does not exist; `peer
    cannot run`, with its reason."""
    found = {
        "name": pair.title,
        "regime": pair.regime,
        "changes": dict(pair.changes),
        "peer": pair.peer,
        "note": pair.note,
    }
    try:
        row = read_row(pair.regime, {**regime_row(pair.regime), **pair.changes})
    except IllegalRegime as refusal:
        return {**found, "outcome": "no such row", "reason": str(refusal)}
    ours_loop, small = ours(row), jobs(settings, row.lr, batch_size=1, tokens=settings.bytes_tokens)
    try:  # its errors are a result, ours are not
        peer_loop = pair.loop(row)
        peer_bytes, peer_seen = metered(peer_loop, next(small))
    except (ImportError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        return {
            **found,
            "outcome": "peer cannot run",
            "reason": f"{type(error).__name__}: {error}".splitlines()[0],
        }
    tick()
    our_bytes, our_seen = metered(ours_loop, next(small))
    tick()
    return {
        **found,
        "outcome": "ok",
        "reason": "",
        **_losses(pair, settings, our_seen, peer_seen),
        "bytes": {"ours": our_bytes, "peer": peer_bytes, "ratio": our_bytes / peer_bytes},
        "speed": _speed(settings, ours_loop, peer_loop, jobs(settings, row.lr), tick),
    }


def _losses(pair: Pair, settings: Settings, our_seen: Seen, peer_seen: Seen) -> dict:
    first = [seen.losses[: settings.checked] for seen in (our_seen, peer_seen)]
    largest = max(abs(a - b) / abs(b) for a, b in zip(*first, strict=True))
    return {
        "losses": {
            "ours": first[0],
            "peer": first[1],
            "largest_relative_difference": largest,
            "tolerance": pair.tolerance,
            "same": largest <= pair.tolerance,
        }
    }


def _speed(
    settings: Settings,
    ours_loop: Loop,
    peer_loop: Loop,
    supply: Iterator[Job],
    tick: Callable[[], None],
) -> dict:
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    sides = [("ours", ours_loop), ("peer", peer_loop)]
    for repeat in range(settings.repeats):
        for side, loop in sides if repeat % 2 else reversed(sides):
            seconds[side].append(timed_s(loop, next(supply), settings.untimed))
            tick()
    tokens = settings.timed * settings.batch_size * settings.tokens
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "ratio": _spread(ratios),
        **{
            f"{side}_tokens_per_s": _spread([tokens / s for s in values])
            for side, values in seconds.items()
        },
    }


def _spread(values: Sequence[float]) -> dict:
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q25": low, "q75": high, "values": list(values)}


# all pairs ----------------------------------------------------------------------------------------


def bench(
    settings: Settings, pairs: Sequence[Pair] = PAIRS, threads: int = 1, progress: bool = True
) -> dict:
    """Every pair, as plain data, the contents of peers.json."""
    each, rows = 2 + 2 * settings.repeats, []
    with quiet(threads), bar("peers", len(pairs) * each, progress) as shown:
        for pair in pairs:
            rows.append(compare(pair, settings, lambda: shown.update(1)))
            shown.update(0 if rows[-1]["outcome"] == "ok" else each)
        recorded = environment.record()
    versions = recorded["versions"] | {name: environment.version(name) for name in PACKAGES}
    return {
        "schema": SCHEMA,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "environment": {**recorded, "versions": versions},
        "pairs": rows,
    }


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """That many threads, and silence: what peers say of deprecations and of models unknown to them
    is not about the figures."""
    before, logger = torch.get_num_threads(), logging.getLogger("transformers")
    level = logger.level
    torch.set_num_threads(threads)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
        logger.setLevel(level)


def table(result: Mapping) -> str:
    """The result as a Markdown table."""
    lines = [
        (
            "| ours | instead of | tokens/s, ours / peer (quartiles) | peak bytes, ours / peer |"
            " largest difference of losses |"
        ),
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['name']}` | {row['peer']} | {' | '.join(_cells(row))} |"
        for row in result["pairs"]
    ]
    said, made = result["settings"], result["environment"]
    where = (
        f"{made['device']['name']}, {made['threads']} thread(s), fp32, model {said['model']},"
        f" {said['batch_size']} x {said['tokens']} tokens (bytes: 1 x {said['bytes_tokens']}),"
        f" {said['timed']} steps timed, {said['repeats']} repetitions; torch"
        f" {made['versions']['torch']}, transformers {made['versions']['transformers']};"
        f" {result['made_at'][:10]}"
    )
    notes = [
        f"- `{row['name']}`: {row['note']}"
        for row in result["pairs"]
        if row["note"] and row["outcome"] == "ok"
    ]
    return "\n".join([*lines, "", where, "", *notes])


def _cells(row: Mapping) -> tuple[str, str, str]:
    if row["outcome"] != "ok":
        return f"{row['outcome']}: {row['reason'].splitlines()[0]}", "", ""
    speed, size, losses = row["speed"]["ratio"], row["bytes"], row["losses"]
    return (
        f"{speed['median']:.2f} ({speed['q25']:.2f} to {speed['q75']:.2f})",
        f"{size['ratio']:.3f}",
        f"{losses['largest_relative_difference']:.0e}"
        + ("" if losses["same"] else " (not the same)"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, keep and print; or print what was kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--table", action="store_true", help="print the kept result; measure nothing"
    )
    parser.add_argument("--only", default="", help="names of pairs, separated by commas")
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args(arguments)
    if asked.table:
        result = json.loads(asked.out.read_text())
    else:
        wanted = asked.only.split(",") if asked.only else [pair.title for pair in PAIRS]
        unknown = sorted(set(wanted) - {pair.title for pair in PAIRS})
        if unknown:
            parser.error(
                f"no pair {', '.join(unknown)}; there are:"
                f" {', '.join(pair.title for pair in PAIRS)}"
            )
        result = bench(
            Settings(repeats=asked.repeats),
            [pair for pair in PAIRS if pair.title in wanted],
            asked.threads,
        )
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(asked.out, json.dumps(result, indent=1))
    print(json.dumps(result, indent=1) if asked.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
