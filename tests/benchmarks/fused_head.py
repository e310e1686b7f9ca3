"""The fused head against the plain one: forward and backward of the loss, fp32, on one CPU thread,
taking turns in one run.

Times are the best of several turns: what disturbs a turn only makes it longer. A gradient taken in
rows forms the products once more than the plain head does, which is the price of never being whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vramlab.baichuan.head import NormHead
from vramlab.regimes.head.head import FusedLoss
from vramlab.regimes.rule.rules import Sgd

KINDS = ("frozen", "trained", "taken in rows")
TOKENS, HIDDEN, VOCABULARY = 512, 1024, 16_000


def _step(kind: str, fused: bool) -> Callable[[], None]:
    """A loss and its backward, and with `taken in rows` the SGD update, which a plain head makes
    from the whole gradient."""
    torch.manual_seed(0)
    head = NormHead(HIDDEN, VOCABULARY).requires_grad_(kind != "frozen")
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    labels, optimizer = (
        torch.randint(0, VOCABULARY, (1, TOKENS)),
        Sgd().bind().make([head.weight], 1e-6),
    )
    if fused:
        head.fused = FusedLoss()
        head.fused.trains(None, 0, optimizer if kind == "taken in rows" else None)

    def step() -> None:
        head(hidden, labels)[0].backward()
        if kind == "taken in rows" and not fused:
            optimizer.step()
        hidden.grad = head.weight.grad = None

    return step


def head_rows(turns: int = 5) -> list[dict]:
    """One row a kind: seconds of both, and how many times faster the fused head is."""
    rows = []
    for kind in KINDS:
        steps, best = [_step(kind, fused) for fused in (False, True)], [float("inf")] * 2
        for _ in range(turns):
            for index, step in enumerate(steps):
                began = time.process_time()
                step()
                best[index] = min(best[index], time.process_time() - began)
        rows.append(
            {
                "head": f"{kind}, {TOKENS} x {HIDDEN} x {VOCABULARY}",
                "plain_s": round(best[0], 3),
                "fused_s": round(best[1], 3),
                "ratio": round(best[0] / best[1], 2),
            }
        )
    return rows
