"""What rounding does to positions: ALiBi's table and rotary angles, exact against bf16.

bf16 keeps 8 bits of a number, so it knows every whole number up to 256, then every second, then
every fourth. The paper (2.5) keeps all that has to do with positions in fp32 for that reason. ALiBi
adds slope * distance to the scores of a head (Press 2022, arXiv:2108.12409), and what that becomes
depends on how it is formed:

    relative    slope * (j - i), formed in fp32, then rounded: ours, and the released training
                code's. Near keys, where attention
                is, are exact or nearly so.
    absolute    slope * j, then rounded, which softmax turns into the same numbers in exact
                arithmetic: the released evaluation
                code's. Here near keys of a late query are the ones that collide.
    bf16 steps  slope and distance rounded before they are multiplied, and the product again.

Tables of this file are a study's measurements: one row a cell, plain columns.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from vramlab.baichuan.attention import alibi_slopes
from vramlab.factcc.generator import generate_items
from vramlab.factcc.scoring import score_items
from vramlab.runs.parameters import KNOWN_PARAMETERS
from vramlab.runs.preparation import base_of

FORMS = ("relative", "absolute", "bf16 steps")


def alibi_bias(form: str, slopes: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """slopes (h,) -> what is added to the scores of the last of `length` queries (h, length), in
    the slopes' type, rounded to `dtype` as `form` says."""
    place = torch.arange(length, dtype=slopes.dtype)
    distance, wide = place - (length - 1), slopes[:, None]
    bias = {
        "relative": lambda: (wide * distance).to(dtype),
        "absolute": lambda: (wide * place).to(dtype),
        "bf16 steps": lambda: wide.to(dtype) * distance.to(dtype),
    }[form]()
    return bias.to(slopes.dtype)


def alibi_table(heads: int, length: int) -> pd.DataFrame:
    """Of the last of `length` tokens, each head and form: `slope`; `distinct`, how many different
    numbers the `length` distances have in bf16; `first_collision`, the least distance whose number
    is also another's, -1 where all differ; `largest_error`, of slope * distance, in nats."""
    rows, slopes = [], alibi_slopes(heads).double()
    for form in FORMS:
        for head, slope in enumerate(slopes):
            exact, seen = (
                alibi_bias(form, slope[None], length, dtype)[0].flip(0)
                for dtype in (torch.float64, torch.bfloat16)
            )
            again = torch.isin(seen, _repeated(seen)).nonzero().flatten()
            # what all keys share, softmax does not see
            error = (seen - exact) - (seen[0] - exact[0])
            rows.append(
                {
                    "form": form,
                    "head": head,
                    "slope": float(slope),
                    "distinct": len(seen.unique()),
                    "first_collision": int(again[0]) if len(again) else -1,
                    "largest_error": float(error.abs().max()),
                }
            )
    return pd.DataFrame(rows)


def _repeated(values: Tensor) -> Tensor:
    found, counts = values.unique(return_counts=True)
    return found[counts > 1]


def alibi_attention(heads: int, length: int, seed: int, score_std: float = 1.0) -> pd.DataFrame:
    """How far attention of the last query moves when ALiBi's table is bf16, each head and form:
    `moved`, half the sum of |softmax - exact softmax|, the share of attention that is on other
    keys; `largest`, of one key. Scores without positions are normal, drawn by `seed`, of standard
    deviation `score_std`, and the same for all forms; also with scores of 0 (`scores`).
    """
    generator, slopes, rows = torch.Generator().manual_seed(seed), alibi_slopes(heads).double(), []
    drawn = torch.randn(heads, length, generator=generator, dtype=torch.float64) * score_std
    for name, scores in (("zero", torch.zeros_like(drawn)), ("normal", drawn)):
        for form in FORMS:
            exact, seen = (
                (scores + alibi_bias(form, slopes, length, dtype)).softmax(-1)
                for dtype in (torch.float64, torch.bfloat16)
            )
            moved = (seen - exact).abs()
            rows += [
                {
                    "form": form,
                    "scores": name,
                    "head": head,
                    "slope": float(slopes[head]),
                    "moved": float(moved[head].sum() / 2),
                    "largest": float(moved[head].max()),
                }
                for head in range(heads)
            ]
    return pd.DataFrame(rows)


class RoundedRotary(nn.Module):
    """Rotary positions with something rounded to bf16: `positions` (whole numbers collide past
    256), `angles` (position * frequency, the first of which is the position itself), or `tables`
    (cos and sin, each rounded once); `none` rounds nothing. Every position is moved up by `offset`,
    which changes no attention score in exact arithmetic."""

    ROUNDED = ("none", "tables", "positions", "angles")

    def __init__(self, exact: nn.Module, rounded: str, offset: int):
        super().__init__()
        self.exact, self.rounded, self.offset = exact, rounded, offset

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(b or 1, q) -> cos, sin, as `RotaryEmbedding`."""
        place = (position_ids + self.offset).float()
        if self.rounded == "positions":
            place = place.bfloat16().float()
        angles = place[:, None, :, None] * self.exact.inv_freq
        if self.rounded == "angles":
            angles = angles.bfloat16().float()
        angles = torch.cat((angles, angles), dim=-1)
        tables = angles.cos(), angles.sin()
        return (
            tuple(table.bfloat16().float() for table in tables)
            if self.rounded == "tables"
            else tables
        )


def shifted(
    model: str, recipe: str, items: int, offset: int, domain: str = "general", max_length: int = 256
) -> pd.DataFrame:
    """A trained base scored with every position moved up by `offset`, and something rounded, see
    `RoundedRotary`: `changed`, the share of items judged otherwise than in fp32 without a move, at
    the same threshold; `largest_logit_error` and `mean_logit_error`, of the answer's log odds;
    `log_odds_std`, how much these vary between items.
    """
    trained, tokenizer, _ = base_of(
        {**KNOWN_PARAMETERS, "model": model, "recipe": recipe}, progress=False
    )
    drawn = generate_items(domain, "test", items, 1)
    exact = trained.model.rotary_emb

    def log_odds(rounded: str, moved: int) -> Tensor:
        trained.model.rotary_emb = RoundedRotary(exact, rounded, moved)
        return torch.tensor(
            score_items(trained, tokenizer, drawn, 64, max_length)["yesno"].to_numpy()
        )

    truth, rows = log_odds("none", 0), []
    cut = truth.median()
    for rounded in RoundedRotary.ROUNDED:
        error = (seen := log_odds(rounded, offset)) - truth
        rows.append(
            {
                "rounded": rounded,
                "changed": float(((seen > cut) != (truth > cut)).double().mean()),
                "largest_logit_error": float(error.abs().max()),
                "mean_logit_error": float(error.abs().mean()),
                "log_odds_std": float(truth.std()),
            }
        )
    return pd.DataFrame(rows)
