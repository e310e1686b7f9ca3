"""Sharding over ranks: the pieces are torch's to the byte, nothing is counted that is not there,
and real ranks agree."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param

import micro
import ranked_steps
import vramlab
from vramlab.allocator.simulate import simulate
from vramlab.baichuan import ModelSpec
from vramlab.capture.modules import common
from vramlab.forecast.trace import trace
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.forecast.virtual_gpu.ranks import Stream, virtual_ranks
from vramlab.observer import CATEGORIES
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import ImpossibleHere, read_row, regime
from vramlab.regimes.until.until import _InBackward
from vramlab.report.figures import COLORS

MICRO = ModelSpec("micro", micro.model().config, None)
ROWS = {
    "full": {},
    "checkpoint": {"acts": "checkpoint", "weights": "bf16"},
    "offload": {"acts": "offload"},
    "lora": {"trains": "lora"},
    "lomo": {"until": "backward", "rule": "sgd"},
    "clip": {"accumulate": 2, "clip": 1.0},
}


@functools.cache
def _of(name, world=1):
    return _said(ROWS[name], world)


def _said(row=None, world=1, place="fsdp", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's
        return trace(
            MICRO, read_row("row", {"place": place, **(row or {})}), 11, 3, world=world, **kwargs
        )


def _piece(parameter, world: int) -> int:
    """Numbers in rank 0's piece: whole rows, rounded up."""
    return math.ceil(parameter.shape[0] / world) * math.prod(parameter.shape[1:])


@pytest.mark.parametrize(
    ("world", "weights"),
    [*((world, "fp32") for world in (1, 2, 8, 64, 1024)), (8, "bf16"), (8, "mixed")],
)
def test_every_rank_holds_its_padded_piece_of_everything(world, weights):
    """`size` bytes a number in a weight, its gradient and moments; `sent` when it is gathered."""
    size, sent = {"fp32": (4, 4), "bf16": (2, 2), "mixed": (4, 2)}[weights]
    frame = _said({"weights": weights}, world).frame
    born = frame[(frame["event"] == "alloc") & (frame["bytes"] > 0)]
    pieces = {
        name: _piece(parameter, world) for name, parameter in micro.model().named_parameters()
    }
    units = Counter()
    for name, piece in pieces.items():
        units[".".join(name.split(".")[:3]) if "layers" in name else ""] += piece

    def seen(category, step):
        rows = born[(born["category"] == category) & (born["step"] == step)]
        return list(zip(rows["module"], rows["bytes"], strict=True))

    held = dict(seen("weights", 0))
    assert {name: held[name] for name in pieces} == {
        name: size * piece for name, piece in pieces.items()
    }
    state = seen("optimizer", 0)
    assert len(state) == 3 * len(pieces) and sum(n for _, n in state) == sum(
        2 * size * piece + 4 for piece in pieces.values()
    )
    assert sorted(seen("gradients", 1)) == sorted((unit, size * n) for unit, n in units.items())
    collectives = set(seen("collectives", 1))
    assert {(name, n) for name, n in collectives if name in pieces} == {
        (k, sent * world * p) for k, p in pieces.items()
    }
    reduced = (
        {size * n for unit, n in units.items()} if world == 1 else set()
    )  # one rank gathers without a buffer
    buffers = {(unit, width * world * n) for unit, n in units.items() for width in (sent, size)}
    assert {(name, n) for name, n in collectives if name not in pieces} == buffers and reduced <= {
        n for _, n in buffers
    }


