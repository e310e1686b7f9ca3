"""What is not labelled teaches nothing, and what is labelled counts once: the large batch's
gradient, however it is cut."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from micro import batch, model, ranks
from vramlab.baichuan.head import next_labels
from vramlab.capture.meter import Meter
from vramlab.regimes.regime import IllegalRegime, read_regimes, read_row, regime_row
from vramlab.regimes.sharded import local
from vramlab.training.trainer import Schedule, Trainer

REGIMES = read_regimes()


def without_labels(seed: int, **shape) -> dict:
    rows = batch(seed, **shape)
    return {**rows, "labels": torch.full_like(rows["labels"], -100)}


def weights(trainer: Trainer) -> dict:
    return {
        name: local(tensor).detach().clone() for name, tensor in trainer.model.state_dict().items()
    }


@pytest.mark.parametrize("name", REGIMES)
def test_a_step_without_labels_is_refused_and_changes_nothing(name):
    with ranks(REGIMES[name]):
        trainer = Trainer(model(), REGIMES[name], Schedule(1e-2, 4))
        before = deepcopy(weights(trainer))
        unpredicted = without_labels(0)
        unpredicted["labels"][:, 0] = 5  # the first of a row: nothing predicts it
        for rows in (without_labels(1), *([] if name == "prompt" else [unpredicted])):
            with pytest.raises(
                ValueError,
                match=(
                    "no token of step 0 is labelled, in none of its 1 micro-batches.*leave such a"
                ),
            ):
                trainer.step([rows])
        assert all(torch.equal(before[key], tensor) for key, tensor in weights(trainer).items())
        assert torch.isfinite(trainer.step([batch(2)])), "the trainer goes on after a refusal"


@pytest.mark.parametrize("label", [-1, -101, 61, 2**40])
@pytest.mark.parametrize(
    "row", [{}, {"head": "fused"}, {"head": "fused", "trains": "prompt"}], ids=str
)
def test_a_label_outside_the_vocabulary_is_refused_by_name_and_changes_nothing(row, label):
    """The fused head would train on it: it takes no logit for the label, and goes on."""
    trainer = Trainer(model(), read_row("row", {**row, "accumulate": 2}), Schedule(1e-2, 4))
    before, wrong = deepcopy(weights(trainer)), batch(0)
    wrong["labels"][1, 4] = label
    with pytest.raises(
        ValueError, match=f"label of step 0 is {label}, outside the vocabulary of 61: use 0 to 60"
    ):
        trainer.step([batch(1), wrong])
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(trainer).items())
    wrong["labels"][1, 4] = 60
    assert torch.isfinite(trainer.step([batch(1), wrong])), "the trainer goes on after a refusal"


@pytest.mark.parametrize("shares", [None, [1.0]])
def test_a_batch_without_labels_is_refused_by_name(shares):
    trainer, unlabelled = Trainer(model(), read_row("row", {}), Schedule(1e-2, 4)), batch(0)
    del unlabelled["labels"]
    for rows in (unlabelled, {**unlabelled, "labels": None}):
        with pytest.raises(ValueError, match="micro-batch of step 0 has no labels.*needs labels"):
            trainer.step([rows], shares)


def accumulating() -> list[str]:
    names = []
    for name in REGIMES:
        try:
            read_row(name, {**regime_row(name), "accumulate": 3})
            names.append(name)
        except IllegalRegime:
            continue
    return names


@pytest.mark.parametrize("name", accumulating())
def test_a_micro_batch_without_labels_contributes_nothing(name):
    """Two steps of three micro-batches, of which one is empty, against the two others; every row
    that can accumulate."""
    trained = []
    for count in (2, 3):
        regime = read_row(name, {**regime_row(name), "accumulate": count})
        with ranks(regime):
            trainer = Trainer(model(), regime, Schedule(1e-2, 4))
            losses = []
            for step in range(2):
                full = [batch(10 * step), batch(10 * step + 1, rows=2)]
                losses.append(
                    float(
                        trainer.step([full[0], without_labels(9), full[1]] if count == 3 else full)
                    )
                )
            trained.append((losses, weights(trainer)))
    assert trained[0][0] == trained[1][0]
    assert all(
        torch.equal(tensor, trained[1][1][key]) and tensor.isfinite().all()
        for key, tensor in trained[0][1].items()
    )


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.5])
@pytest.mark.parametrize("head", ["plain", "fused"])
def test_no_label_has_no_gradient_whatever_forms_the_loss(head, z_loss_weight):
    """What a rank without labels would hand to the others, and what a loop of one's own meets."""
    tiny = read_row("row", {"head": head}).head.prepare(model(z_loss_weight=z_loss_weight))
    tiny(**without_labels(0)).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in tiny.parameters())


