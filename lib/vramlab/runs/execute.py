"""One run: a model, a regime, a data set -> a folder from which every figure can be drawn again.

Three passes, because a watched step is not the step: the learning pass is timed and scored with
nothing in its way; the metered pass repeats two steps on a fresh copy under the event meter; the
measured pass repeats them in a process of its own, whose allocator returns memory to the OS at
once, so that the OS's peak is the truth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
import yaml

from .. import machine as environment
from ..capture import oom
from ..capture.energy import per_tokens
from ..capture.nvml import find
from ..capture.nvml_sampler import Sampler
from ..factcc.checker import Checker
from ..factcc.statistics import MODEL_SCORINGS, summarise
from ..files import write_table, write_whole
from ..forecast import what_fits as fitting
from ..processes import MALLOC_ENV, MeasuredProcess, take_turn
from ..regimes import sharded
from ..regimes.parameters import run_row, run_spec
from ..regimes.place.place import alone
from ..regimes.regime import check_machine
from ..training.trainer import Diverged
from . import evaluate as exam
from . import passes
from .parameters import KNOWN_PARAMETERS, SCHEMA, config_hash, resolve

RESERVED_BYTES = 64 << 10
"""Of a run's folder for its result from the start: a disk may be full when it ends."""


def execute(params: Mapping, out_dir: Path | str, progress: bool = True) -> Path:
    """Do the run and write its folder. Returns the folder; `result.json`, written last, says how it
    ended.

    Running out of memory is a result (`outcome: oom`), and so is a loss, weight or score that is
    not finite (`diverged`, with the step): nothing of such a run is scored. Any other error, a lost
    card or a full disk too, is recorded (`outcome: failed`) and raised; the files that are there
    are whole.
    """
    full = resolve(params)
    if (
        full["device"] != "cpu" or run_spec(full).path
    ):  # a card's memory, and published weights on the host, are one run's
        take_turn()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (
        folder / "result.json",
        *folder.glob("*.part"),
    ):  # the second: of a run that was killed
        old.unlink(missing_ok=True)
    if full["threads"]:
        torch.set_num_threads(full["threads"])
    _reserve(folder / "result.json")
    named = {**full, "run_id": folder.name, "sweep": folder.parent.name}
    write_whole(folder / "params.yml", yaml.safe_dump(named, sort_keys=False))
    env = {
        **environment.record(full["device"]),
        "seed": full["seed"],
        "config_hash": config_hash(params),
    }
    write_whole(folder / "env.json", json.dumps(env, indent=1))
    result = {
        "schema": SCHEMA,
        "run_id": folder.name,
        "regime": full["regime"],
        "model": full["model"],
        "measured_on": env["device"]["kind"],
        "device": env["device"]["name"],
    }
    try:
        with alone(run_row(full).place), oom.watched(full["device"]):
            result |= {"outcome": "ok", "reason": "", **_passes(full, folder, progress)}
    except Exception as error:  # an interruption is none: the run is simply not there
        ended = (
            "oom"
            if out_of_memory(error)
            else "diverged"
            if isinstance(error, Diverged)
            else "failed"
        )
        result |= {"outcome": ended, "reason": f"{type(error).__name__}: {error}"}
        if ended == "failed":
            raise
        result[ended] = (
            fitting.evidence(full, oom.record_of(error))
            if ended == "oom"
            else {"step": error.step, "what": error.what}
        )
    finally:
        if "outcome" in result:
            _write_reserved(folder / "result.json", json.dumps(result, indent=1))
        (folder / "result.json.part").unlink(missing_ok=True)
    return folder


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def _passes(params: dict, folder: Path, progress: bool) -> dict:
    check_machine(run_row(params), params["device"])  # before a base is made for nothing
    if params["checker"]:
        Checker.load(params["checker"])  # to fail now, if it does
    # started first, so that nothing is loaded any more when training is timed; a card's bytes the
    # operating system does not see
    wanted = params["measure"] and params["device"] == "cpu"
    with MeasuredProcess("vramlab.runs.passes:measured") if wanted else nullcontext() as process:
        prepared = passes.prepare(params, progress)
        take_turn()
        if process:
            process.wait_until_loaded()
        return _learned(params, prepared, process, folder, progress)


