"""What the tables say, in sentences computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ..runs.folder import Run
from . import tables


def takeaways(runs: Sequence[Run]) -> list[str]:
    """The answers, most asked for first. Each holds its figures; none is said without them."""
    done = [run for run in runs if run.ok]
    said = [
        _failed(runs),
        _memory(done),
        _speed(done),
        *_learned(done),
        _transfer(done),
        _identical(done),
    ]
    return [sentence for sentence in said if sentence]


def one_run(run: Run) -> str:
    """A finished run in one sentence, for the end of its notebook."""
    yesno, peak = _cell(run, "yesno"), run.result.get("peak")
    memory = (
        f"{peak['peak_bytes'] / tables.MIB:.1f} MiB at the peak of a step ({peak['phase']}), "
        if peak
        else ""
    )
    return (
        f"**{run.name}**: {memory}{run.result['speed']['tokens_per_s']:,.0f} tokens/s, balanced"
        f" accuracy in {run.params['train_domain']} {_with(yesno)} by yes/no and"
        f" {_with(_cell(run, 'likelihood'))} by likelihood."
        + "".join(f" {said}" for said in written(run))
    )


def written(run: Run) -> list[str]:
    """What became of the claims that the model wrote, a sentence for each judge, domain and
    shift."""
    said = run.result.get("generation", {})
    by = {
        "oracle": "the grammar that made the document finds",
        "checker": f"the checker {said.get('checker')} calls",
    }
    return [
        f"Of {row['n']} claims it wrote in {row['domain']} ({row['shift']}), {by[row['judge']]}"
        f" {row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}] consistent."
        for row in said.get("shares", ())
        if row["call"] == "consistent"
    ]


def _failed(runs: Sequence[Run]) -> str:
    wrong = [
        f"{run.name} ({run.result['outcome']}: {run.result['reason']})"
        for run in runs
        if not run.ok
    ]
    return f"{len(wrong)} of {len(runs)} runs did not finish: {'; '.join(wrong)}." if wrong else ""


def _trained(runs: Sequence[Run]) -> pd.DataFrame:
    return tables.summary([run for run in runs if run.result["trainable_parameters"]])


def _memory(runs: Sequence[Run]) -> str:
    trained = _trained(runs)
    trained = trained if trained.empty else trained.dropna(subset=["peak_mib"])
    if trained.empty:
        return ""
    least = trained.loc[trained["peak_mib"].idxmin()]
    full = trained[trained["regime"] == tables.REFERENCE]
    whole = full["peak_mib"].iloc[0] if len(full) else None
    versus = f", {least['peak_mib'] / whole:.0%} of full's {whole:.1f} MiB" if whole else ""
    host = f" (and {least['host_mib']:.1f} MiB in host memory)" if least["host_mib"] else ""
    return (
        f"Least device memory among the regimes that train: {least['regime']},"
        f" {least['peak_mib']:.1f} MiB at its peak in {least['phase']}{host}{versus}."
    )


def _speed(runs: Sequence[Run]) -> str:
    trained = _trained(runs)
    if trained.empty:
        return ""
    fast, slow = (trained.loc[trained["tokens_per_s"].agg(pick)] for pick in ("idxmax", "idxmin"))
    return (
        f"Fastest: {fast['regime']}, {fast['tokens_per_s']:,.0f} tokens/s; slowest:"
        f" {slow['regime']}, {slow['tokens_per_s']:,.0f}"
        f" ({slow['tokens_per_s'] / fast['tokens_per_s']:.0%} of it)."
    )


def _learned(runs: Sequence[Run]) -> list[str]:
    """Full fine-tuning against the base it began from, and against the overlap judges, in the
    training domain."""
    by_name = {run.name: run for run in runs}
    full, base = by_name.get(tables.REFERENCE), by_name.get("zero_shot")
    if not full or not base:
        return []
    home, paired = full.params["train_domain"], tables.against_reference([full, base])
    said = []
    for scoring, label in (("yesno", "yes/no"), ("likelihood", "likelihood")):
        one, other = (_cell(run, scoring) for run in (full, base))
        row = paired[(paired["scoring"] == scoring) & (paired["place"] == home)].iloc[0]
        clearly = (
            "clearly above" if row["high"] < 0 and row["mcnemar_p"] < 0.05 else "not clearly above"
        )
        gap = f"{-row['difference']:+.3f} [{-row['high']:+.3f}, {-row['low']:+.3f}]"
        said.append(
            f"In {home}, {label}: full reaches {_with(one)}, {clearly} zero_shot's {_with(other)}"
            f" (paired difference {gap}, exact McNemar p = {row['mcnemar_p']:.2g})."
        )
    return [*said, _over_baselines(full)]


def _over_baselines(full: Run) -> str:
    best = max(
        (_cell(full, scoring) for scoring in ("yesno", "likelihood")),
        key=lambda cell: cell["value"],
    )
    bars = {name: _cell(full, name) for name in ("unigram_overlap", "bigram_overlap")}
    highest = max(bars, key=lambda name: bars[name]["value"])
    above = "above" if best["low"] > bars[highest]["high"] else "NOT above"
    return (
        f"full's better score ({best['scoring']}, {_with(best)}) is {above} the interval of the"
        f" better overlap judge ({highest.replace('_', ' ')}, {_with(bars[highest])}); claim only:"
        f" {_with(_cell(full, 'claim_only'))}."
    )


def _cell(run: Run, scoring: str) -> pd.Series:
    frame = tables.in_domain(run)
    return frame[frame["scoring"] == scoring].iloc[0]


def _with(cell: pd.Series) -> str:
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


def _transfer(runs: Sequence[Run]) -> str:
    frame = tables.accuracy(runs)
    by_name = {run.name: run for run in runs}
    if tables.REFERENCE not in by_name or "zero_shot" not in by_name:
        return ""
    home = by_name[tables.REFERENCE].params["train_domain"]
    rows = frame[(frame["shift"] == "severe") & (frame["scoring"] == "yesno")].pivot(
        index="place", columns="judge", values="value"
    )
    parts = [
        f"{where} {row[tables.REFERENCE]:.3f} (zero_shot {row['zero_shot']:.3f})"
        for where, row in rows.iterrows()
    ]
    return f"Out of domain after training on {home}, yes/no: {', '.join(parts)}." if parts else ""


def _identical(runs: Sequence[Run]) -> str:
    by_name = {run.name: run for run in runs}
    full = by_name.get(tables.REFERENCE)
    parts = []
    for name in ("checkpoint", "offload"):
        if full and name in by_name and len(by_name[name].steps) == len(full.steps):
            gap = (by_name[name].steps["loss"] - full.steps["loss"]).abs().max()
            parts.append(f"{name} {gap:.1e}")
    return (
        "Largest difference of any step's loss from full's, which the law says is 0:"
        f" {', '.join(parts)}."
        if parts
        else ""
    )


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before quoting a figure."""
    seeds = {run.params.get("seed", 0) for run in runs}
    said = [
        "Every figure not marked `predicted` was measured on the CPU named below, at the small"
        " model's shape. Sizes and speeds of a GPU and of a 7B are others, and at another shape the"
        " order of the regimes can be another too."
    ]
    if len(seeds) == 1:
        said.append(
            f"Item interval only: one training seed ({seeds.pop()}), so the intervals hold what"
            " other documents would change, not what another seed would."
        )
    notes = dict.fromkeys(note for run in runs for note in run.result.get("notes", []))
    return [*said, *(f"{note[0].upper()}{note[1:]}." for note in notes)]
