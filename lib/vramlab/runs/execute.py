"""One run: a model, a regime, a data set -> a folder from which every figure can be drawn again.

Three passes, because a watched step is not the step: the learning pass is timed and scored with
nothing in its way; the metered pass repeats two steps on a fresh copy under the event meter; the
measured pass repeats them in a process of its own, whose allocator returns memory to the OS at
once, so that the OS's peak is the truth.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
import yaml

from .. import machine
from ..capture import oom
from ..capture.energy import per_tokens
from ..capture.nvml import find
from ..capture.nvml_sampler import Sampler
from ..factcc.checker import Checker
from ..factcc.statistics import MODEL_SCORINGS, summarise
from ..files import write_table, write_whole
from ..forecast import what_fits
from ..processes import MALLOC_ENV, Child, take_turn
from ..regimes import sharded
from ..regimes.parameters import run_row, run_spec
from ..regimes.place.place import alone
from ..regimes.regime import check_machine
from ..training.trainer import Diverged
from . import evaluate, learning, passes, preparation
from .folder import seal_run
from .parameters import KNOWN_PARAMETERS, SCHEMA, config_hash, resolve

RESERVED_BYTES = 64 << 10
"""Room for the result, taken at the start of a run: the disk may be full when it ends."""


def execute(params: Mapping, out_dir: Path | str, progress: bool = True) -> Path:
    """Do the run and write its folder. Returns the folder; `result.json`, which is written after
    the tables, says how the run ended.

    Running out of memory is a result (`outcome: oom`), and so is a loss, weight or score that is
    not finite (`diverged`, with the step): nothing of such a run is scored. Any other error, also a
    lost card or a full disk, is recorded (`outcome: failed`) and raised; no file is left half
    written.
    """
    full, folder = resolve(params), Path(out_dir)
    if full["device"] != "cpu" or run_spec(full).path:
        take_turn()  # a card's memory, and the host's with published weights, has room for one run
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / "result.json", *folder.glob("*.part")):  # parts: a killed run left them
        path.unlink(missing_ok=True)
    if full["threads"]:
        torch.set_num_threads(full["threads"])
    _reserve(folder / "result.json")
    result = _describe(params, full, folder)
    try:
        with alone(run_row(full).place), oom.watched(full["device"]):
            result |= {"outcome": "ok", "reason": "", **_passes(full, folder, progress)}
    except Diverged as error:
        where = {"step": error.step, "what": error.what}
        result |= {"outcome": "diverged", "reason": f"Diverged: {error}", "diverged": where}
    except Exception as error:  # Ctrl-C is no Exception: such a run has not ended
        ended = "oom" if out_of_memory(error) else "failed"
        result |= {"outcome": ended, "reason": f"{type(error).__name__}: {error}"}
        if ended == "failed":
            raise
        result["oom"] = what_fits.evidence(full, oom.record_of(error))
    finally:
        if "outcome" in result:
            _write_reserved(folder / "result.json", json.dumps(result, indent=1))
        (folder / "result.json.part").unlink(missing_ok=True)
    seal_run(folder)
    return folder


def _describe(params: Mapping, full: Mapping, folder: Path) -> dict:
    """Write `params.yml` and `env.json`; return the head of the result."""
    named = {**full, "run_id": folder.name, "sweep": folder.parent.name}
    write_whole(folder / "params.yml", yaml.safe_dump(named, sort_keys=False))
    environment = {
        **machine.record(full["device"]),
        "seed": full["seed"],
        "config_hash": config_hash(params),
    }
    write_whole(folder / "env.json", json.dumps(environment, indent=1))
    return {
        "schema": SCHEMA,
        "run_id": folder.name,
        "regime": full["regime"],
        "model": full["model"],
        "measured_on": environment["device"]["kind"],
        "device": environment["device"]["name"],
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def _passes(params: dict, folder: Path, progress: bool) -> dict:
    check_machine(run_row(params), params["device"])  # before a base is made for nothing
    if params["checker"]:
        Checker.load(params["checker"])  # a wrong one fails before anything is trained
    measuring = params["measure"] and params["device"] == "cpu"  # the system sees no card's bytes
    # started first, so that it does not load while training is timed
    target, quiet = "vramlab.runs.passes:measured", subprocess.DEVNULL
    with Child(target, MALLOC_ENV, quiet) if measuring else nullcontext() as process:
        prepared = preparation.prepare(params, progress)
        take_turn()
        if process:
            process.wait_until_loaded()
        return _learned(params, prepared, process, folder, progress)


def _learned(
    params: dict,
    prepared: preparation.Prepared,
    process: Child | None,
    folder: Path,
    progress: bool,
) -> dict:
    # with a limit, the metered pass comes first: what does not fit is not trained either
    metered = passes.meter(prepared) if params["limit_mib"] else None
    sampler = Sampler(find(params["device"]))
    try:
        with sampler:
            learned, trained = learning.learn(prepared, progress)
    finally:
        peaks = _keep_samples(sampler, folder)
    write_table(learned.steps, folder / "steps.parquet")
    if len(learned.probes):
        write_table(learned.probes, folder / "probes.parquet")
    if process:  # nothing is timed any more, and it counts its own bytes only: beside the scoring
        process.send({name: params[name] for name in KNOWN_PARAMETERS}, limit_s=600)
    scores = evaluate.score(trained, prepared, progress)
    if not torch.tensor(scores[[*MODEL_SCORINGS]].to_numpy()).isfinite().all():
        raise Diverged(
            params["steps"] - 1,
            "scores",
            "the trained model's scores are not finite, though every loss was",
        )
    written = evaluate.write(trained, prepared, progress) if params["generate"] else None
    weights_hash = sharded.weights_hash(trained)
    del trained
    write_table(scores, folder / "scores.parquet")
    write_table(summarise(scores), folder / "accuracy.parquet")
    result = {
        **learned.result,
        "energy": per_tokens(learning.warm(learned.steps), sampler.frame()),
        "nvml": peaks,
        "base": prepared.base_record,
        "weights_hash": weights_hash,
        "host_bytes": 0,
        "truncated_share": float(scores["truncated"].mean()),
        "problems": prepared.data.problems,
        "notes": passes.notes(prepared),
    }
    if written:
        result["generation"] = evaluate.judge(*written, params, folder, progress)
    if params["measure"]:
        metered = metered or passes.meter(prepared)
        result |= _memory(metered, process, params["device"], folder)
    return result


def _keep_samples(sampler: Sampler, folder: Path) -> dict:
    """Write `nvml.parquet`; return its peaks. A disk without room for it does not end the run."""
    frame, notes = sampler.frame(), sampler.said
    try:
        if len(frame):
            write_table(frame, folder / "nvml.parquet")
    except OSError as error:
        notes = [*notes, f"nvml.parquet: not written: {error}"]
    peaks = {f"{name}_peak_bytes": _largest(frame[f"{name}_bytes"]) for name in ("used", "process")}
    return {
        **peaks,
        "reserved_bytes": _largest(frame["reserved_bytes"]),
        "samples": len(frame),
        "process_method": sampler.reader.process_method,
        "said": notes,
    }


def _largest(sizes: pd.Series) -> int | None:
    return int(sizes.max()) if sizes.notna().any() else None


def _memory(metered: passes.Metered, process: Child | None, device: str, folder: Path) -> dict:
    """Write `timeline.parquet`; return the results of both memory passes."""
    write_table(metered.events, folder / "timeline.parquet")
    if process:
        measured = {**process.result().to_dict(), "allocator": MALLOC_ENV}
    else:
        reason = f"N/A: the operating system sees host memory, and the run is on {device}"
        measured = {"outcome": "n/a", "reason": reason}
    peak_bytes = metered.result["peak"]["peak_bytes"]
    peaks = {"meter": peak_bytes, "process": measured.get("peak_bytes")}
    return {**metered.result, "process": measured, "peak_bytes": peaks}


def _reserve(path: Path) -> None:
    """Take room for the result. On a file system that copies on write, it is not guaranteed."""
    content = os.urandom(RESERVED_BYTES)  # zeros may take no room
    path.with_name(path.name + ".part").write_bytes(content)


def _write_reserved(path: Path, text: str) -> None:
    """Write into the reserved room, so that a disk that has become full has room for it."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "r+b" if partial.exists() else "wb") as file:
        file.write(text.encode())
        file.truncate()
    os.replace(partial, path)
