"""What the driver says of a card, on every card and driver we know of, however it ends. The driver
is `fake_nvml`'s."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pynvml
import pytest
import torch

import fake_nvml
from fake_nvml import GIB, LACKS, OLD_DRIVER, Card, install
from vramlab import machine as environment
from vramlab.capture import nvml_process
from vramlab.capture.nvml import COLUMNS, CardReader, find
from vramlab.machine import driver

MINE = os.getpid()


def lacking(reader) -> set[str]:
    return {name for name, value in reader.sample().items() if value is None}


def reason(reader, name: str) -> str:
    return next(said for said in reader.notes if said.startswith(name))


@pytest.mark.parametrize(
    ("architecture", "missing"),
    [
        ("Pascal", {"energy_j"}),
        ("Volta", set()),
        ("Turing", set()),
        ("Ampere", set()),
        ("Ada", set()),
        ("Hopper", set()),
        ("Blackwell", set()),
        ("Grace Blackwell", {"used_bytes", "reserved_bytes"}),
        ("laptop", {"power_w", "energy_j"}),
    ],
)
def test_what_an_architecture_does_not_know_is_na_with_a_reason_and_the_rest_is_read(
    monkeypatch, architecture, missing
):
    install(monkeypatch, Card(architecture, processes={MINE: 3 * GIB}, others=GIB))
    reader = find("cuda:0")
    assert (
        lacking(reader) == missing
        and reader.card == f"NVIDIA {architecture}"
        and reader.driver == "570.00"
    )
    assert all("Not Supported" in reason(reader, name) for name in missing - {"reserved_bytes"})
    told = {
        "used_bytes": 4 * GIB,
        "reserved_bytes": GIB // 2,
        "process_bytes": 3 * GIB,
        "power_w": 300.0,
        "utilization": 0.87,
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "temperature_c": 41,
    }
    assert {name: reader.sample()[name] for name in told if name not in missing} == {
        name: value for name, value in told.items() if name not in missing
    }
    assert len(reader.notes) == len(missing - {"reserved_bytes"})  # nothing is said twice


@pytest.mark.parametrize(
    ("seconds", "watts", "joules"),
    [(1234.56, 300.0, 370_350.0), (0.05, 300.0, 0.0), (1000.05, 71.234, 71_234.0)],
)
def test_the_drivers_thousandths_are_joules_and_watts_exactly(monkeypatch, seconds, watts, joules):
    """The stand-in counts millijoules in steps of 100 ms from its own zero."""
    install(monkeypatch, Card(watts=watts, others=1, reserved=3, total=1001))
    monkeypatch.setattr(fake_nvml, "time", SimpleNamespace(perf_counter=lambda: seconds))
    reader = find("cuda:0")
    row = reader.sample()
    assert (row["energy_j"], row["power_w"]) == (joules, watts)
    assert (row["used_bytes"], row["reserved_bytes"], reader.total_bytes) == (1, 3, 1001)


@pytest.mark.parametrize(
    ("change_before", "change_after", "known"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (-1, -1, True)],
)
def test_a_process_rises_and_falls_by_a_block_to_the_byte_or_is_not_ours(
    monkeypatch, change_before, change_after, known
):
    card = Card(processes={7: 512, 8: 2 * GIB})

    @contextmanager
    def block(device):
        card.processes[7] += nvml_process.PROBE_BYTES - change_before
        yield
        card.processes[7] -= nvml_process.PROBE_BYTES - change_after

    monkeypatch.setattr(nvml_process, "block", block)
    install(monkeypatch, card, host=False)
    reader = find("cuda:0")
    assert reader.sample()["process_bytes"] == (
        512 - change_before + change_after if known else None
    )
    assert nvml_process.PROBE_BYTES == 2**28


def test_a_process_that_comes_with_the_block_counts_from_nothing(monkeypatch):
    card = Card(processes={7: GIB, 8: GIB})

    @contextmanager
    def block(device):
        card.processes[9] = nvml_process.PROBE_BYTES
        yield
        del card.processes[9]

    monkeypatch.setattr(nvml_process, "block", block)
    install(monkeypatch, card, host=False)
    assert "rose and fell" in find("cuda:0").process_method


@pytest.mark.parametrize(
    ("inode", "host"), [(4026531836, True), (4026531837, False), (4026532281, False)]
)
def test_a_kernels_first_namespace_has_a_fixed_number(monkeypatch, inode, host):
    real = os.stat
    own = "/proc/self/ns/pid"
    monkeypatch.setattr(
        os,
        "stat",
        lambda path, **rest: SimpleNamespace(st_ino=inode) if path == own else real(path, **rest),
    )
    assert nvml_process.in_host_namespace() == host


def test_every_architecture_of_the_stand_in_is_tested():
    marks = (
        test_what_an_architecture_does_not_know_is_na_with_a_reason_and_the_rest_is_read.pytestmark
    )
    assert {case[0] for case in marks[0].args[1]} == set(LACKS)


def test_nothing_is_asked_that_changes_a_card(monkeypatch):
    library = install(monkeypatch, Card(processes={MINE: GIB}))
    find("cuda").sample()
    reads = ("nvmlInit", "nvmlDeviceGet", "nvmlSystemGet", "nvmlErrorString")
    assert library.asked and all(name.startswith(reads) for name in library.asked)


def test_an_old_driver_has_its_own_bytes_in_used_and_the_older_list_of_processes(monkeypatch):
    install(monkeypatch, Card(processes={MINE: 3 * GIB}), missing=OLD_DRIVER)
    reader = find("cuda:0")
    now = reader.sample()
    assert (
        now["used_bytes"] == 3 * GIB + GIB // 2
        and now["reserved_bytes"] is None
        and now["process_bytes"] == 3 * GIB
    )
    assert "version 1" in reason(reader, "reserved_bytes") and reader.total_bytes == 80 * GIB


def test_the_card_is_torchs_by_its_uuid_whatever_the_order(monkeypatch):
    first = Card("Ampere", uuid="GPU-another", others=GIB)
    install(monkeypatch, first, Card("Hopper", others=2 * GIB))
    assert find("cuda:0").card == "NVIDIA Hopper" and find("cuda").sample()["used_bytes"] == 2 * GIB
    install(monkeypatch, first)
    assert "does not know the card that torch calls cuda:0" in find("cuda:0").notes[0]


@pytest.mark.parametrize(
    ("host", "processes", "mine", "method"),
    [
        (True, {MINE: 2 * GIB, 7: GIB}, 2 * GIB, "its own number"),
        (False, {4242: 2 * GIB}, 2 * GIB, "the only process"),
        (
            False,
            {MINE: 2 * GIB},
            2 * GIB,
            "the only process",
        ),  # a number like ours, by chance or not
        (False, {}, None, "lists no process"),
        (True, {}, None, "lists no process"),
        (True, {MINE: None, 7: None}, None, "WDDM"),
        (False, {7: None}, None, "WDDM"),
    ],
)
def test_this_process_is_told_from_others_or_not_at_all(monkeypatch, host, processes, mine, method):
    install(monkeypatch, Card(processes=processes, others=GIB), host=host)
    reader = find("cuda:0")
    assert reader.sample()["process_bytes"] == mine and reader.sample()["used_bytes"] >= GIB
    assert method in (reader.process_method or reason(reader, "process_bytes"))


@pytest.mark.parametrize(
    ("moves", "mine", "words"),
    [
        ({7: 0, 8: nvml_process.PROBE_BYTES}, 2 * GIB, "rose and fell"),
        ({7: 0, 8: 0}, None, "none rose"),
        ({7: nvml_process.PROBE_BYTES, 8: nvml_process.PROBE_BYTES}, None, "2 rose"),
        (None, None, "OutOfMemoryError"),
    ],
)
def test_in_a_container_a_block_tells_which_of_several_is_this_process(
    monkeypatch, moves, mine, words
):
    card = Card(processes={7: GIB, 8: 2 * GIB})

    @contextmanager
    def block(device):
        if moves is None:
            raise torch.OutOfMemoryError("no room")
        card.processes = {pid: size + moves[pid] for pid, size in card.processes.items()}
        yield
        card.processes = {pid: size - moves[pid] for pid, size in card.processes.items()}

    monkeypatch.setattr(nvml_process, "block", block)
    install(monkeypatch, card, host=False)
    reader = find("cuda:0")
    assert reader.sample()["process_bytes"] == mine and words in (
        reader.process_method or reason(reader, "process_bytes")
    )


def test_one_that_keeps_a_block_as_big_is_not_this_process(monkeypatch):
    card = Card(processes={7: GIB, 8: GIB})

    @contextmanager
    def block(device):
        card.processes = {7: 2 * GIB, 8: GIB}  # another process has grown meanwhile
        yield

    monkeypatch.setattr(nvml_process, "block", block)
    install(monkeypatch, card, host=False)
    assert find("cuda:0").sample()["process_bytes"] is None


def mig(*instances: Card) -> Card:
    return Card("Hopper", mig=True, others=50 * GIB, instances=list(instances))


def test_an_instance_of_mig_has_its_own_memory_and_no_energy(monkeypatch):
    one, two = (
        Card(
            "Hopper",
            uuid=f"MIG-{n}",
            total=20 * GIB,
            others=n * GIB,
            fails={
                name: fake_nvml.NOT_SUPPORTED
                for name in (
                    "nvmlDeviceGetUtilizationRates",
                    "nvmlDeviceGetClockInfo",
                    "nvmlDeviceGetTemperature",
                )
            },
        )
        for n in (1, 2)
    )
    install(monkeypatch, mig(one, two))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    reader = find("cuda:0")
    assert reader.total_bytes == 20 * GIB and reader.sample()["used_bytes"] == 2 * GIB
    assert lacking(reader) == {
        "process_bytes",
        "power_w",
        "energy_j",
        "utilization",
    }  # the clocks are the whole card's
    assert all("MIG" in reason(reader, name) for name in ("power_w", "energy_j", "utilization"))


def test_an_instance_is_found_without_being_named_only_where_there_is_no_choice(monkeypatch):
    one, two = (
        Card("Hopper", uuid="MIG-1", others=GIB),
        Card("Hopper", uuid=f"MIG-{fake_nvml.UUID}", others=2 * GIB),
    )
    install(monkeypatch, mig(one))
    assert find("cuda:0").sample()["used_bytes"] == GIB
    install(monkeypatch, mig(one, Card("Hopper", uuid="MIG-3")))
    assert (
        "2 MIG instances" in find("cuda:0").notes[0]
        and "CUDA_VISIBLE_DEVICES" in find("cuda:0").notes[0]
    )
    install(monkeypatch, mig(one, two))  # torch names the instance itself
    assert find("cuda:0").sample()["used_bytes"] == 2 * GIB


def test_a_card_that_vanishes_turns_everything_to_na_and_says_so_once(monkeypatch):
    card = Card(processes={MINE: GIB})
    install(monkeypatch, card)
    reader = find("cuda:0")
    assert reader.sample()["used_bytes"] == GIB and not reader.lost
    card.error = fake_nvml.LOST
    assert lacking(reader) == set(COLUMNS) and lacking(reader) == set(COLUMNS)
    assert "GPU is lost" in reader.lost and reader.notes.count(reader.lost) == 1


@pytest.mark.parametrize("calls", range(0, 40))
def test_a_card_may_vanish_at_any_question(monkeypatch, calls):
    library = install(monkeypatch, Card(processes={MINE: GIB}), lost_after=calls)
    reader = find("cuda:0")
    for _ in range(4):
        reader.sample()
    assert reader.notes and "lost" in reader.notes[-1]
    assert len(library.asked) > calls


def test_an_error_of_a_moment_costs_a_sample_and_not_the_quantity(monkeypatch):
    card = Card(processes={MINE: GIB})
    install(monkeypatch, card)
    reader = find("cuda:0")
    card.fails = {"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_UNKNOWN}
    assert lacking(reader) == {"power_w"} == lacking(reader)
    card.fails = {}
    assert lacking(reader) == set() and len(reader.notes) == 1 and "some samples" in reader.notes[0]


@pytest.mark.parametrize(
    ("device", "prepare", "words"),
    [
        ("cpu", lambda m: None, "the device is cpu"),
        ("cuda", lambda m: None, "torch finds no CUDA device"),
        (
            "cuda",
            lambda m: install(m, Card(), init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
            "Driver Not Loaded",
        ),
        ("cuda", lambda m: (install(m, Card()), m.setitem(sys.modules, "pynvml", None)), "pynvml"),
        (
            "cuda:0",
            lambda m: (
                install(m, Card()),
                m.setattr(pynvml, "nvmlDeviceGetName", lambda handle: 1 / 0),
            ),
            "ZeroDivisionError",
        ),
    ],
)
def test_where_there_is_nothing_to_read_the_reader_says_why(monkeypatch, device, prepare, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare(monkeypatch)
    reader = find(device)
    assert not isinstance(reader, CardReader) and lacking(reader) == set(COLUMNS)
    assert len(reader.notes) == 1 and words in reader.notes[0]


def test_the_environment_of_a_run_names_card_and_driver_and_nothing_more(monkeypatch):
    install(monkeypatch, Card())
    told = environment.record("cuda")["device"]
    assert told == {
        "kind": "cuda",
        "name": "a card",
        "memory_bytes": 80 * GIB,
        "compute_capability": [9, 0],
        "cuda": torch.version.cuda,
        "driver": "570.00",
    }
    install(monkeypatch, Card(), init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    assert driver() == "N/A: NVMLError_DriverNotLoaded: Driver Not Loaded"


def test_nothing_that_is_said_identifies_the_card_or_a_process(monkeypatch):
    install(
        monkeypatch,
        Card("Pascal", processes={1234567: GIB, 7654321: None}),
        host=True,
        missing=OLD_DRIVER,
    )
    monkeypatch.setattr(nvml_process, "block", lambda device: nullcontext())
    words = " ".join(find("cuda:0").notes)
    assert words and not any(secret in words for secret in (fake_nvml.UUID, "1234567", "7654321"))
