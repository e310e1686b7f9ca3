"""Rules whose memory is low-rank: Adam's moments are those of a projection of the gradient, not of
the gradient.

For a matrix W (O, I) of a block, with G its gradient and S the length of its shorter side, P is (S,
r), and the shorter side is projected:

    R = P^T G  (r, I)  where O < I,        R = G P  (O, r)  where O >= I

GaLore takes for P the leading singular vectors of the gradient at every `gap`-th update, runs Adam
on R, and goes back: W <- W - lr scale P adam(R). APOLLO takes for P Gaussian numbers, runs Adam on
R only to learn how much it scales each channel (or, in APOLLO-Mini, the whole matrix), and scales
the gradient itself by that:

    W <- W - lr sqrt(scale) limit G diag(s),        s_j = |adam(R)_j| / |R_j|        j along the
                                                    longer side

    limit: the update's norm grows from one update to the next by 1.01 at most (the norm-growth
    limiter)

What is projected: every matrix of the blocks, which are all Linears; W_pack, where Q, K and V are
one, as one matrix of three times the rows. Norms, embeddings and NormHead get plain AdamW, with
moments in the weight's type: together 4 bytes of state for each of their weights in bf16, which at
7B (1.03e9 of them) is more than all the rest. An adapter's matrices are projected too.

The published packages, galore-torch 1.0 and apollo-torch 1.0.3, differ from the papers and from
torch. `follows: package` is

    eps       added to sqrt(v) before v's bias is corrected, which makes it eps / sqrt(1 - beta2^t);
              their default is 1e-6
    decay     of weights, after the update
    moments   in the gradient's type: 2 bytes in bf16
    limit     APOLLO's, on the growth of the update before the moments' biases are corrected; its
              norms get 1e-8 where they divide
    the rest  norms, embeddings and head by the same AdamW, not fused: temporaries of a leaf's size

and differs from them in the numbers that APOLLO draws (another stream, and P is not stored) and in
that a gradient may come in rows.

In bytes: moments in fp32. GaLore's P is in the weight's type, and products with it are formed in
that type, as in the published code; there all state is. APOLLO's P is never stored: it is drawn
again from its seed at each update, which costs its S r numbers as a temporary. GaLore's update adds
a product in place, APOLLO's a few rows at a time, so that neither has a temporary of the matrix's
size; the singular vectors have (see `leading_vectors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..fields import Count, Limit, Range, Seed
from ..grads.keyed_random import normal
from ..until.row_protocol import feed, spans
from .rules import AdamW
from .sliced import LeafContext, TypedStateOptimizer
from .torch_optimizers import TorchAdamW

ROWS_BYTES = 16 << 20
"""Most bytes in fp32 of the rows that APOLLO updates at a time."""


def is_projected(leaf: Tensor, names: Mapping[int, str]) -> bool:
    """Whether a leaf is a matrix of a block: embeddings, head and norms are not. `names` maps its
    id to its name."""
    return leaf.dim() == 2 and re.search(r"\blayers\.\d+\.", names.get(id(leaf), "")) is not None


def _sides(matrix: Tensor, rank: int) -> tuple[int, int, int]:
    """(shorter side, longer side, rank of the projection: at most the shorter side)."""
    short, long = sorted(matrix.shape)
    return short, long, min(rank, short)


def leading_vectors(grad: Tensor, rank: int) -> Tensor:
    """P (S, rank): the leading singular vectors of `grad` (O, I) along its shorter side, in its
    type.

    Formed in fp32 by a full SVD, as published: for that moment the gradient, U (O, S) and V (S, I)
    exist in fp32. The forecast does not have the workspace of the GPU's solver besides, which only
    cuSOLVER knows.
    """
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    # a copy: a slice would keep all singular vectors alive
    return (
        (left[:, :rank] if grad.shape[0] < grad.shape[1] else right[:rank].mT)
        .to(grad.dtype, copy=True)
        .contiguous()
    )


class ProjectedAdamW(TypedStateOptimizer, TorchAdamW):
    """AdamW, except for the matrices, which `rule.update` updates, and except for every leaf where
    the rule follows its package. Their step count is an int, because it decides what runs."""

    def __init__(self, params: list[Tensor], lr: float, rule: LowRank, names: Mapping[int, str]):
        super().__init__(
            params,
            lr=lr,
            betas=(rule.beta1, rule.beta2),
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            fused=True,
        )
        self._rule, self._package, self._names = rule, rule.follows == "package", names
        self._own = [p for p in params if self._package or is_projected(p, names)]

    def __setstate__(self, state) -> None:
        # not AdamW's, which makes tensors of step counts, for old checkpoints
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure=None):
        for leaf in (leaf for leaf in self._own if leaf.grad is not None):
            if is_projected(leaf, self._names):
                state = self.state[leaf]
                state.setdefault("step", 0)
                self._rule.update(self._names[id(leaf)], leaf, leaf.grad, state, self._decay(leaf))
                state["step"] += 1
            else:
                feed(self, leaf, [(0, len(leaf))], lambda *_, leaf=leaf: leaf.grad)
            leaf.grad = None
        # inside backward a leaf has an optimizer to itself
        if len(self._own) < len(self.param_groups[0]["params"]):
            super().step(closure)

    def _decay(self, weight: Tensor) -> float:
        """Shrinks the weight; returns the learning rate of its update. The packages' decay after
        an update is one before it with a lower rate: kept (w - lr u) = kept w - lr kept u."""
        lr = self.param_groups[0]["lr"]
        kept = 1 - lr * self._rule.weight_decay
        if kept != 1:
            weight.mul_(kept)
        return lr * kept if self._package else lr

    def begin_rows(self, leaf: Tensor) -> None:
        if self._package and not self.state[leaf]:
            self.state[leaf].update(
                step=0, exp_avg=torch.zeros_like(leaf), exp_avg_sq=torch.zeros_like(leaf)
            )
        super().begin_rows(leaf)

    @torch.no_grad()
    def rows(self, leaf: Tensor, start: int, stop: int, grad: Tensor, sweep: int) -> None:
        if not self._package:
            return super().rows(leaf, start, stop, grad, sweep)
        weight, state = leaf[start:stop], self.state[leaf]
        moments = {name: state[name][start:stop] for name in ("exp_avg", "exp_avg_sq")}
        direction, correction = self._rule.adam(grad, {"step": state["step"], **moments})
        weight.add_(direction, alpha=-self._decay(weight) * correction)


@dataclass(frozen=True)
class LowRank(AdamW):
    """What GaLore and APOLLO share."""

    row_wise: ClassVar[bool] = False
    pieces: ClassVar[bool] = False
    rank: Count = 128
    """Never more than the matrix's shorter side."""
    gap: Count = 200
    """Updates between two projections."""
    scale: Limit = 1.0
    follows: Literal["paper", "package"] = "paper"
    """Whether to compute as the paper or as the package does where the two differ, see above."""

    def optimizer(
        self, params: list[Tensor], lr: float, context: LeafContext
    ) -> torch.optim.Optimizer:
        return ProjectedAdamW(params, lr, self, context.names)

    def leaf_bytes(self, leaf: Tensor, context: LeafContext) -> int:
        if is_projected(leaf, context.names):
            return self.matrix_bytes(leaf)
        return super().leaf_bytes(leaf, context) - 4 * (self.follows == "package")

    def update(self, name: str, matrix: Tensor, grad: Tensor, state: dict, lr: float) -> None:
        """One update of a projected matrix, in place."""

    def matrix_bytes(self, matrix: Tensor) -> int:
        """Bytes of a projected matrix's state."""
        raise NotImplementedError

    def moments_dtype(self, weight: Tensor) -> torch.dtype:
        return weight.dtype if self.follows == "package" else torch.float32

    def adam(self, grad: Tensor, state: dict) -> tuple[Tensor, float]:
        """(Adam's direction for a gradient in the type of its moments, the factor of the bias
        correction that is still to be multiplied). Makes the moments at the first update."""
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        mean = state["exp_avg"].lerp_(grad, 1 - self.beta1)
        square = state["exp_avg_sq"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        bias1, bias2 = (1 - beta ** (state["step"] + 1) for beta in (self.beta1, self.beta2))
        if self.follows == "package":
            return mean / square.sqrt().add_(self.eps), bias2**0.5 / bias1
        return mean / square.div(bias2).sqrt_().add_(self.eps).mul_(bias1), 1.0


@dataclass(frozen=True)
class GaLore(LowRank):
    """Adam in the span of the gradient's leading singular vectors. Zhao 2024, arXiv:2403.03507.

    State for each matrix: 2 x 4 bytes a number of R, and P in the weight's type. Moments are kept
    when P changes, as published. Every `gap`-th update stalls for the SVDs. In bf16 an update below
    2^-9 of a weight is lost, as published. `follows: package` is galore-torch 1.0, see above.
    """

    scale: Limit = 0.25
    inner: Literal["adamw", "sgd"] = "adamw"
    """The rule of the projected gradient: "sgd" remembers nothing."""

    def update(self, name: str, matrix: Tensor, grad: Tensor, state: dict, lr: float) -> None:
        if state["step"] % self.gap == 0:
            state.pop("projection", None)
            state["projection"] = leading_vectors(grad, _sides(grad, self.rank)[2])
        basis = state["projection"]
        across = grad.shape[0] < grad.shape[1]
        low = (basis.mT @ grad if across else grad @ basis).to(self.moments_dtype(grad))
        direction, correction = self.adam(low, state) if self.inner == "adamw" else (low, 1.0)
        low = direction.to(matrix.dtype)
        del direction
        factors = (basis, low) if across else (low, basis.mT)
        torch.addmm(matrix, *factors, alpha=-lr * self.scale * correction, out=matrix)

    def matrix_bytes(self, matrix: Tensor) -> int:
        short, long, rank = _sides(matrix, self.rank)
        moments = 2 * self.moments_dtype(matrix).itemsize * long if self.inner == "adamw" else 0
        return rank * (short * matrix.element_size() + moments)


@dataclass(frozen=True)
class Apollo(LowRank):
    """The gradient, each channel scaled as Adam scales its random projection. Zhu 2024,
    arXiv:2412.05270, written from the paper.

    State for each matrix: 2 x 4 bytes a number of R, and 4 for the last update's norm.
    `per_tensor`, with rank 1 and scale 128, is APOLLO-Mini: one factor for the whole matrix.
    Numbers are drawn on the device: another kind of device draws others. `growth` bounds the update
    that is made; with `follows: package`, which is apollo-torch 1.0.3, that before bias correction.
    """

    rank: Count = 256
    per_tensor: bool = False
    growth: Annotated[float, Range(1, 1000)] = 1.01
    """Most that the norm of a matrix's update grows from one update to the next."""
    seed: Seed = 0

    def update(self, name: str, matrix: Tensor, grad: Tensor, state: dict, lr: float) -> None:
        short, long, rank = _sides(grad, self.rank)
        dim = 0 if grad.shape[0] < grad.shape[1] else 1  # the shorter side; channels lie along it
        drawn = normal((short, rank), grad.device, self.seed, name, state["step"] // self.gap)
        drawn = drawn.div_(rank**0.5).to(grad.dtype)
        low = (drawn.mT @ grad if dim == 0 else grad @ drawn).to(self.moments_dtype(grad))
        del drawn
        direction, correction = self.adam(low, state)
        least = 1e-8 if self.follows == "package" else 0.0
        over = (0, 1) if self.per_tensor else dim
        factor = torch.linalg.vector_norm(direction, dim=over, keepdim=True)
        del direction
        # a channel without gradient has no direction to scale: 0 / 0 becomes 0
        factor = (
            factor / torch.linalg.vector_norm(low, dim=over, keepdim=True).add_(least)
        ).nan_to_num_(0.0, 0.0)
        factor = factor.mul_(self.scale**0.5).expand(*((1, long) if dim == 0 else (long, 1)))
        channels = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=low.dtype)
        factor = factor * self._limit(
            torch.linalg.vector_norm(factor * channels), least * self.scale**0.5, state
        )
        for start, stop in spans(matrix.shape[0], ROWS_BYTES // (4 * matrix.shape[1])):
            rows = slice(start, stop)
            matrix[rows].addcmul_(
                grad[rows], factor if dim == 0 else factor[rows], value=-lr * correction
            )

    def _limit(self, norm: Tensor, least: float, state: dict) -> Tensor:
        """The factor that bounds the growth of an update of norm `norm` (0-d). Remembers the norm
        that the update then has, and does not wait for the device."""
        limit = torch.ones_like(norm)
        if state["step"]:
            most = self.growth * (state["norm"] + least if least else state["norm"])
            limit = torch.where((norm > most) & (most > 0), most / norm, limit)
        state["norm"] = norm * limit
        return limit

    def matrix_bytes(self, matrix: Tensor) -> int:
        _, long, rank = _sides(matrix, self.rank)
        return self.moments_dtype(matrix).itemsize * (2 * rank * long + 1)
