"""What the tables say, in sentences computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..runs.folder import Run
from . import tables
from .tables import MIB, REFERENCE


def takeaways(runs: Sequence[Run]) -> list[str]:
    """The answers, most wanted first, each with its numbers; an answer whose runs are missing is
    left out."""
    done = [run for run in runs if run.ok]
    by_name = {run.name: run for run in done}
    sentences = [
        _failed(runs),
        *_memory_and_speed(done),
        *_learned(by_name),
        _identical(by_name),
    ]
    return [sentence for sentence in sentences if sentence]


def one_run(run: Run) -> str:
    """A finished run in one sentence, for the end of its notebook."""
    scores, peak = tables.in_domain(run), run.result.get("peak")
    memory = (
        f"{peak['peak_bytes'] / MIB:.1f} MiB at the peak of a step ({peak['phase']}), "
        if peak
        else ""
    )
    return (
        f"**{run.name}**: {memory}{run.result['speed']['tokens_per_s']:,.0f} tokens/s, balanced"
        f" accuracy in {run.params['train_domain']} {_interval(scores.loc['yesno'])} by yes/no and"
        f" {_interval(scores.loc['likelihood'])} by likelihood."
        + "".join(f" {sentence}" for sentence in written(run))
    )


def peak_sentences(run: Run) -> list[str]:
    """The peak, its largest categories and its largest owners, a line each."""
    peak = run.result["peak"]
    categories = list(peak["categories"].items())[:3]
    owners = [f"{_owner(owner)} {owner['bytes'] / MIB:.1f}" for owner in peak["owners"][:3]]
    return [
        f"<b>peak {peak['peak_bytes'] / MIB:.1f} MiB, {peak['phase']} of step {peak['step']}</b>",
        ", ".join(f"{category} {size / MIB:.1f}" for category, size in categories),
        *(f"largest: {owner}" for owner in owners[:1]),
        *owners[1:],
    ]


def _owner(owner: dict) -> str:
    """A module's weight by its name; anything else by module and operation."""
    op = owner["op"].split(".")[1] if "." in owner["op"] else ""
    return f"{owner['module'] or 'the loss'} {op} ({owner['category']})".replace("  ", " ")


def written(run: Run) -> list[str]:
    """What became of the claims that the model wrote, a sentence for each judge, domain and
    shift."""
    generation = run.result.get("generation", {})
    judges = {
        "oracle": "the grammar that made the document finds",
        "checker": f"the checker {generation.get('checker')} calls",
    }
    return [
        f"Of {row['n']} claims it wrote in {row['domain']} ({row['shift']}), {judges[row['judge']]}"
        f" {row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}] consistent."
        for row in generation.get("shares", ())
        if row["call"] == "consistent"
    ]


def _failed(runs: Sequence[Run]) -> str:
    failed = [
        f"{run.name} ({run.result['outcome']}: {run.result['reason']})"
        for run in runs
        if not run.ok
    ]
    return (
        f"{len(failed)} of {len(runs)} runs did not finish: {'; '.join(failed)}." if failed else ""
    )


def _memory_and_speed(runs: Sequence[Run]) -> list[str]:
    """Of the runs that train: which holds least memory, and which are fastest and slowest."""
    trained = tables.summary([run for run in runs if run.result["trainable_parameters"]])
    if trained.empty:
        return []
    metered = trained.dropna(subset=["peak_mib"])
    fast, slow = (trained.loc[trained["tokens_per_s"].agg(pick)] for pick in ("idxmax", "idxmin"))
    return [
        "" if metered.empty else _memory(metered),
        f"Fastest: {fast['regime']}, {fast['tokens_per_s']:,.0f} tokens/s; slowest:"
        f" {slow['regime']}, {slow['tokens_per_s']:,.0f}"
        f" ({slow['tokens_per_s'] / fast['tokens_per_s']:.0%} of it).",
    ]


