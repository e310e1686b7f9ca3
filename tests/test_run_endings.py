"""However the driver, the card or the disk ends in mid-run, the folder can be read: every file in
it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fake_nvml
from conftest import SMALL
from fake_nvml import GIB, Card, install
from vramlab.capture import energy, nvml
from vramlab.capture import nvml_sampler as sampler
from vramlab.capture.nvml import COLUMNS
from vramlab.runs import execute as run
from vramlab.runs import learning
from vramlab.runs.execute import execute
from vramlab.runs.folder import Run

QUICK = {**SMALL, "regime": "lomo", "measure": False}


@pytest.fixture
def card(monkeypatch):
    """A card beside a run on the CPU, sampled fast. The run is a real one; the card is not."""
    held = Card(processes={os.getpid(): GIB}, others=GIB)

    def find(device):
        with pytest.MonkeyPatch.context() as torch_sees_it:
            library = install(torch_sees_it, held)
            reader = nvml.find("cuda:0")
        monkeypatch.setattr(nvml.library(), "nvmlLib", library)
        monkeypatch.setattr(nvml.library(), "_nvmlGetFunctionPointer_cache", {})
        return reader

    monkeypatch.setattr(fake_nvml.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(run, "find", find)
    monkeypatch.setattr(run, "Sampler", lambda reader: sampler.Sampler(reader, period_s=0.003))
    return held


def readable(folder: Path) -> Run:
    """Every file of the folder opens, and none is a part of one."""
    assert not list(folder.glob("*.part"))
    for table in folder.glob("*.parquet"):
        assert len(pd.read_parquet(table))
    found = Run(folder)
    assert (
        found.result["outcome"]
        and found.params["regime"] == "lomo"
        and found.environment["versions"]
    )
    return found


def test_a_run_beside_a_card_keeps_its_samples_on_the_clock_of_its_steps(card, tmp_path):
    found = readable(execute(QUICK, tmp_path / "r", progress=False))
    samples = found.samples
    assert list(samples) == ["t_s", *COLUMNS]
    steps, during = found.steps, samples["t_s"]
    assert (
        during.min() < steps["t_s"].iloc[0]
        and steps["t_s"].iloc[-1] + steps["step_s"].iloc[-1] < during.max()
    )
    inside = during.between(steps["t_s"].iloc[0], steps["t_s"].iloc[-1])
    assert inside.sum() >= 3
    seen = found.result["nvml"]
    assert seen == {
        "used_peak_bytes": 2 * GIB,
        "process_peak_bytes": GIB,
        "reserved_bytes": GIB // 2,
        "samples": len(samples),
        "process_method": "listed under its own number",
        "said": [],
    }
    told = found.result["energy"]
    assert told["j_per_1000_tokens"] is None and "2 s are the shortest" in told["how"]


def test_joules_for_a_thousand_tokens_are_in_the_result(card, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "SHORTEST_S", 0.02)  # a short run: with the counter as much faster
    monkeypatch.setattr(fake_nvml, "TICK_S", 0.001)
    found = Run(execute(QUICK, tmp_path / "r", progress=False))
    told, warm = found.result["energy"], found.steps.iloc[1:]
    window_s = warm["t_s"].iloc[-1] + warm["step_s"].iloc[-1] - warm["t_s"].iloc[0]
    true = 300.0 * window_s / warm["tokens"].sum() * 1000
    assert told["how"] == "the card's counter" and told["windows"] >= 1
    assert (
        abs(told["j_per_1000_tokens"] - true) <= told["error_j_per_1000_tokens"]
        and told["start_temperature_c"] == 41
    )


def test_steps_that_nobody_sampled_have_no_joules(card, tmp_path, monkeypatch):
    learn = learning.learn

    def longer(*given):  # as if each step had taken a second
        learned, model = learn(*given)
        learned.steps["t_s"] = learned.steps["t_s"].iloc[0] + 1.0 * learned.steps["step"]
        learned.steps["step_s"] = 1.0
        return learned, model

    monkeypatch.setattr(learning, "learn", longer)
    told = Run(execute(QUICK, tmp_path / "r", progress=False)).result["energy"]
    assert told["j_per_1000_tokens"] is None and "do not span" in told["how"]


def test_without_a_card_the_result_says_why_and_there_is_no_file(tmp_path):
    found = readable(execute(QUICK, tmp_path / "r", progress=False))
    assert not (found.folder / "nvml.parquet").exists() and found.samples.empty
    assert found.result["nvml"]["used_peak_bytes"] is None
    assert (
        "the device is cpu" in found.result["nvml"]["said"][0]
        and found.result["energy"]["j_per_1000_tokens"] is None
    )


def test_a_card_lost_to_nvml_costs_the_rest_of_the_samples(card, tmp_path, monkeypatch):
    learn = learning.learn

    def lose(*given):
        card.error = fake_nvml.LOST
        return learn(*given)

    monkeypatch.setattr(learning, "learn", lose)
    found = readable(execute(QUICK, tmp_path / "r", progress=False))
    assert found.ok and "the card was lost" in found.result["nvml"]["said"][-1]


def test_a_sampling_thread_that_dies_costs_the_rest_of_the_samples(card, tmp_path, monkeypatch):
    sample = nvml.CardReader.sample
    counted = []

    def dying(reader):
        counted.append(1)
        if len(counted) > 4:
            raise MemoryError("no thread lives for ever")
        return sample(reader)

    monkeypatch.setattr(nvml.CardReader, "sample", dying)
    found = readable(execute(QUICK, tmp_path / "r", progress=False))
    assert (
        found.ok
        and found.result["nvml"]["samples"] == 3
        and "no thread lives" in found.result["nvml"]["said"][-1]
    )


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("CUDA error: unspecified launch failure", "failed"),
        ("CUDA error: the GPU has fallen off the bus", "failed"),
    ],
)
def test_a_card_lost_to_training_leaves_what_the_driver_said_until_then(
    card, tmp_path, monkeypatch, error, outcome
):
    learn = learning.learn

    def lose(*given):
        learn(*given)
        raise RuntimeError(error)

    monkeypatch.setattr(learning, "learn", lose)
    with pytest.raises(RuntimeError, match="CUDA error"):
        execute(QUICK, tmp_path / "r", progress=False)
    found = readable(tmp_path / "r")
    assert found.result["outcome"] == outcome and error in found.result["reason"]
    assert len(pd.read_parquet(tmp_path / "r" / "nvml.parquet")) > 3


FULL = Path("/dev/full")
"""Whatever is written there finds a disk without room."""


@pytest.fixture
def full_for(monkeypatch, tmp_path):
    """From the learning pass on, the disk has no room for the file of this name."""
    if not FULL.exists():
        pytest.skip("no /dev/full on this system")
    learn = learning.learn

    def fill(name: str) -> None:
        def then(*given):
            (tmp_path / "r" / f"{name}.{os.getpid()}.part").symlink_to(FULL)
            return learn(*given)

        monkeypatch.setattr(learning, "learn", then)

    return fill


def test_no_room_for_the_samples_is_said_and_the_run_goes_on(card, full_for, tmp_path):
    full_for("nvml.parquet")
    found = readable(execute(QUICK, tmp_path / "r", progress=False))
    assert found.ok and not (found.folder / "nvml.parquet").exists()
    assert (
        "not written" in found.result["nvml"]["said"][-1]
        and "No space left" in found.result["nvml"]["said"][-1]
    )


@pytest.mark.parametrize("name", ["steps.parquet", "accuracy.parquet"])
def test_no_room_for_what_the_figures_need_is_a_failed_run_that_says_so(full_for, tmp_path, name):
    full_for(name)
    with pytest.raises(OSError) as raised:
        execute(QUICK, tmp_path / "r", progress=False)
    assert raised.value.errno == errno.ENOSPC
    found = readable(tmp_path / "r")
    assert found.result["outcome"] == "failed" and "No space left" in found.result["reason"]
    assert not (tmp_path / "r" / name).exists()


def test_parts_that_a_killed_run_left_are_gone_after_the_next(tmp_path):
    (tmp_path / "r").mkdir()
    for name in ("result.json.part", "probes.parquet.part"):
        (tmp_path / "r" / name).write_text("half")
    readable(execute(QUICK, tmp_path / "r", progress=False))


ON_A_FULL_DISK = """
import sys
from vramlab.runs import learning, preparation, execute as run

def learn(*_):
    with open("filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))

preparation.prepare, learning.learn = (lambda *_: None), learn
try:
    run.execute({"regime": "lomo"}, "r", progress=False)
except OSError as error:
    print(error.errno, *sorted(path.name for path in run.Path("r").iterdir()))
    print((run.Path("r") / "result.json").read_text())
"""


@pytest.mark.slow
def test_a_disk_that_has_become_full_still_holds_the_result():
    """On a real file system of 256 KiB, to its last byte."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("no mount namespace for a file system of its own here")
    mount = 'mount -t tmpfs -o size=256k none /mnt && cd /mnt && exec "$0" -c "$1"'
    lib = str(Path(run.__file__).parents[2])
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, sys.executable, ON_A_FULL_DISK],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": lib, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    first, _, written = done.stdout.partition("\n")
    assert first == f"{errno.ENOSPC} env.json params.yml result.json", done.stderr
    assert (
        json.loads(written)["outcome"] == "failed"
        and "No space left" in json.loads(written)["reason"]
    )
