"""What each side holds of a model that is cut between two machines, read from the timeline of
a process that ran both sides.

SplitLoRA, Lin 2024, arXiv:2407.00952: the client has the embeddings and the blocks below the cut,
the server has the rest. Each event of the timeline belongs to the side of the module that made it;
what no module made (loss, masks, angles) belongs to the server. What crosses is held at both ends:
the receiver's copy is added to its peak as if it were always there, so each peak is an upper bound.
Not included: kernels' workspaces, of which each machine has its own. Cutting saves nothing in sum:
one device that runs both sides holds less than the two together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

from .events import signed

_CLIENTS_OWN = re.compile(r"(^|\.)(embed_tokens|input_ids|attention_mask)(\.|$)")
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def side(module: str, cut: int) -> str:
    """ "client" or "server", by the name of a module, a parameter or an input."""
    block = _BLOCK.search(module)
    return "client" if (int(block[1]) < cut if block else _CLIENTS_OWN.search(module)) else "server"


def sides(
    frame: pd.DataFrame, step: int, cut: int, crossed: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """side -> {peak_bytes: the side's own and what it receives, weights_bytes, sends_bytes} of a
    step of a timeline as `Meter.frame` gives it. `crossed`: up_bytes and down_bytes of that
    step."""
    rows = frame[~frame["category"].isin(["host", "workspace"]) & (frame["step"] <= step)]
    changes = pd.Series(signed(rows), rows.index)
    owners = rows["module"].map({name: side(name, cut) for name in rows["module"].unique()})
    sent = {"client": crossed["up_bytes"], "server": crossed["down_bytes"]}
    received = {"client": sent["server"], "server": sent["client"]}
    result = {}
    for name in sent:
        own = changes.where(owners == name, 0)
        result[name] = {
            "peak_bytes": int(own.cumsum()[rows["step"] == step].max()) + received[name],
            "weights_bytes": int(own[rows["category"] == "weights"].sum()),
            "sends_bytes": sent[name],
        }
    return result