def _births(said, step, without):
    """In number, what a step makes."""
    frame = said.frame
    born = frame[(frame["event"] == "alloc") & (frame["step"] == step) & (frame["bytes"] > 0)]
    born = born[~born["category"].isin(without)]
    # the norms of clipping are formed list by list on pieces
    ops = born["op"].replace({"aten._foreach_norm.Scalar": "aten.linalg_vector_norm.default"})
    return Counter(zip(born["phase"], ops, born["bytes"], strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_one_rank_is_one_device_and_its_buffers(name, monkeypatch):
    """And its gradients, which are one storage a unit beside what autograd forms for each
    weight."""
    monkeypatch.setattr(
        _InBackward, "row_receiver", lambda self, leaf: None
    )  # on one device the embeddings' is formed in rows
    alone, one = _said(ROWS[name], place="device"), _of(name)
    for step in (0, 1):
        assert _births(one, step, ("collectives", "gradients")) == _births(alone, step, ())
    for category in ("weights", "optimizer"):
        assert one.ledger.get(category) == alone.ledger.get(category)
    if name != "lora":  # there gathering whole, frozen weights moves the peak
        assert one.peak_bytes - one.ledger["collectives"] == alone.peak_bytes


@pytest.mark.parametrize("name", ROWS)
def test_no_bytes_of_whole_tensors_where_only_pieces_are(name):
    """A forward and backward are the same on 8 ranks as on one, all but the collectives; an update
    touches pieces."""
    largest = max(4 * _piece(parameter, 8) for parameter in micro.model().parameters())
    for step in (0, 1):
        one, eight = (
            _births(_of(name, world), step, ("weights", "collectives", "gradients", "optimizer"))
            for world in (1, 8)
        )
        assert {key: n for key, n in one.items() if key[0] != "update"} == {
            k: n for k, n in eight.items() if k[0] != "update"
        }
        assert all(
            size <= largest
            for phase, _, size in _births(_of(name, 8), step, ())
            if phase == "update"
        )


def test_waiting_for_a_collective_makes_nothing():
    ops = _of("clip", 8).frame["op"]
    assert (
        ops.str.contains("_c10d_functional.all_reduce").any()
        and not ops.str.contains("wait_tensor").any()
    )


@pytest.mark.parametrize("until", ["step", "backward"])
def test_offloaded_pieces_are_host_bytes(until):
    """Weights, gradients and moments: the same bytes, on the other side."""
    here, offloaded = _said({"until": until}, 8), _said({"until": until}, 8, place="fsdp_offload")
    pieces = sum(_piece(parameter, 8) for parameter in micro.model().parameters())
    count = len(list(micro.model().parameters()))
    assert (
        here.before()["bytes"].sum() - offloaded.before()["bytes"].sum() == 12 * pieces + 4 * count
    )
    assert (
        not {"weights", "optimizer"} & set(offloaded.ledger)
        and offloaded.peak_bytes < here.peak_bytes
    )
    least = 12 * pieces + (4 * pieces if until == "step" else 0)
    assert least <= offloaded.host_bytes < least + 4 * pieces


@pytest.mark.parametrize("world", [1, 8])
def test_after_a_step_only_pieces_are_left(world):
    said = _of("full", world)
    left = said.before()["bytes"].sum()
    held = said.frame.query(
        "event == 'alloc' and step == 0 and category in ('weights', 'buffers', 'optimizer',"
        " 'workspace')"
    )
    scratch = said.frame.query("event == 'free' and step == 0 and category == 'workspace'")
    assert left == held["bytes"].sum() - scratch["bytes"].sum()


def test_each_stream_has_its_own_pool():
    said = _of("full", 8)
    events = said.events
    assert set(events["stream"]) == {0, 1, 3}, "the usual one, gathering's copies, and reducing"
    streams = {}
    for kind, key, stream in zip(events["event"], events["storage"], events["stream"], strict=True):
        assert kind == "alloc" or streams[key] == stream, "freed where it was made"
        streams[key] = stream
    apart, together = simulate(events), simulate({**events, "stream": 0 * events["stream"]})
    assert apart.peak_allocated_bytes == together.peak_allocated_bytes
    assert apart.peak_reserved_bytes >= together.peak_reserved_bytes


def test_the_same_question_has_the_same_answer():
    one, two = _of("full", 8), _said(world=8)
    assert all((one.events[name] == two.events[name]).all() for name in one.events)


def test_the_13b_on_1024_ranks_takes_seconds():
    spec = model_spec("baichuan2-13b")
    said = trace(spec, regime("fsdp"), 1024, 1, world=1024)
    with torch.device("meta"):
        parameters = list(type(micro.model())(spec.config).parameters())
    pieces = sum(_piece(parameter, 1024) for parameter in parameters)
    assert (said.ledger["weights"], said.ledger["optimizer"]) == (
        4 * pieces,
        8 * pieces + 4 * len(parameters),
    )
    assert said.took_s < 60 and said.world == 1024


@pytest.mark.parametrize(("place", "world"), [("device", 2), ("fsdp", 0), ("device", 0)])
def test_a_world_the_regime_cannot_have_is_refused(place, world):
    with pytest.raises(ValueError, match="use a world of 1"):
        _said(world=world, place=place)


def test_a_rank_is_not_asked_for_forecasts():
    with virtual_ranks(2), pytest.raises(ImpossibleHere, match="torchrun"):
        _said()


def test_nothing_stays_patched_and_no_group_is_left():
    def state():
        return (
            device_mesh.init_device_mesh,
            _fsdp_param._chunk_with_empty,
            Stream.count,
            distributed.is_initialized(),
        )

    before = state()
    with pytest.raises(KeyError), virtual_gpu(world=4):
        assert distributed.get_world_size() == 4 and state()[:2] != before[:2]
        raise KeyError("a run that fails")
    assert state() == before and not distributed.is_initialized()


def test_collectives_are_a_category_with_a_colour():
    assert "collectives" in CATEGORIES and "collectives" in COLORS


def test_a_storage_of_two_things_is_called_after_what_both_are_in():
    assert (
        common("model.layers.3.mlp.up_proj.weight", "model.layers.3.self_attn.o_proj.weight")
        == "model.layers.3"
    )
    assert common("lm_head.weight", "model.norm.weight") == "" and common("a.b", "a.b") == "a.b"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two real ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    here, library = Path(__file__).parent, Path(vramlab.__file__).parents[1]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(here / "ranked_steps.py"),
            str(folder),
        ],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{library}{os.pathsep}{here}"},
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _alone(name):
    """The row on one device, where nothing is sharded."""
    return ranked_steps.train(
        {key: value for key, value in ranked_steps.ROWS[name].items() if key != "place"},
        slice(0, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ranked_steps.ROWS if name != "mixed"])
def test_two_ranks_train_as_one_device_with_both_batches(name, two_ranks):
    alone = _alone(name)
    for rank in two_ranks:
        trained = rank["trained"][name]
        assert trained["losses"] == pytest.approx(alone["losses"], abs=2e-6)
        for key, tensor in alone["weights"].items():
            torch.testing.assert_close(trained["weights"][key], tensor, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_two_ranks_in_mixed_precision_err_as_one_device_does(two_ranks):
    """Not the same roundings: gathered weights make norms and the sum of blocks bf16. Errors are
    those of fp32's losses and weights, taken together."""
    exact, alone = _alone("full"), _alone("mixed")

    def errors(trained):
        losses = torch.tensor(trained["losses"]) - torch.tensor(exact["losses"])
        weights = torch.cat(
            [
                (trained["weights"][name] - tensor).flatten()
                for name, tensor in exact["weights"].items()
            ]
        )
        return losses.norm(), weights.norm()

    for rank in two_ranks:
        for mine, one_device in zip(errors(rank["trained"]["mixed"]), errors(alone), strict=True):
            assert 0 < mine < 4 * one_device
        assert all(
            tensor.dtype == torch.float32 for tensor in rank["trained"]["mixed"]["weights"].values()
        )
    for key, tensor in two_ranks[0]["trained"]["mixed"]["weights"].items():
        assert torch.equal(tensor, two_ranks[1]["trained"]["mixed"]["weights"][key])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, row in ranked_steps.ROWS.items() if not row.get("accumulate")]
)
def test_a_real_rank_makes_what_was_forecast(name, two_ranks):
    said = _said(ranked_steps.ROWS[name], 2, mode="cpu")
    assert two_ranks[0]["metered"][name] == ranked_steps.births(said.frame)
