"""What a trained model writes: one claim a document, judged by the generator's own grammar and by a
published checker.

Prompts are those of training, cut where a claim begins. Decoding is greedy. Training never shows
where a claim ends (its words are learned, the mark behind them is not), so the claim is the first
sentence of what is written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import nn

from ..baichuan import BaichuanTokenizer
from ..baichuan.model import CACHE
from .checker import Checker
from .grammar_judge import VERDICTS, verdict
from .items import Item
from .prompt import encode_prompt
from .scoring import device_of
from .statistics import wilson

NEW_TOKENS = 64
"""At most; a claim of the generator takes some 12, one of FactCC's rarely more than 50."""
CALLS = {"oracle": VERDICTS, "checker": ("consistent", "inconsistent", "unreadable")}
END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*\s+(?=[^\sa-z])|\n")
ABBREVIATED = re.compile(
    r"(?:\b\w|\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Gov|Sen|Rep|Gen|Lt|Col|Sgt|Prof|No|vs|"
    r"Jan|Feb|Aug|Sept|Oct|Nov|Dec))\.\s*$"
)


def documents(items: Sequence[Item], count: int) -> list[Item]:
    """The first item of each of the first `count` documents of every domain and shift."""
    kept: dict[tuple[str, str], dict[str, Item]] = {}
    for item in items:
        cell = kept.setdefault((item.domain, item.shift), {})
        if len(cell) < count:
            cell.setdefault(item.group, item)
    return [item for cell in kept.values() for item in cell.values()]


@torch.no_grad()
def write_claims(
    model: nn.Module,
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """One row an item: uid, domain, shift, group, `claim` (what the model wrote of its document),
    `new_tokens`, `ended` (whether a sentence's end came before the tokens ran out), `truncated`
    (whether the document lost its end), `verbatim` (whether the claim stands in the document word
    for word) and `oracle`, see `grammar_judge.verdict`."""
    if model.training:
        raise ValueError("the model is in training mode: call .eval() before writing")
    prompts = [encode_prompt(tokenizer, item, max_length, NEW_TOKENS) for item in items]
    order, rows = sorted(range(len(items)), key=lambda i: -len(prompts[i][0])), {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        written = _continue(model, tokenizer, [prompts[i][0] for i in chosen])
        for i, (claim, tokens, ended) in zip(chosen, written, strict=True):
            item = items[i]
            rows[i] = {
                "uid": item.uid,
                "domain": item.domain,
                "shift": item.shift,
                "group": item.group,
                "claim": claim,
                "new_tokens": tokens,
                "ended": ended,
                "truncated": prompts[i][1],
                "verbatim": bool(claim) and claim in item.doc,
                "oracle": verdict(item, claim),
            }
        if progress:
            progress(len(chosen))
    return pd.DataFrame([rows[i] for i in range(len(items))])


def _continue(
    model: nn.Module, tokenizer: BaichuanTokenizer, prompts: list[list[int]]
) -> list[tuple[str, int, bool]]:
    """(claim, tokens written, whether it ended by itself) for each prompt."""
    written: list[list[int]] = [[] for _ in prompts]
    found: list[tuple[str, bool] | None] = [None] * len(prompts)
    for tokens in itertools.islice(_greedy(model, prompts, tokenizer.pad_token_id), NEW_TOKENS):
        for row, token in enumerate(tokens):
            if found[row] is None:
                found[row] = _ended(tokenizer, written[row], token)
        if all(found):
            break
    claims = [
        one or (tokenizer.decode(ids).strip(), False)
        for one, ids in zip(found, written, strict=True)
    ]
    return [(claim, len(ids), ended) for (claim, ended), ids in zip(claims, written, strict=True)]


def _ended(tokenizer: BaichuanTokenizer, ids: list[int], token: int) -> tuple[str, bool] | None:
    """Adds `token` to what was written; the claim, where that ends it: a mark, or a sentence that
    something follows."""
    if token in (tokenizer.eos_token_id, tokenizer.user_id, tokenizer.assistant_id):
        return tokenizer.decode(ids).strip(), True
    ids.append(token)
    claim = first_sentence(tokenizer.decode(ids))
    return None if claim is None else (claim, True)


def _greedy(model: nn.Module, prompts: list[list[int]], pad: int) -> Iterator[list[int]]:
    """The likeliest next token of each prompt, again and again. Prompts are padded at the left,
    which no token sees.

    Not `generate` of transformers: peft's for trained prompts and prefixes counts their tokens
    wrongly with its caches. They come in with the first forward; from then on they are in the
    cache, and the model below them goes on.
    """
    width, device = max(map(len, prompts)), device_of(model)
    ids = torch.tensor(
        [[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = getattr(output, CACHE)
    mask = torch.cat((mask.new_ones(len(prompts), cache.get_seq_length() - width), mask), 1)
    while True:
        best = output.logits[:, -1].argmax(-1)
        yield best.tolist()
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
        output = below(
            input_ids=best[:, None], attention_mask=mask, past_key_values=cache, use_cache=True
        )


def first_sentence(text: str) -> str | None:
    """Up to the first end of a sentence that something follows; None while there is none. An end is
    a full stop, question or exclamation mark with no small letter behind it, or a new line; not
    that of an initial or one of a few abbreviations.
    """
    start = len(text) - len(text.lstrip())
    for found in END.finditer(text, start):
        if not ABBREVIATED.search(text[: found.end()]):
            return text[start : found.end()].strip()
    return None


def judge(
    frame: pd.DataFrame,
    items: Sequence[Item],
    checker: Checker,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """`frame` of `write_claims(items)` with what `checker` says: `checker`, `checker_probability`,
    `checker_cut`."""
    found = checker.judge([item.doc for item in items], list(frame["claim"]), progress)
    return frame.assign(
        checker=found["called"], checker_probability=found["probability"], checker_cut=found["cut"]
    )


def shares(frame: pd.DataFrame) -> list[dict]:
    """One row for each domain, shift, judge and call: `count` of `n` claims, `share`, and its 95 %
    Wilson interval `low`, `high` over documents, which does not hold what another training seed
    would change."""
    rows = []
    for (domain, shift), cell in frame.groupby(["domain", "shift"], sort=False):
        for judged in [name for name in CALLS if name in cell]:
            calls = cell[judged].dropna()
            for call in CALLS[judged] if len(calls) else ():
                count, (low, high) = (
                    int((calls == call).sum()),
                    wilson(int((calls == call).sum()), len(calls)),
                )
                rows.append(
                    {
                        "domain": domain,
                        "shift": shift,
                        "judge": judged,
                        "call": call,
                        "count": count,
                        "n": len(calls),
                        "share": count / len(calls),
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def summary(frame: pd.DataFrame) -> dict:
    """What a run's result says of its written claims."""
    means = {
        f"{name}_share": float(frame[name].mean()) for name in ("truncated", "ended", "verbatim")
    }
    cut = (
        {"checker_cut_share": float(frame["checker_cut"].mean())} if "checker_cut" in frame else {}
    )
    return {
        "documents": len(frame),
        "new_tokens_mean": float(frame["new_tokens"].mean()),
        **means,
        **cut,
        "shares": shares(frame),
    }
