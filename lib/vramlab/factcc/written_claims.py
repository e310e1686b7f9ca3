"""Claims that a trained model writes, one per document, judged by the generator's own grammar and
by a published checker.

Prompts are those of training, cut where a claim begins. Decoding is greedy. Training never shows
where a claim ends (its words are learned, the mark after them is not), so the claim is the first
sentence of the written text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pandas as pd
import torch
from torch import nn

from ..baichuan import BaichuanTokenizer
from ..baichuan.model import CACHE
from .checker import CHECKER_CALLS, Checker
from .grammar_judge import VERDICTS, verdict
from .items import Item
from .prompt import encode_prompt
from .scoring import device_of, in_batches
from .statistics import wilson

NEW_TOKENS = 64
"""At most; a claim of the generator takes about 12, one of FactCC's rarely more than 50."""
JUDGES = {"oracle": VERDICTS, "checker": CHECKER_CALLS}
"""Column of judgements -> its values."""
END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*\s+(?=[^\sa-z])|\n")
ABBREVIATED = re.compile(
    r"(?:\b\w|\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Gov|Sen|Rep|Gen|Lt|Col|Sgt|Prof|No|vs|"
    r"Jan|Feb|Aug|Sept|Oct|Nov|Dec))\.\s*$"
)


def documents(items: Sequence[Item], count: int) -> list[Item]:
    """The first item of each of the first `count` documents of every domain and shift."""
    cells: dict[tuple[str, str], dict[str, Item]] = {}
    for item in items:
        first_items = cells.setdefault((item.domain, item.shift), {})
        if len(first_items) < count:
            first_items.setdefault(item.group, item)
    return [item for first_items in cells.values() for item in first_items.values()]


@torch.no_grad()
def write_claims(
    model: nn.Module,
    tokenizer: BaichuanTokenizer,
    items: Sequence[Item],
    batch_size: int,
    max_length: int,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """One row per item: uid, domain, shift, group, `claim` (the model's, about the item's
    document), `new_tokens`, `ended` (whether the sentence ended before the tokens ran out),
    `truncated` (whether the document was cut), `verbatim` (whether the claim stands in the document
    word for word) and `oracle`, see `grammar_judge.verdict`."""
    if model.training:
        raise ValueError("the model is in training mode: call .eval() before writing")
    prompts = [encode_prompt(tokenizer, item, max_length, NEW_TOKENS) for item in items]
    ids = [prompt for prompt, _ in prompts]
    compute = partial(_continue, model, tokenizer)
    written = in_batches(ids, list(map(len, ids)), batch_size, compute, progress)
    return pd.DataFrame(
        [
            {
                "uid": item.uid,
                "domain": item.domain,
                "shift": item.shift,
                "group": item.group,
                **claim,
                "truncated": truncated,
                "verbatim": bool(claim["claim"]) and claim["claim"] in item.doc,
                "oracle": verdict(item, claim["claim"]),
            }
            for item, claim, (_, truncated) in zip(items, written, prompts, strict=True)
        ]
    )


def _continue(
    model: nn.Module, tokenizer: BaichuanTokenizer, prompts: list[list[int]]
) -> list[dict]:
    """`claim`, `new_tokens` and `ended` for each prompt. A mark ends a claim, and so does the token
    after its sentence."""
    marks = (tokenizer.eos_token_id, tokenizer.user_id, tokenizer.assistant_id)
    written: list[list[int]] = [[] for _ in prompts]
    claims: dict[int, str] = {}
    for tokens in itertools.islice(_greedy(model, prompts, tokenizer.pad_token_id), NEW_TOKENS):
        for row, token in enumerate(tokens):
            if row in claims:
                continue
            written[row] += [] if token in marks else [token]
            text = tokenizer.decode(written[row])
            claim = text.strip() if token in marks else first_sentence(text)
            if claim is not None:
                claims[row] = claim
        if len(claims) == len(prompts):
            break
    return [
        {
            "claim": claims[row] if row in claims else tokenizer.decode(ids).strip(),
            "new_tokens": len(ids),
            "ended": row in claims,
        }
        for row, ids in enumerate(written)
    ]


def _greedy(model: nn.Module, prompts: list[list[int]], pad: int) -> Iterator[list[int]]:
    """The most likely next token of each prompt, again and again. Prompts are padded on the left;
    no token attends to the padding.

    Not transformers' `generate`: the one of peft for trained prompts and prefixes counts their
    tokens wrongly with its caches. They enter with the first forward and are then in the cache, so
    the model below them continues.
    """
    width, device = max(map(len, prompts)), device_of(model)
    pads = [width - len(prompt) for prompt in prompts]
    rows = [[pad] * count + prompt for count, prompt in zip(pads, prompts, strict=True)]
    ids = torch.tensor(rows, device=device)
    mask = torch.tensor([[0] * count + [1] * (width - count) for count in pads], device=device)
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
    """The text up to the first end of a sentence that something follows; None without one.

    An end is a full stop, question or exclamation mark that no small letter follows, or a new line;
    not the full stop of an initial or of a few abbreviations.
    """
    start = len(text) - len(text.lstrip())
    for end in END.finditer(text, start):
        if not ABBREVIATED.search(text[: end.end()]):
            return text[start : end.end()].strip()
    return None


def judge(
    frame: pd.DataFrame,
    items: Sequence[Item],
    checker: Checker,
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """`frame` of `write_claims(items)` with the judgements of `checker`: `checker`,
    `checker_probability`, `checker_cut`."""
    judged = checker.judge([item.doc for item in items], list(frame["claim"]), progress)
    return frame.assign(
        checker=judged["called"],
        checker_probability=judged["probability"],
        checker_cut=judged["cut"],
    )


def shares(frame: pd.DataFrame) -> list[dict]:
    """One row for each domain, shift, judge and call: `count` of `n` claims, `share`, and its 95 %
    Wilson interval `low`, `high` over documents, which does not hold what another training seed
    would change."""
    rows = []
    for (domain, shift), cell in frame.groupby(["domain", "shift"], sort=False):
        for judge_name in [name for name in JUDGES if name in cell]:
            calls = cell[judge_name].dropna()
            for call in JUDGES[judge_name] if len(calls) else ():
                count = int((calls == call).sum())
                low, high = wilson(count, len(calls))
                rows.append(
                    {
                        "domain": domain,
                        "shift": shift,
                        "judge": judge_name,
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
    """The written claims' part of a run's result."""
    named = ("truncated", "ended", "verbatim", "checker_cut")
    means = {f"{name}_share": float(frame[name].mean()) for name in named if name in frame}
    return {
        "documents": len(frame),
        "new_tokens_mean": float(frame["new_tokens"].mean()),
        **means,
        "shares": shares(frame),
    }
