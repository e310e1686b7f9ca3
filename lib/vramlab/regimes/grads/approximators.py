"""Modules that guess the gradient of a residual stream from the gradient of its end, see
`predicted`.

Each maps (site, features, end) to d. `read` returns the features that it keeps of the stream for
that. Shapes: end, d (b, t, H), the gradient at the end and the guess at the site; h (b, t, H), the
stream; features (b, t, k) or None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Identity(nn.Module):
    """d = d_L."""

    def __init__(self, sites: int, size: int, rank: int, depth: int):
        super().__init__()

    def read(self, site: int, h: Tensor) -> Tensor | None:
        """What the guess at this site will need of the stream."""
        return None

    def forward(self, site: int, features: Tensor | None, end: Tensor) -> Tensor:
        return end


class Random(Identity):
    """d = R diag(signs_l) d_L, R (H, H) normal with variance 1 / H, and signs of its own for each
    site. So there are as many fixed random matrices as sites, none a rotation of another, in the
    bytes of a single matrix. Never trained."""

    def __init__(self, sites: int, size: int, rank: int, depth: int):
        super().__init__(sites, size, rank, depth)
        self.register_buffer(
            "matrix", torch.empty(size, size).normal_(std=size**-0.5), persistent=False
        )
        self.register_buffer(
            "signs", torch.empty(sites, size).bernoulli_(0.5).mul_(2).sub_(1), persistent=False
        )

    def forward(self, site: int, features: Tensor | None, end: Tensor) -> Tensor:
        return F.linear((end * self.signs[site]).to(self.matrix.dtype), self.matrix)


class LowRank(nn.Module):
    """G of a site: u = D_h LN(h) + D_d d / sigma, k numbers; u <- W silu(u), depth - 1 times; G =
    U u / k, with U = 0 at first. The k is for rules whose steps have the learning rate's length:
    without it the first steps overshoot.
    """

    def __init__(self, size: int, rank: int, depth: int):
        super().__init__()
        self.stream = nn.Linear(size, rank, bias=False)
        self.error = nn.Linear(size, rank)
        self.middle = nn.ModuleList(nn.Linear(rank, rank) for _ in range(depth - 1))
        self.up = nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def read(self, h: Tensor) -> Tensor:
        return self.stream(F.layer_norm(h, h.shape[-1:]).to(self.stream.weight.dtype))

    def forward(self, features: Tensor, error: Tensor) -> Tensor:
        u = features + self.error(error.to(self.error.weight.dtype))
        for layer in self.middle:
            u = layer(F.silu(u))
        return self.up(u) / u.shape[-1]


class Learned(Identity):
    """d = d_L + sigma G_l(LN(h), d_L / sigma)."""

    def __init__(self, sites: int, size: int, rank: int, depth: int):
        super().__init__(sites, size, rank, depth)
        # the last site's gradient is the end's: nothing to guess
        self.approximators = nn.ModuleList(LowRank(size, rank, depth) for _ in range(sites - 1))

    def read(self, site: int, h: Tensor) -> Tensor:
        return self.approximators[site].read(h)

    def forward(self, site: int, features: Tensor, end: Tensor) -> Tensor:
        sigma = _rms(end)
        return torch.add(end, self.approximators[site](features.to(end.dtype), end / sigma) * sigma)

    def loss(self, site: int, h: Tensor, end: Tensor, true: Tensor) -> Tensor:
        """Mean square error of G in units of sigma: h, end, true (n, H) of some tokens -> 0-d."""
        sigma = _rms(end)
        guess = self.approximators[site](self.read(site, h), end / sigma)
        return (guess.float() - ((true - end) / sigma).float()).square().mean()


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt().clamp_min(1e-30).to(x.dtype)


GUESSES = {"learned": Learned, "identity": Identity, "random": Random}