def _memory(metered: pd.DataFrame) -> str:
    least = metered.loc[metered["peak_mib"].idxmin()]
    full = metered.loc[metered["regime"] == REFERENCE, "peak_mib"]
    versus = "".join(
        f", {least['peak_mib'] / peak:.0%} of full's {peak:.1f} MiB" for peak in full[:1] if peak
    )
    host = f" (and {least['host_mib']:.1f} MiB in host memory)" if least["host_mib"] else ""
    return (
        f"Least device memory among the regimes that train: {least['regime']},"
        f" {least['peak_mib']:.1f} MiB at its peak in {least['phase']}{host}{versus}."
    )


def _learned(runs: Mapping[str, Run]) -> list[str]:
    """Full fine-tuning against the base it began from and against the overlap judges, in the
    training domain, and against the base outside."""
    if not {REFERENCE, "zero_shot"} <= runs.keys():
        return []
    full, base = runs[REFERENCE], runs["zero_shot"]
    home, paired = full.params["train_domain"], tables.against_reference([full, base])
    sentences = []
    for scoring, label in (("yesno", "yes/no"), ("likelihood", "likelihood")):
        tuned, untuned = (_interval(tables.in_domain(run).loc[scoring]) for run in (full, base))
        row = paired[(paired["scoring"] == scoring) & (paired["place"] == home)].iloc[0]
        above = row["high"] < 0 and row["mcnemar_p"] < 0.05
        sentences.append(
            f"In {home}, {label}: full reaches {tuned}, {'' if above else 'not '}clearly above"
            f" zero_shot's {untuned} (paired difference {-row['difference']:+.3f}"
            f" [{-row['high']:+.3f}, {-row['low']:+.3f}], exact McNemar p ="
            f" {row['mcnemar_p']:.2g})."
        )
    return [*sentences, _over_baselines(full), _transfer(runs)]


def _over_baselines(full: Run) -> str:
    scores = tables.in_domain(full)
    best, judge = (
        scores.loc[scores.loc[names, "value"].idxmax()]
        for names in (list(tables.SCORINGS), ["unigram_overlap", "bigram_overlap"])
    )
    return (
        f"full's better score ({best.name}, {_interval(best)}) is"
        f" {'above' if best['low'] > judge['high'] else 'NOT above'} the interval of the better"
        f" overlap judge ({judge.name.replace('_', ' ')}, {_interval(judge)}); claim only:"
        f" {_interval(scores.loc['claim_only'])}."
    )


def _interval(score: pd.Series) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _transfer(runs: Mapping[str, Run]) -> str:
    """Full fine-tuning and the base outside the training domain."""
    frame = tables.accuracy(list(runs.values()))
    rows = frame[(frame["shift"] == "severe") & (frame["scoring"] == "yesno")]
    values = rows.pivot(index="place", columns="judge", values="value")
    places = ", ".join(
        f"{where} {row[REFERENCE]:.3f} (zero_shot {row['zero_shot']:.3f})"
        for where, row in values.iterrows()
    )
    home = runs[REFERENCE].params["train_domain"]
    return f"Out of domain after training on {home}, yes/no: {places}." if places else ""


def _identical(runs: Mapping[str, Run]) -> str:
    """How far the losses of regimes that change no arithmetic are from full fine-tuning's."""
    names = [name for name in (REFERENCE, "checkpoint", "offload") if name in runs]
    losses = {name: runs[name].steps["loss"] for name in names}
    reference = losses.pop(REFERENCE, ())
    gaps = ", ".join(
        f"{name} {(loss - reference).abs().max():.1e}"
        for name, loss in losses.items()
        if len(loss) == len(reference)
    )
    law = "Largest difference of any step's loss from full's, which the law says is 0:"
    return f"{law} {gaps}." if gaps else ""


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before quoting a figure."""
    seeds = {run.params.get("seed", 0) for run in runs}
    sentences = [
        "Every figure not marked `predicted` was measured on the CPU named below, at the small"
        " model's shape. Sizes and speeds of a GPU and of a 7B are others, and at another shape the"
        " order of the regimes can be another too."
    ]
    if len(seeds) == 1:
        sentences.append(
            f"Item interval only: one training seed ({seeds.pop()}), so the intervals hold what"
            " other documents would change, not what another seed would."
        )
    notes = dict.fromkeys(note for run in runs for note in run.result.get("notes", []))
    return [*sentences, *(f"{note[0].upper()}{note[1:]}." for note in notes)]
