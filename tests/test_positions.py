"""Positions in bf16: the tables are the model's own, and rounding does to them what arithmetic
says."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import baichuan2_positions as positions
from baichuan2_positions import RoundedRotary, alibi_attention, alibi_bias, alibi_table, shifted
from micro import batch, model
from vramlab.baichuan.attention import alibi_slopes, attention_bias


def test_the_relative_table_is_the_one_that_the_model_adds():
    made = model("alibi", num_attention_heads=2, hidden_size=20)
    slopes = alibi_slopes(2)
    own = attention_bias(made.config, None, 300, 300, torch.bfloat16, torch.device("cpu"), slopes)[
        0, :, -1
    ]
    assert torch.equal(alibi_bias("relative", slopes, 300, torch.bfloat16), own.float())


def test_absolute_columns_of_the_first_published_head_are_those_that_the_released_code_adds():
    found = alibi_bias("absolute", alibi_slopes(40)[:1], 1024, torch.bfloat16)[0, -6:]
    assert found.tolist() == [856, 856, 856, 860, 860, 860]


def test_distances_collide_from_256_on_and_columns_at_once():
    for length, first, distinct in (
        (256, -1, 256),
        (257, -1, 257),
        (258, 256, 257),
        (1024, 256, 513),
    ):
        its = alibi_table(8, length)  # eight slopes, all powers of two
        relative = its[its["form"] == "relative"]
        assert set(relative["first_collision"]) == {first} and set(relative["distinct"]) == {
            distinct
        }
    assert set(its.loc[its["form"] == "absolute", "first_collision"]) == {0}


def test_attention_moves_where_near_keys_collide():
    its = alibi_attention(8, 1024, seed=0).groupby("form")["moved"].max()
    assert its["relative"] < 0.01 < 0.1 < its["absolute"] <= 1


@pytest.mark.parametrize(
    ("rounded", "offset", "equal"),
    [
        ("none", 0, True),
        ("none", 2000, True),
        ("positions", 200, True),
        ("positions", 2000, False),
        ("angles", 2000, False),
    ],
)
def test_moving_all_positions_changes_nothing_unless_they_are_rounded(rounded, offset, equal):
    made, ids = model(initializer_range=0.5).eval(), batch(0)["input_ids"]
    with torch.no_grad():
        truth = made(ids).logits
        made.model.rotary_emb = RoundedRotary(made.model.rotary_emb, rounded, offset)
        error = float((made(ids).logits - truth).abs().max() / truth.std())
    assert error < 0.02 if equal else error > 0.1, error


def test_the_forms_of_a_bias_by_hand():
    """A slope of 1 + 2^-9 is no bf16 number; 3 of it is 3 + 1.5 * 2^-8, which rounds to 3 too."""
    slope = torch.tensor([1 + 2.0**-9], dtype=torch.float64)
    exact = {
        form: alibi_bias(form, slope, 4, torch.float64)[0].tolist() for form in positions.FORMS
    }
    assert (
        exact["relative"]
        == exact["bf16 steps"]
        == [-3 * float(slope), -2 * float(slope), -float(slope), 0]
    )
    assert exact["absolute"] == [0, float(slope), 2 * float(slope), 3 * float(slope)]
    assert alibi_bias("relative", slope, 4, torch.bfloat16)[0].tolist() == [-3, -2, -1, 0]
    far = torch.tensor([0.7], dtype=torch.float64)
    assert alibi_bias("bf16 steps", far, 258, torch.bfloat16)[0, 0] == float(
        torch.tensor(0.7).bfloat16() * -256
    ), "257 is 256"


def test_the_table_of_one_slope_by_hand():
    """The slope of one head is 2^-8: of 300 keys every distance up to 256 is exact, and from there
    each odd one rounds to even."""
    its = alibi_table(1, 300).set_index("form")
    assert set(its["slope"]) == {2.0**-8} and set(its["head"]) == {0}
    distinct = (
        257 + 43 // 2 + 1
    )  # 0 to 256, then the 43 up to 299 by twos, of which 299 rounds up to 300
    assert its.loc["relative", ["distinct", "first_collision", "largest_error"]].tolist() == [
        distinct,
        256,
        2.0**-8,
    ]
    assert its.loc["bf16 steps", ["distinct", "first_collision", "largest_error"]].tolist() == [
        distinct,
        256,
        2.0**-8,
    ]
    # columns 0 to 299: the last query's own, 299, becomes 300, so all exact ones are one off, and
    # those that round down two
    assert its.loc["absolute", ["first_collision", "largest_error"]].tolist() == [2, 2 * 2.0**-8]


def test_attention_that_moves_is_the_share_that_other_keys_gain():
    its = alibi_attention(2, 600, seed=3, score_std=2.0)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 600, generator=generator, dtype=torch.float64) * 2
    slopes = alibi_slopes(2).double()
    for name, scores in (("zero", 0 * drawn), ("normal", drawn)):
        for form in positions.FORMS:
            exact, seen = (
                torch.softmax(scores + alibi_bias(form, slopes, 600, dtype), -1)
                for dtype in (torch.float64, torch.bfloat16)
            )
            rows = its[(its["scores"] == name) & (its["form"] == form)]
            assert rows["head"].tolist() == [0, 1] and rows["slope"].tolist() == slopes.tolist()
            gained = (seen - exact).clamp_min(0).sum(-1)
            assert rows["moved"].tolist() == pytest.approx(gained.tolist(), abs=1e-12)
            assert rows["largest"].tolist() == pytest.approx(
                (seen - exact).abs().amax(-1).tolist(), abs=1e-12
            )


@pytest.mark.parametrize(
    ("rounded", "angle"),
    [("none", 257 * 0.7), ("tables", 257 * 0.7), ("positions", 256 * 0.7), ("angles", 180.0)],
)  # 179.9, and numbers from 128 on are whole
def test_rotary_angles_by_hand(rounded, angle):
    exact = SimpleNamespace(inv_freq=torch.tensor([0.7, 0.0]))
    module = RoundedRotary.__new__(RoundedRotary)
    torch.nn.Module.__init__(module)
    module.exact, module.rounded, module.offset = exact, rounded, 250
    cos, sin = module(torch.tensor([[7]]))
    assert (
        cos.shape == sin.shape == (1, 1, 1, 4)
        and cos[..., 1].item() == 1
        and torch.equal(cos[..., :2], cos[..., 2:])
    )
    wanted = torch.tensor(angle, dtype=torch.float64)
    for table, value in ((cos, wanted.cos()), (sin, wanted.sin())):
        value = value.float().bfloat16().float() if rounded == "tables" else value.float()
        assert table[..., 0].item() == pytest.approx(float(value), abs=3e-5)


def test_a_moved_base_is_judged_at_the_median_of_the_exact_one(monkeypatch):
    """Five items with log odds 0 to 4; what is rounded moves them by hand."""
    moves = {"tables": [0, 0, 1, 0, 0], "positions": [3, 0, 0, 0, -4], "angles": [0, 0, 0, 0, 0]}
    model, asked = SimpleNamespace(rotary_emb="exact"), []

    def score_items(trained, tokenizer, drawn, batch_size, max_length):
        rotary = trained.model.rotary_emb
        asked.append((rotary, drawn, max_length))
        move = moves.get(rotary[1], [0] * 5) if rotary[2] else [0] * 5
        return pd.DataFrame({"yesno": [at + more for at, more in enumerate(move)]}, dtype=float)

    monkeypatch.setattr(
        positions,
        "base_of",
        lambda params, progress: (SimpleNamespace(model=model), params["recipe"], None),
    )
    monkeypatch.setattr(positions, "generate_items", lambda *what: what)
    monkeypatch.setattr(positions, "score_items", score_items)
    kind = type("Kept", (), {"ROUNDED": RoundedRotary.ROUNDED, "__new__": lambda cls, *made: made})
    monkeypatch.setattr(positions, "RoundedRotary", kind)
    found = shifted("tiny", "smoke", 5, 100, "news", 64).set_index("rounded")
    assert asked == [(("exact", "none", 0), ("news", "test", 5, 1), 64)] + [
        (("exact", name, 100), ("news", "test", 5, 1), 64) for name in RoundedRotary.ROUNDED
    ]
    assert found["changed"].to_dict() == {"none": 0, "tables": 0.2, "positions": 0.4, "angles": 0}
    assert found["largest_logit_error"].to_dict() == {
        "none": 0,
        "tables": 1,
        "positions": 4,
        "angles": 0,
    }
    assert found["mean_logit_error"].tolist() == pytest.approx([0, 0.2, 1.4, 0])
    assert found["log_odds_std"].tolist() == pytest.approx([2.5**0.5] * 4)
