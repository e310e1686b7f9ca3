"""What the stages of a base cost and are fed, by value: every weight, rate, count and size is the
recipe's own."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import micro
from vramlab.baichuan.tokenizer import ASSISTANT_ID
from vramlab.factcc.base import training as base_training
from vramlab.factcc.base.curriculum import copies, echoes
from vramlab.factcc.base.recipe import Recipe
from vramlab.factcc.prompt import IGNORED

NO, YES = 5, 9
ANSWERS = ((0, 6), (0, 11), (1, 9))
AGREES = {(0, 3): 1.0, (0, 4): 1.0, (0, 8): 0.0, (1, 4): 1.0, (1, 6): 0.0}


def checked_batch() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens; three answers after an assistant's mark; learned words in the first
    row; five known agreements."""
    ids = torch.randint(10, 190, (2, 12), generator=torch.Generator().manual_seed(0))
    labels, agrees = torch.full_like(ids, IGNORED), torch.full(ids.shape, torch.nan)
    for row, at in ANSWERS[:1] + ANSWERS[2:]:
        ids[row, at], ids[row, at + 1] = ASSISTANT_ID, YES
        labels[row, at + 1] = YES
    ids[0, 10], ids[0, 11] = ASSISTANT_ID, NO
    labels[0, 11] = NO
    labels[0, 2:5] = ids[0, 2:5]
    for place, value in AGREES.items():
        agrees[place] = value
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "agrees": agrees,
    }


@pytest.fixture(scope="module")
def model():
    return micro.model(vocab_size=200).eval()


def loss_of(model, recipe: Recipe):
    return partial(base_training._loss, model, recipe, (NO, YES))


def means(model, batch) -> tuple[float, float, float]:
    """(words, answers, agreement): the three means that a recipe weighs, each formed place by
    place."""
    entering = []
    hook = model.model.layers[-1].register_forward_pre_hook(
        lambda _, inputs: entering.append(inputs[0])
    )
    scores = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits.log_softmax(
        -1
    )
    hook.remove()
    sums: dict[bool, list[float]] = {True: [], False: []}
    for row, at in (batch["labels"] != IGNORED).nonzero().tolist():
        label = int(batch["labels"][row, at])
        sums[int(batch["input_ids"][row, at - 1]) == ASSISTANT_ID].append(
            -float(scores[row, at - 1, label])
        )
    head = torch.nn.functional.normalize(model.lm_head.weight)
    hidden = model.model.norm(entering[0])
    chances = [
        1 / (1 + math.exp(-float(hidden[place] @ (head[YES] - head[NO])))) for place in AGREES
    ]
    agreement = [
        -math.log(chance if value else 1 - chance)
        for chance, value in zip(chances, AGREES.values(), strict=True)
    ]
    assert (len(sums[False]), len(sums[True]), len(agreement)) == (3, 3, 5)
    return tuple(sum(each) / len(each) for each in (sums[False], sums[True], agreement))


@pytest.mark.parametrize("weights", [None, (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.5, 0.75)])
def test_a_claims_loss_is_the_recipes_weighted_sum_of_three_means(model, weights):
    recipe = (
        Recipe()
        if weights is None
        else dataclasses.replace(Recipe(), answer_weight=weights[0], agrees_weight=weights[1])
    )
    batch, loss = checked_batch(), loss_of(model, recipe)
    with torch.no_grad():
        words, answers, agreement = means(model, batch)
        found = float(loss(batch))
    assert found == pytest.approx(
        words + recipe.answer_weight * answers + recipe.agrees_weight * agreement, rel=1e-4
    )
    assert min(words, answers, agreement) > 0.1, (
        "each of the three is large enough to be seen in the sum"
    )


def test_a_drills_loss_is_the_plain_mean_over_its_labels_whatever_the_weights(model):
    drill = next(copies(torch.arange(10, 190), 4, 0))
    loss = loss_of(model, dataclasses.replace(Recipe(), answer_weight=7.0, agrees_weight=5.0))
    with torch.no_grad():
        scores = model(drill["input_ids"], use_cache=False).logits.log_softmax(-1)
        found = float(loss(drill))
    places = [(row, at) for row, at in (drill["labels"] != IGNORED).nonzero().tolist()]
    terms = [-float(scores[row, at - 1, drill["labels"][row, at]]) for row, at in places]
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


ODD = Recipe(
    copy_steps=11,
    copy_until=0.25,
    copy_lr=0.5,
    drill_batch=3,
    echo_steps=13,
    invented_steps=17,
    general_steps=19,
    lr=0.125,
    batch=5,
    seed=23,
    documents=31,
)
"""Every number another."""


def test_every_stage_has_the_recipes_steps_rate_batch_and_items(monkeypatch):
    fed = []
    monkeypatch.setattr(
        base_training, "checked_batches", lambda tokenizer, *asked: fed.append(asked) or asked
    )
    words = [f"{kind}{number}" for number in range(60) for kind in ("word", "Name")]
    tokenizer = SimpleNamespace(
        sp=SimpleNamespace(piece_to_id=lambda piece: 1000 + words.index(piece.removeprefix("▁")))
    )
    stages = {name: rest for name, *rest in base_training._stages(ODD, tokenizer, words)}
    assert {name: (rest[0].lr, rest[0].steps, rest[1]) for name, rest in stages.items()} == {
        "copy": (0.5, 11, 0.25),
        "echo": (0.5, 13, 0.0),
        "invented": (0.125, 17, 0.0),
        "general": (0.125, 19, 0.0),
    }
    assert [rest[0].floor for rest in stages.values()] == [
        1.0,
        0.1,
        0.1,
        0.1,
    ], "copying is learned at once, at the full rate"
    for name, stream, tokens in (("copy", copies, 40), ("echo", echoes, 64)):
        drill, again = next(stages[name][2]), next(stream(1000 + torch.arange(120), 3, 23))
        assert drill["input_ids"].shape == (3, tokens) and all(
            torch.equal(drill[key], again[key]) for key in again
        )
    (invented, *first), (both, *second) = fed
    assert first == second == [5, 23]
    assert len(invented) == 4 * (31 // 3) and len({item.group for item in invented}) == 10
    assert both[-len(invented) :] == invented and len(both) - len(invented) == 4 * 31


@pytest.mark.parametrize(
    ("stream", "tokens", "least", "most", "after"), [(copies, 40, 3, 16, 0), (echoes, 64, 8, 30, 2)]
)
def test_a_drill_repeats_after_its_period_and_is_learned_from_there_on(
    stream, tokens, least, most, after
):
    drills = stream(torch.arange(1000), 64, 0)
    periods, kinds = set(), set()
    for drill in (next(drills) for _ in range(6)):
        for ids, labels in zip(drill["input_ids"].tolist(), drill["labels"].tolist(), strict=True):
            first = next(at for at, label in enumerate(labels) if label != IGNORED)
            period = first - 1 - after
            assert (
                len(ids) == tokens
                and ids[period:] == ids[:-period]
                and labels[first:] == ids[first:]
            )
            assert stream is echoes or len(set(ids[:period])) == period, (
                "words of a copy are distinct"
            )
            periods.add(period)
            kinds.add(len(set(ids)) / period)
    assert (min(periods), max(periods)) == (least, most) and len(periods) == most - least + 1
    assert stream is copies or (min(kinds) < 0.4 and 0.5 < max(kinds) <= 0.75), (
        "a quarter to three quarters as many words"
    )