def _learned(
    params: dict,
    prepared: passes.Prepared,
    process: MeasuredProcess | None,
    folder: Path,
    progress: bool,
) -> dict:
    # a device with a limit: what does not fit is not trained either
    metered = passes.meter(prepared) if params["limit_mib"] else None
    sampler = Sampler(find(params["device"]))
    try:
        with sampler:
            learned, trained = passes.learn(prepared, progress)
    finally:
        seen = _keep_samples(sampler, folder)
    write_table(learned.steps, folder / "steps.parquet")
    if len(learned.probes):
        write_table(learned.probes, folder / "probes.parquet")
    # from here on nothing is timed: the measured process, which only wants its own bytes, may run
    # beside the scoring
    with ThreadPoolExecutor(1) as beside:
        measured = beside.submit(_measured, params, process) if params["measure"] else None
        scores = exam.score(trained, prepared, progress)
        if not torch.tensor(scores[[*MODEL_SCORINGS]].to_numpy()).isfinite().all():
            raise Diverged(
                params["steps"] - 1,
                "scores",
                "the trained model's scores are not finite, though every loss was",
            )
        written = exam.write(trained, prepared, progress) if params["generate"] else None
        weights_hash = sharded.weights_hash(trained)
        del trained
        write_table(scores, folder / "scores.parquet")
        write_table(summarise(scores), folder / "accuracy.parquet")
        result = {
            **learned.result,
            "energy": per_tokens(passes.warm(learned.steps), sampler.frame()),
            "nvml": seen,
            "base": prepared.base_record,
            "weights_hash": weights_hash,
            "host_bytes": 0,
            "truncated_share": float(scores["truncated"].mean()),
            "problems": prepared.data.problems,
            "notes": passes.notes(prepared),
        }
        if written:
            result["generation"] = exam.judge(*written, params, folder, progress)
        return {
            **result,
            **(_memory(metered or passes.meter(prepared), measured, folder) if measured else {}),
        }


def _keep_samples(sampler: Sampler, folder: Path) -> dict:
    """`nvml.parquet`, and of it what a reader asks first. A disk without room for it does not end
    the run."""
    frame, said = sampler.frame(), sampler.notes
    try:
        if len(frame):
            write_table(frame, folder / "nvml.parquet")
    except OSError as error:
        said = [*said, f"nvml.parquet: not written: {error}"]
    peaks = {f"{name}_peak_bytes": _largest(frame[f"{name}_bytes"]) for name in ("used", "process")}
    return {
        **peaks,
        "reserved_bytes": _largest(frame["reserved_bytes"]),
        "samples": len(frame),
        "process_method": sampler.reader.process_method,
        "said": said,
    }


def _largest(sizes: pd.Series) -> int | None:
    return int(sizes.max()) if sizes.notna().any() else None


def _memory(metered: passes.Metered, measured: Future, folder: Path) -> dict:
    """What both memory passes saw."""
    write_table(metered.events, folder / "timeline.parquet")
    process = measured.result()
    peaks = {"meter": metered.result["peak"]["peak_bytes"], "process": process.get("peak_bytes")}
    return {**metered.result, "process": process, "peak_bytes": peaks}


def _measured(params: dict, process: MeasuredProcess | None) -> dict:
    """The OS's own figure for the same two steps, from a process that does nothing else."""
    if process is None:
        return {
            "outcome": "n/a",
            "reason": (
                f"N/A: the operating system sees host memory, and the run is on {params['device']}"
            ),
        }
    answer = process.call({name: params[name] for name in KNOWN_PARAMETERS}, timeout_s=600)
    return {**answer, "allocator": MALLOC_ENV}


def _reserve(path: Path) -> None:
    """Room for the result, taken while there is some. A file system that copies on write gives no
    such promise."""
    path.with_name(path.name + ".part").write_bytes(
        os.urandom(RESERVED_BYTES)
    )  # zeros may take no room


def _write_reserved(path: Path, text: str) -> None:
    """Into the reserved room, so that a disk that has become full holds it too."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "r+b" if partial.exists() else "wb") as file:
        file.write(text.encode())
        file.truncate()
    os.replace(partial, path)
