"""The roofline's floor counts what crosses the bus: by value on steps whose copies can be counted
by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import micro
from vramlab.baichuan import ModelSpec
from vramlab.capture.work import Floor, roofline
from vramlab.cards import read_cards
from vramlab.cli import main
from vramlab.forecast.trace import trace
from vramlab.regimes.regime import read_row

MICRO = ModelSpec("micro", micro.model().config, None)
PARAMETERS = sum(parameter.numel() for parameter in micro.model().parameters())
EMBEDDING = 61 * 20
BATCH_BYTES = 2 * 8 * 3 * 11
"""Of ids and labels, which each step brings up."""


def crossed(**row) -> tuple[int, int]:
    """Bytes up and down in the reported step of the micro model, of 3 rows of 11 tokens."""
    total = Counter()
    for phase in trace(MICRO, read_row("row", row), 11, 3).work.values():
        total.update(phase["bus_bytes"])
    return total["up"], total["down"]


def test_a_step_on_the_device_brings_up_its_batch_and_nothing_else():
    assert crossed() == (BATCH_BYTES, 0)


@pytest.mark.parametrize("until", ["step", "backward"])
@pytest.mark.parametrize(("weights", "size"), [("fp32", 4), ("bf16", 2)])
def test_an_optimizer_on_the_host_takes_each_gradient_down_and_brings_each_weight_up(
    weights, size, until
):
    assert crossed(place="host_state", weights=weights, until=until) == (
        size * PARAMETERS + BATCH_BYTES,
        size * PARAMETERS,
    )


def test_offloaded_activations_go_down_once_and_come_up_for_each_use():
    up, down = crossed(acts={"offload": {"min_bytes": 0}})
    assert up - BATCH_BYTES >= down > 4 * 33 * 3 * 20  # more than the blocks' inputs


def test_the_inputs_of_checkpointed_blocks_go_down_once_and_come_up_once():
    up, down = crossed(acts={"checkpoint": {"offload": True}})
    assert up - BATCH_BYTES == down and down >= 4 * 33 * 3 * 20


def test_weights_on_the_host_come_up_for_forward_and_again_for_backward():
    up, down = crossed(place="host_weights", acts="checkpoint", until="backward")
    blocks_twice, norm, head_twice, rows = (
        2 * (PARAMETERS - 2 * EMBEDDING - 20),
        20,
        2 * EMBEDDING,
        33 * 20,
    )
    assert up == 4 * (blocks_twice + norm + head_twice + rows) + BATCH_BYTES
    assert (
        down == 4 * (PARAMETERS - EMBEDDING + 33 * 20) + 8 * 33
    )  # each gradient, the table's as rows; the tokens to look up


def test_moments_that_wait_on_the_host_come_up_and_go_down_at_a_turn():
    parts = {"trains": {"chunks": {"count": 4, "interval": 1, "state": "host"}}}
    up, down = crossed(**parts)
    assert (
        up > BATCH_BYTES
        and down > 0
        and crossed(trains={"chunks": {**parts["trains"]["chunks"], "state": "device"}})[1] == 0
    )


def test_the_host_s_own_work_is_not_the_card_s():
    there, here = (
        trace(MICRO, read_row("row", {"place": place}), 11, 3).work["update"]
        for place in ("host_state", "device")
    )
    # there a gradient is read and a new weight written, by copies; here the update touches both
    # moments too
    assert (
        there["compulsory_bytes"] == 2 * 4 * PARAMETERS
        and here["compulsory_bytes"] >= 4 * 4 * PARAMETERS
    )


WORK = {
    "forward": {
        "flops": {"bfloat16": 2e12, "float32": 1e12},
        "compulsory_bytes": 1e9,
        "bus_bytes": {"up": 3e9},
    },
    "update": {"flops": {}, "compulsory_bytes": 5e9, "bus_bytes": {"up": 1e9, "down": 6e9}},
}


@pytest.mark.parametrize(
    ("host_gb_per_s", "seconds", "binds"),
    [(1.0, 6.0, "bus"), (2.0, 4.5, "compute"), (1e9, 4.5, "compute")],
)
def test_a_phase_takes_the_longer_of_computing_and_moving_and_the_step_no_less_than_the_bus(
    host_gb_per_s, seconds, binds
):
    floor = roofline(
        WORK, bf16_tflops=1.0, fp32_tflops=0.5, gb_per_s=10.0, host_gb_per_s=host_gb_per_s
    )
    assert (floor.compute_s, floor.memory_s, floor.device_s) == pytest.approx((4.0, 0.6, 4.5))
    assert (
        floor.s == pytest.approx(seconds)
        and floor.binds == binds
        and floor.bus_s == pytest.approx(6.0 / host_gb_per_s)
    )


def test_memory_binds_where_it_takes_longest():
    assert Floor(compute_s=1.0, memory_s=2.0, device_s=2.5, bus_s=2.4).binds == "memory"


def test_streamed_weights_of_the_7b_are_bound_by_the_bus_of_a_4090(capsys):
    question = ["predict", "--model", "baichuan2-7b", "--card", "rtx4090", "--weights", "bf16"]
    assert main([*question, "--regime", "host_weights", "--json"]) == 0
    streamed = json.loads(capsys.readouterr().out)
    floor, weights = streamed["floor"], 7_505_973_248
    assert floor["binds"] == "bus" and streamed["floor_s"] == floor["bus_s"] > floor["device_s"]
    up = sum(phase["bus_bytes"].get("up", 0) for phase in streamed["work"].values())
    assert (
        floor["bus_s"] == up / 31.5e9 and 2 * 2 * (weights - 125_696 * 4096) < up < 3 * 2 * weights
    )
    assert (
        main(
            [
                "predict",
                "--model",
                "tiny",
                "--seq",
                "64",
                "--card",
                "rtx4090",
                "--regime",
                "host_state",
            ]
        )
        == 0
    )
    assert "bound by bus (roofline floor, not an estimate): compute 0." in capsys.readouterr().out


def test_every_card_has_the_rate_of_its_link_with_its_source():
    links = {key: (card.host_gb_per_s, card.source["host"]) for key, card in read_cards().items()}
    for rate, source in links.values():
        assert ("PCIe 4.0" in source) == (rate == 31.5) and ("PCIe 5.0" in source) == (
            rate == 63.0
        ), links
