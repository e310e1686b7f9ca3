"""Positions in bf16: the tables are the model's own, and rounding does to them what arithmetic says."""

import pytest
import torch

from micro import batch, model
from vramlab.baichuan.attention import alibi_slopes, attention_bias
from vramlab.positions import RoundedRotary, alibi_attention, alibi_bias, alibi_table


def test_the_relative_table_is_the_one_that_the_model_adds():
    made = model("alibi", num_attention_heads=2, hidden_size=20)
    slopes = alibi_slopes(2)
    own = attention_bias(made.config, None, 300, 300, torch.bfloat16, torch.device("cpu"), slopes)[0, :, -1]
    assert torch.equal(alibi_bias("relative", slopes, 300, torch.bfloat16), own.float())


def test_absolute_columns_of_the_first_published_head_are_those_that_the_released_code_adds():
    found = alibi_bias("absolute", alibi_slopes(40)[:1], 1024, torch.bfloat16)[0, -6:]
    assert found.tolist() == [856, 856, 856, 860, 860, 860]


def test_distances_collide_from_256_on_and_columns_at_once():
    for length, first, distinct in ((256, -1, 256), (257, -1, 257), (258, 256, 257), (1024, 256, 513)):
        its = alibi_table(8, length)  # eight slopes, all powers of two
        relative = its[its["form"] == "relative"]
        assert set(relative["first_collision"]) == {first} and set(relative["distinct"]) == {distinct}
    assert set(its.loc[its["form"] == "absolute", "first_collision"]) == {0}


def test_attention_moves_where_near_keys_collide():
    its = alibi_attention(8, 1024, seed=0).groupby("form")["moved"].max()
    assert its["relative"] < 0.01 < 0.1 < its["absolute"] <= 1


@pytest.mark.parametrize(("rounded", "offset", "equal"), [("none", 0, True), ("none", 2000, True), ("positions", 200, True),
                                                         ("positions", 2000, False), ("angles", 2000, False)])
def test_moving_all_positions_changes_nothing_unless_they_are_rounded(rounded, offset, equal):
    made, ids = model(initializer_range=0.5).eval(), batch(0)["input_ids"]
    with torch.no_grad():
        truth = made(ids).logits
        made.model.rotary_emb = RoundedRotary(made.model.rotary_emb, rounded, offset)
        error = float((made(ids).logits - truth).abs().max() / truth.std())
    assert error < 0.02 if equal else error > 0.1, error
