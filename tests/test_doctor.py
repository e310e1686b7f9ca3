"""What a machine can measure is said, and for the rest why not and what would help. No GPU is
needed to say it of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

import fake_nvml
from fake_nvml import GIB, UUID, Card, install
from vramlab import cli
from vramlab.capture import nvml_process
from vramlab.runs import machine_report as doctor


def by_topic(findings) -> dict:
    assert len({finding.topic for finding in findings}) == len(findings)
    return {finding.topic: finding for finding in findings}


def test_every_topic_that_cannot_be_had_says_why_and_what_would_help():
    findings = doctor.examine()
    assert {"torch", "forecast", "cuda", "bf16", "nvml", "energy", "process peak", "ranks"} <= set(
        by_topic(findings)
    )
    for finding in findings:
        assert finding.detail and (finding.can or finding.way_out), finding
    told = by_topic(findings)
    assert told["torch"].can and torch.__version__ in told["torch"].detail and told["forecast"].can
    assert told["process peak"].can == (doctor.platform.libc_ver()[0] == "glibc")


def test_the_command_speaks_words_and_json(capsys):
    assert cli.main(["doctor"]) == 0
    words = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [row["topic"] for row in found] == [finding.topic for finding in doctor.examine()]
    assert all(f"{'yes' if row['can'] else 'no':<4}{row['topic']}" in words for row in found)
    assert os.uname().nodename not in words.split()


@pytest.fixture
def cuda(monkeypatch):
    """A machine whose torch sees the first of `cards`."""

    def put(*cards: Card, **how):
        library = install(monkeypatch, *cards, **how)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation: cards[0].architecture != "Turing",
        )
        return library

    return put


def test_a_card_is_told_with_what_it_lacks_and_nothing_that_identifies_it(monkeypatch, cuda):
    monkeypatch.setattr(nvml_process, "block", lambda device: nullcontext())
    cuda(
        Card("Pascal", processes={4321: GIB, 8765: 2 * GIB}),
        host=False,
        missing=fake_nvml.OLD_DRIVER,
    )
    told = by_topic(doctor.examine())
    assert (
        told["nvml"].can
        and "driver 570.00" in told["nvml"].detail
        and "reserved_bytes: N/A" in told["nvml"].detail
    )
    assert told["energy"].can and told["energy"].detail.startswith("power, integrated")
    assert not told["process memory on the card"].can and told["process memory on the card"].way_out
    assert told["cuda"].can and told["allocator history"].can
    assert UUID not in str(told) and "4321" not in str(told)


def test_a_card_of_today_can_do_everything(cuda):
    cuda(Card("Hopper", processes={os.getpid(): GIB}))
    told = by_topic(doctor.examine())
    assert all(
        told[topic].can
        for topic in (
            "cuda",
            "bf16",
            "nvml",
            "energy",
            "process memory on the card",
            "allocator history",
        )
    )
    assert "its own number" in told["process memory on the card"].detail


def test_emulated_bf16_is_no_bf16(cuda):
    cuda(Card("Turing"))
    told = by_topic(doctor.examine())
    assert not told["bf16"].can and "emulates" in told["bf16"].detail


def test_a_driver_that_torch_cannot_use_is_told_from_none(monkeypatch, cuda):
    cuda(Card(), Card("Ada", uuid="GPU-2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = by_topic(doctor.examine())
    assert (
        not told["cuda"].can and not told["nvml"].can and "the driver has: 2" in told["nvml"].detail
    )


def test_a_topic_that_breaks_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_memory", lambda: 1 / 0)
    told = by_topic(doctor.examine())
    assert not told["host memory"].can and "ZeroDivisionError" in told["host memory"].detail


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "vramlab.cli", "regimes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as told:
        told.stdout.close()
        assert told.stderr.read() == b"" and told.wait() == 0