def packed(seed: int, lengths: tuple[int, ...], width: int = 14) -> dict:
    """One row of documents, numbered in the mask, padded to `width`."""
    row = batch(seed, rows=1, tokens=width)
    numbers = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    row["attention_mask"] = torch.tensor([numbers + [0] * (width - len(numbers))])
    row["labels"][row["attention_mask"] == 0] = -100
    return row


CUTS = {"many short": (2, 3, 2, 4, 3), "one": (14,), "padded": (5, 2), "singles": (1, 1, 1, 1, 8)}


@pytest.mark.parametrize("head", ["plain", "fused"])
@pytest.mark.parametrize("trains", ["all", "prompt", "prefix"])
def test_packed_micro_batches_add_up_to_the_large_batch(trains, head):
    """The loss drops the first label of each document, so shares have to: here a half to nine
    tenths of the labels count."""
    rows = [packed(seed, lengths) for seed, lengths in enumerate(CUTS.values())]
    together = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    losses, gradients = [], []
    for accumulate, batches in ((1, [together]), (4, rows)):
        regime = read_row(
            "row", {"rule": "sgd", "trains": trains, "head": head, "accumulate": accumulate}
        )
        trainer = Trainer(model(), regime, Schedule(1.0, 1, warmup=0))
        before = weights(trainer)
        losses.append(float(trainer.step(batches)))
        gradients.append({name: before[name] - tensor for name, tensor in weights(trainer).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trains", ["all", "prompt", "prefix"])
def test_the_trainer_counts_what_the_loss_counts(trains, monkeypatch):
    """Of the labels that reach the head, behind whatever peft puts before the row."""
    seen = []
    head = type(model().lm_head)
    forward = head.forward
    monkeypatch.setattr(
        head,
        "forward",
        lambda self, hidden, labels=None, z_loss_weight=0.0: (
            seen.append(int((labels != -100).sum())),
            forward(self, hidden, labels, z_loss_weight),
        )[1],
    )
    trainer = Trainer(model(), read_row("row", {"trains": trains}), Schedule(1e-3, 9))
    batches = [*(packed(seed, lengths) for seed, lengths in enumerate(CUTS.values())), batch(7)]
    batches.append({key: value for key, value in batch(8).items() if key != "attention_mask"})
    if trains == "all":  # peft drops positions that are given to a prompt
        batches.append(
            {**batches[-1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0]])}
        )
    for each in batches:
        trainer.step([each])
    assert seen == [int((trainer.regime.trains.predicted(each) != -100).sum()) for each in batches]
    assert len(set(seen)) > 3


def test_next_labels_cross_no_edge():
    labels, mask = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert next_labels(labels).tolist() == [[2, 3, 4, 5, 6, -100]]
    assert next_labels(labels, mask).tolist() == [[2, -100, 4, 5, -100, -100]]
    assert next_labels(
        labels, torch.cat([torch.ones(1, 3, dtype=torch.long), mask], 1)
    ).tolist() == [[2, -100, 4, 5, -100, -100]]


def test_counting_labels_is_not_seen_by_who_watches_the_step():
    frames = []
    for shares in (None, [1.0]):
        meter = Meter()
        trainer = Trainer(model(), REGIMES["lomo"], Schedule(1e-3, 2), observer=meter)
        with meter:
            trainer.step([batch(0)], shares)
        frames.append(meter.frame()[["event", "bytes", "op", "phase"]])
    assert frames[0].equals(frames[1])
