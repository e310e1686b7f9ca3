"""The base: made once, whole or not at all, and as good as its recipe says."""

from __future__ import annotations

import math

import pytest
import torch

from vramlab import base
from vramlab.base import Recipe, base_model
from vramlab.factcc.generator import generate_items
from vramlab.factcc.grammar import GRAMMARS
from vramlab.factcc.prompt import encode_item
from vramlab.lessons import checked_batches, invented_items
from vramlab.passes import model_spec

SMOKE = Recipe.named("smoke")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, *base_model(model_spec("tiny"), cache, SMOKE, progress=False)


def test_the_record_says_how_it_was_made(made):
    _, model, tokenizer, record = made
    spec = model_spec("tiny")
    assert record["hash"] == SMOKE.hash(spec) != Recipe().hash(spec) and record["threads"] == torch.get_num_threads()
    assert list(record["stages"]) == ["copy", "echo", "invented", "general"]
    assert all(stage["steps"] == 2 and math.isfinite(stage["loss_last"]) for stage in record["stages"].values())
    assert record["parameters"] == sum(p.numel() for p in model.parameters()) and tokenizer.vocab_size == spec.config.vocab_size
    assert not model.model.layers[-1]._forward_pre_hooks


def test_the_second_call_reads_what_the_first_made(made, monkeypatch):
    cache, model, _, record = made
    monkeypatch.setattr(base, "_make", lambda *_: pytest.fail("made again"))
    again, _, same = base_model(model_spec("tiny"), cache, SMOKE, progress=False)
    assert same == record
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_the_same_recipe_makes_the_same_weights(made, tmp_path):
    again, _, _ = base_model(model_spec("tiny"), tmp_path, SMOKE, progress=False)
    assert all(torch.equal(one, other) for one, other in zip(made[1].parameters(), again.parameters(), strict=True))


def test_an_interrupted_making_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "_reached", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_model(model_spec("tiny"), tmp_path, SMOKE, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="standard, reading, smoke"):
        Recipe.named("best")


def test_every_name_and_place_is_one_piece(made):
    tokenizer = made[2]
    for grammar in GRAMMARS.values():
        assert all(len(tokenizer.encode_text(f" {word}")) == 1 for word in (*grammar.names, *grammar.places, *grammar.objects))
    item = generate_items("news", "test", 1, 0)[0]
    words = len(item.doc.split()) + len(item.claim.split())
    assert len(encode_item(tokenizer, item, 512).input_ids) == words + 3  # [195], "Claim:", [196]


def test_invented_documents_say_no_sentence_of_a_real_domain_and_a_claim_agrees_until_its_wrong_word(made):
    tokenizer = made[2]
    items = invented_items(base._vocabulary(), 50, 0)
    assert all(item.claim in item.doc for item in items if item.label)
    real = {item.claim for domain in GRAMMARS for item in generate_items(domain, "train", 500, 0)}
    assert not real & {item.claim for item in items}
    batch = next(checked_batches(tokenizer, items, 8, 0))
    agrees = batch["agrees"]
    answers = (batch["input_ids"] == tokenizer.assistant_id).nonzero().tolist()
    _, yes = base.answer_ids(tokenizer)
    assert len(answers) == 32
    for row, place in answers:  # the last word of a claim agrees exactly when the answer is yes
        assert agrees[row, place - 1] == float(batch["input_ids"][row, place + 1] == yes) and agrees[row, place].isnan()


def test_half_the_recipe_still_reaches_its_score(tmp_path):
    """The one slow test, some 180 seconds of one core: the standard recipe with half of its last stage. On 500 items it reached
    likelihood .79 and yes/no .66, the whole recipe .79 and, by seed, .80 or .71. Thresholds lie .04 and, for what depends on the
    seed, .08 under that. What the whole recipe reached is in its record, which the report prints."""
    recipe = Recipe(general_steps=Recipe().general_steps // 2)
    _, _, record = base_model(model_spec("tiny"), tmp_path, recipe, progress=False)
    assert record["general"]["likelihood"] > 0.75 and record["general"]["yesno"] > 0.58
