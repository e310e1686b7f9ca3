"""Places on the host: the same training as on the device, and on the device only what has to be
there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import micro
from micro import batch, model, train
from vramlab.baichuan import ModelSpec
from vramlab.capture.meter import Meter
from vramlab.forecast.forecast import assert_peak
from vramlab.forecast.trace import trace
from vramlab.observer import Observer
from vramlab.regimes.head import chunks
from vramlab.regimes.place.host import LookUp
from vramlab.regimes.place.stream import StreamedLogits
from vramlab.regimes.place.transfers import Bus
from vramlab.regimes.regime import ImpossibleHere, check_machine, read_row
from vramlab.training.trainer import Schedule, Trainer

GIB = 1 << 30
MICRO = ModelSpec("micro", micro.model().config, None)
PARAMETERS = sum(parameter.numel() for parameter in micro.model().parameters())
TENSORS = len(list(micro.model().parameters()))
STREAMED = {"place": "host_weights", "acts": "checkpoint"}


def _traced(**row):
    return trace(MICRO, read_row("row", row), 11, 3)


def _bus():
    return Bus(torch.device("cpu"), Observer())


@pytest.mark.parametrize("head", ["plain", "fused"])
@pytest.mark.parametrize("place", ["host_state", "host_embed", "host_weights"])
def test_a_plain_head_trains_wherever_its_weight_lies(place, head):
    """On the device there is no more than with NormHead, whose rows take lengths and, unless fused,
    a copy."""
    row = read_row("row", {"place": place, "acts": "checkpoint", "until": "backward", "head": head})
    with_norm, without = (
        trace(ModelSpec("micro", micro.model(norm_head=norm).config, None), row, 11, 3)
        for norm in (True, False)
    )
    assert (
        without.peak_bytes <= with_norm.peak_bytes
        and without.ledger["weights"] == with_norm.ledger["weights"]
    )


ALIKE = [
    *(
        {"place": place, **row}
        for place in ("host_state", "host_embed")
        for row in (
            {"clip": 0.1},
            {"accumulate": 2},
            {"weights": "bf16"},
            {"acts": "offload"},
            {"trains": "lora"},
            {"trains": {"chunks": {"count": 7}}},
            {"trains": {"chunks": {"count": 7, "state": "device"}}, "until": "backward"},
        )
    ),
    *(
        {**STREAMED, **row}
        for row in (
            {"clip": 0.1},
            {"accumulate": 2},
            {"weights": "bf16"},
            {"weights": "mixed"},
            {"trains": "lora"},
            {"trains": {"blocks": {"interval": 1, "order": "descending", "state": "host"}}},
            {"trains": {"blocks": {"interval": 1, "ends": "units"}}, "until": "backward"},
        )
    ),
]


@pytest.mark.parametrize("row", ALIKE, ids=str)
def test_a_place_on_the_host_changes_no_number(row):
    losses, weights, _ = train(
        {key: value for key, value in row.items() if key != "place"}, steps=5
    )
    other_losses, other_weights, _ = train(row, steps=5)
    assert other_losses == losses and all(
        torch.equal(other_weights[key], weights[key]) for key in weights
    )


@pytest.mark.parametrize(
    "row",
    [{"place": "host_state"}, {"place": "host_embed", "acts": "checkpoint"}, STREAMED],
    ids=str,
)
@pytest.mark.parametrize(
    "changes", [{"until": "backward"}, {"until": "backward", "weights": "bf16"}], ids=str
)
def test_a_fused_head_in_pieces_is_the_same_on_the_host(row, changes, monkeypatch):
    """Pieces of rows and of tokens, each with an odd one at the end; in backward both sides take
    rows. A streamed head adds up over its pieces what a resident one forms in one product."""
    for name, value in {"LEAST_ROWS": 8, "LEAST_PRODUCTS": 300, "ROWS": 9}.items():
        monkeypatch.setattr(chunks, name, value)
    row = {"head": "fused", **row, **changes}
    losses, weights, _ = train({key: value for key, value in row.items() if key != "place"})
    other_losses, other_weights, _ = train(row)
    rounded = (
        row["place"] == "host_weights" and "weights" in row
    )  # AdamW's first steps are signs, which bf16 sums can turn
    assert other_losses == pytest.approx(losses, abs=0.02 if rounded else 1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            other_weights[name], tensor, rtol=1e-4, atol=0.05 if rounded else 1e-6
        )


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_a_streamed_head_adds_up_over_micro_batches_and_pieces(head, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_ROWS", 8)
    row = {"head": head, "acts": "checkpoint", "accumulate": 2, "clip": 0.5}
    losses, weights, _ = train(row)
    other_losses, other_weights, _ = train({**row, "place": {"host_weights": {"head_rows": 7}}})
    assert other_losses == pytest.approx(losses, rel=2e-6)
    for (
        name,
        tensor,
    ) in (
        weights.items()
    ):  # AdamW divides by small gradients, so how a CPU sums shows in some weights
        torch.testing.assert_close(other_weights[name], tensor, rtol=1e-4, atol=5e-5)


def test_streamed_backwards_pass_gradcheck():
    torch.manual_seed(0)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for norm, rows in ((True, F.normalize(weight)), (False, weight)):
        assert torch.autograd.gradcheck(
            lambda h, w, norm=norm: StreamedLogits.apply(h, w, 4, _bus(), norm), (hidden, weight)
        )
        torch.testing.assert_close(
            StreamedLogits.apply(hidden, weight, 4, _bus(), norm), F.linear(hidden, rows)
        )
    ids = torch.tensor([[0, 2, 3], [4, 4, 6]])
    assert torch.autograd.gradcheck(
        lambda w: LookUp.apply(ids, w, w.detach(), 0, None, _bus()), (weight,)
    )
    leaf = nn.Parameter(
        weight.detach()[2:5]
    )  # shares storage, so a perturbed leaf perturbs the table
    assert torch.autograd.gradcheck(
        lambda rows: LookUp.apply(ids, rows, weight.detach(), 2, None, _bus()), (leaf,)
    )


def test_rows_of_a_table_on_the_host_get_the_gradient_of_the_whole():
    table = nn.Embedding(9, 4, padding_idx=0)
    ids, upstream = torch.tensor([[0, 2, 3, 8], [4, 4, 0, 2]]), torch.randn(2, 4, 4)
    table(ids).backward(upstream)
    for start, stop in ((0, 9), (0, 3), (2, 5), (5, 8)):
        leaf = nn.Parameter(table.weight.detach()[start:stop])
        LookUp.apply(ids, leaf, table.weight.detach(), start, 0, _bus()).backward(upstream)
        assert torch.equal(leaf.grad, table.weight.grad[start:stop])


@pytest.mark.parametrize("until", ["step", "backward"])
def test_host_state_is_a_copy_gradients_and_moments_on_the_host(until):
    here, said = _traced(until=until), _traced(until=until, place="host_state")
    state = 8 * PARAMETERS + 4 * TENSORS
    assert (
        here.before()["bytes"].sum() - said.before()["bytes"].sum() == state
        and "optimizer" not in said.ledger
    )
    batch_bytes = 2 * 8 * 33
    least = state + 4 * PARAMETERS
    if until == "step":
        assert said.host_bytes == least + 4 * PARAMETERS + batch_bytes
    else:  # one that has come, and one on its way
        assert least < said.host_bytes <= least + batch_bytes + 2 * 4 * 61 * 20


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_weights_on_the_host_pass_the_device_two_blocks_at_a_time(head):
    said = _traced(**STREAMED, head=head)
    frame = said.device_rows()
    lasting = frame[frame["category"].isin(["buffers", "workspace"])]
    assert set(said.before()["storage"]) <= set(lasting["storage"])
    weights = frame[frame["category"] == "weights"]
    live = weights["bytes"].where(weights["event"] == "alloc", -weights["bytes"]).cumsum()
    block, norm = sum(p.nbytes for p in micro.model().model.layers[0].parameters()), 4 * 20
    assert live.max() <= 2 * block + norm
    gradients = frame[frame["category"] == "gradients"]
    assert gradients.empty, "none stays on the device to be anyone's"
    assert said.host_bytes >= 16 * PARAMETERS


def test_a_gradient_leaves_before_the_next_but_one_is_formed():
    """On the device, in backward: of gradients the size of a matrix of the MLP no more than two."""
    wide = {**STREAMED, "weights": "bf16"}
    spec = ModelSpec("micro", micro.model(intermediate_size=331).config, None)
    frame = trace(spec, read_row("row", wide), 2, 1).device_rows()
    one = 2 * 331 * 20
    its = frame[(frame["bytes"] == one) & (frame["op"] == "aten.mm.default")]
    live = its["event"].map({"alloc": 1, "free": -1}).cumsum()
    assert len(its) and live.max() <= 2


def test_the_device_never_holds_a_table_that_is_on_the_host():
    table, (here, there) = (
        4 * 61 * 20,
        [_traced(place=place, head="fused") for place in ("device", "host_embed")],
    )
    for said, without in ((here, False), (there, True)):
        frame = said.device_rows()
        owners = frame["module"][(frame["event"] == "alloc") & (frame["bytes"] == table)]
        assert owners.str.startswith("lm_head").all() == without
    assert here.before()["bytes"].sum() - there.before()["bytes"].sum() == 3 * table + 4


@pytest.mark.parametrize("place", ["host_weights", "host_embed"])
def test_a_model_with_weights_on_the_host_still_answers(place):
    base = model().eval()
    row = {"place": place, "trains": "none", "rule": "none"}
    trainer = Trainer(model(), read_row("row", row), Schedule(1e-2, 1))
    plain, inputs = (
        trainer.finish(),
        {key: batch(3)[key] for key in ("input_ids", "attention_mask")},
    )
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(plain(**inputs).logits, base(**inputs).logits)
            assert torch.equal(plain(**batch(3)).loss, base(**batch(3)).loss)
    assert plain.get_input_embeddings().runs_on == torch.device("cpu")


def test_a_tensor_that_is_saved_often_is_moved_once():
    meter = Meter()
    trainer = Trainer(
        model(),
        read_row("row", {"acts": {"offload": {"min_bytes": 0}}}),
        Schedule(1e-2, 1),
        observer=meter,
    )
    with meter:
        trainer.step([batch(0)])
    born = meter.frame().query("event == 'alloc' and category == 'host' and phase == 'forward'")
    kept = _saved_storages()
    assert len(born) == kept


def _saved_storages() -> int:
    """Distinct values that autograd saves in one forward, parameters left out."""
    tiny, seen, alive = model().train(), set(), []
    weights = {parameter.untyped_storage()._cdata for parameter in tiny.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            alive.append(tensor)
            seen.add(
                (
                    storage._cdata,
                    tensor._version,
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                )
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiny(**batch(0), use_cache=False)
    return len(seen)


def test_selective_keeps_products_and_forms_the_rest_again():
    peaks = {}
    for acts in ("keep", "selective", "checkpoint"):
        frame = _traced(acts=acts).frame.query(
            "event == 'alloc' and step == 1 and phase == 'recompute'"
        )
        made = frame["op"].value_counts()
        peaks[acts] = made.get("aten.mm.default", 0), made.get("aten.rsqrt.default", 0), made.sum()
    assert peaks["keep"] == (0, 0, 0) and peaks["selective"][0] == 0 < peaks["checkpoint"][0]
    assert (
        peaks["selective"][1] == peaks["checkpoint"][1] > 0
        and peaks["selective"][2] < peaks["checkpoint"][2]
    )


@pytest.mark.parametrize("every", [1, 2])
def test_offloaded_inputs_of_blocks_are_their_bytes_on_the_host(every):
    kept, moved = (
        _traced(acts={"checkpoint": {"every": every, "offload": offload}})
        for offload in (False, True)
    )
    blocks = math.ceil(3 / every)
    assert moved.host_bytes - kept.host_bytes == blocks * 3 * 11 * 20 * 4


def test_a_process_group_that_cannot_clip_on_the_host_says_so(monkeypatch):
    row = read_row("row", {"place": "fsdp_offload", "clip": 1.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ImpossibleHere, match="cpu:gloo,cuda:nccl"):
        check_machine(row, "cuda")


BUDGETS = {"host_weights": 1.35 * GIB}


@pytest.mark.parametrize("regime", BUDGETS)
def test_the_7b_stays_in_its_budget(regime):
    """bf16 weights, 1,024 tokens. host_weights: two blocks, their inputs, one block formed
    again."""
    assert_peak(regime, "baichuan2-7b", 1024, 1, BUDGETS[regime], "bf16")


def test_the_hosts_copy_follows_what_other_parts_train():
    """Two parts that both hold every weight, as no row has them: each finds what the other has made
    of it."""
    whole = read_row(
        "row", {"place": "host_state", "trains": {"blocks": {"count": 1, "ends": "units"}}}
    )
    ends = {}
    for place in ("device", "host_state"):
        trainer = Trainer(
            model(),
            read_row(
                "row",
                {
                    "place": place,
                    "trains": {
                        "blocks": {
                            "interval": 1,
                            "ends": "units",
                            "order": "ascending",
                            "state": "host",
                        }
                    },
                },
            ),
            Schedule(1e-2, 6),
        )
        trainer.parts = whole.trains.parts(trainer.model) * 2
        for step in range(5):
            trainer.step([batch(step)])
        ends[place] = trainer.finish().state_dict()
    assert all(
        torch.equal(ends["device"][name], tensor) for name, tensor in ends["host_state"].items()
    )
