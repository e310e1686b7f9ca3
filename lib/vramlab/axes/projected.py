"""Rules whose memory is low-rank: Adam's moments are those of a projection of the gradient, not of the gradient.

For a matrix W (O, I) of a block, with G its gradient and S the length of its shorter side, P is (S, r) and

    R = P^T G  (r, I)  where O < I,        R = G P  (O, r)  where O >= I        the shorter side is what is projected

GaLore takes for P the leading singular vectors of the gradient at every `gap`-th update, runs Adam on R, and goes back:
W <- W - lr scale P adam(R). APOLLO takes for P Gaussian numbers, runs Adam on R only to learn how much it scales each channel
(or, in APOLLO-Mini, the whole matrix), and scales the gradient itself by that:

    W <- W - lr sqrt(scale) limit G diag(s),        s_j = |adam(R)_j| / |R_j|        j along the longer side

    limit: the update's norm grows from one update to the next by 1.01 at most (the norm-growth limiter)

What is projected: every matrix of the blocks, which are all Linears; W_pack, where Q, K and V are one, as one matrix of three
times the rows. Norms, embeddings and NormHead get plain AdamW, with moments in the weight's type: together 4 bytes of state
for each of their weights in bf16, which at 7B (1.03e9 of them) is more than all the rest. An adapter's matrices are projected too.

In bytes: moments in fp32. GaLore's P is in the weight's type, and products with it are formed in that type, as in the
published code; there all state is. APOLLO's P is never stored: it is drawn again from its seed at each update, which costs
its S r numbers as a temporary. GaLore's update adds a product in place, APOLLO's a few rows at a time, so that neither has a
temporary of the matrix's size; the singular vectors have (see `leading`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from .fields import Count, Limit, Range, Seed
from .noise import generator, normal
from .rows import spans
from .rowwise import Fit, restore_types
from .rule import AdamW, _AdamW

ROWS_BYTES = 16 << 20
"""Most bytes in fp32 of the rows that APOLLO updates at a time."""


def is_projected(leaf: Tensor, names: Mapping[int, str]) -> bool:
    """Whether a leaf is a matrix of a block: embeddings, head and norms are not. `names` maps its id to its name."""
    return leaf.dim() == 2 and re.search(r"\blayers\.\d+\.", names.get(id(leaf), "")) is not None


def _sides(matrix: Tensor, rank: int) -> tuple[int, int, int]:
    """(shorter side, longer side, rank of the projection, which no shorter side can exceed)."""
    short, long = sorted(matrix.shape)
    return short, long, min(rank, short)


def leading(grad: Tensor, rank: int) -> Tensor:
    """P (S, rank): the leading singular vectors of `grad` (O, I) along its shorter side, in its type.

    Formed in fp32 by a full SVD, as published: for that moment the gradient, U (O, S) and V (S, I) exist in fp32. What the
    GPU's solver takes for itself besides is known to nobody but cuSOLVER; the forecast does not have it.
    """
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    # a copy: a slice would keep all singular vectors alive
    return (left[:, :rank] if grad.shape[0] < grad.shape[1] else right[:rank].mT).to(grad.dtype, copy=True).contiguous()


class _Projected(_AdamW):
    """AdamW, except for the matrices, which `rule.update` updates. Their step count is an int: it decides what runs."""

    def __init__(self, params: list[Tensor], lr: float, rule: LowRank, names: Mapping[int, str]):
        super().__init__(params, lr=lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay, fused=True)
        self._rule, self._matrices = rule, {p: names[id(p)] for p in params if is_projected(p, names)}
        self._others = len(self._matrices) < len(params)

    def __setstate__(self, state) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's makes tensors of step counts, for checkpoints of old

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        restore_types(self, state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        lr = self.param_groups[0]["lr"]
        for matrix, name in self._matrices.items():
            if matrix.grad is not None:
                state = self.state[matrix]
                state.setdefault("step", 0)
                if self._rule.weight_decay:
                    matrix.mul_(1 - lr * self._rule.weight_decay)
                self._rule.update(name, matrix, matrix.grad, state, lr)
                state["step"] += 1
                matrix.grad = None
        return super().step(closure) if self._others else None  # inside backward a leaf has an optimizer to itself


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

    def optimizer(self, params: list[Tensor], lr: float, fit: Fit) -> torch.optim.Optimizer:
        return _Projected(params, lr, self, fit.names)

    def leaf_bytes(self, leaf: Tensor, fit: Fit) -> int:
        return self._matrix_bytes(leaf) if is_projected(leaf, fit.names) else super().leaf_bytes(leaf, fit)

    def _adam(self, low: Tensor, state: dict) -> Tensor:
        """Adam's direction for the projected gradient, which is fp32; the moments are made at the first update."""
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        count = state["step"] + 1
        mean = state["exp_avg"].lerp_(low, 1 - self.beta1)
        square = state["exp_avg_sq"].mul_(self.beta2).addcmul_(low, low, value=1 - self.beta2)
        return mean / square.div(1 - self.beta2**count).sqrt_().add_(self.eps).mul_(1 - self.beta1**count)


@dataclass(frozen=True)
class GaLore(LowRank):
    """Adam in the span of the gradient's leading singular vectors. State for each matrix: 2 x 4 bytes a number of R, and P in the
    weight's type. Zhao 2024, arXiv:2403.03507. Moments are kept when P changes, as published. Every `gap`-th update stalls for
    the SVDs. In bf16 an update below 2^-9 of a weight is lost, as published."""

    scale: Limit = 0.25
    inner: Literal["adamw", "sgd"] = "adamw"
    """What runs on the projected gradient: "sgd" remembers nothing."""

    def update(self, name: str, matrix: Tensor, grad: Tensor, state: dict, lr: float) -> None:
        if state["step"] % self.gap == 0:
            state.pop("projection", None)
            state["projection"] = leading(grad, _sides(grad, self.rank)[2])
        basis = state["projection"]
        across = grad.shape[0] < grad.shape[1]
        low = (basis.mT @ grad if across else grad @ basis).float()
        low = (self._adam(low, state) if self.inner == "adamw" else low).to(matrix.dtype)
        torch.addmm(matrix, *((basis, low) if across else (low, basis.mT)), alpha=-lr * self.scale, out=matrix)

    def _matrix_bytes(self, matrix: Tensor) -> int:
        short, long, rank = _sides(matrix, self.rank)
        return rank * (short * matrix.element_size() + (2 * 4 * long if self.inner == "adamw" else 0))


@dataclass(frozen=True)
class Apollo(LowRank):
    """The gradient, each channel scaled as Adam scales its random projection. State for each matrix: 2 x 4 bytes a number of R,
    and 4 for the last update's norm. Zhu 2024, arXiv:2412.05270, written from the paper. `per_tensor`, with rank 1 and scale
    128, is APOLLO-Mini: one factor for the whole matrix. Numbers are drawn on the device: another kind of device draws others."""

    rank: Count = 256
    per_tensor: bool = False
    growth: Annotated[float, Range(1, 1000)] = 1.01
    """Most that the norm of a matrix's update grows from one update to the next."""
    seed: Seed = 0

    def update(self, name: str, matrix: Tensor, grad: Tensor, state: dict, lr: float) -> None:
        short, long, rank = _sides(grad, self.rank)
        dim = 0 if grad.shape[0] < grad.shape[1] else 1  # of the shorter side; channels are what lies along the other
        stream = generator(grad.device, self.seed, name, state["step"] // self.gap)
        drawn = normal((short, rank), stream).div_(rank**0.5).to(grad.dtype)
        low = (drawn.mT @ grad if dim == 0 else grad @ drawn).float()
        del drawn
        over = (0, 1) if self.per_tensor else dim
        # a channel without gradient has no direction to scale: 0 / 0 becomes 0
        factor = (torch.linalg.vector_norm(self._adam(low, state), dim=over, keepdim=True)
                  / torch.linalg.vector_norm(low, dim=over, keepdim=True)).nan_to_num_(0.0, 0.0)
        factor = factor.mul_(self.scale**0.5).expand(*((1, long) if dim == 0 else (long, 1)))
        channels = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=torch.float32)
        factor = factor * self._limit(torch.linalg.vector_norm(factor * channels), state)
        for rows in _row_slices(matrix):
            matrix[rows].addcmul_(grad[rows], factor if dim == 0 else factor[rows], value=-lr)

    def _limit(self, norm: Tensor, state: dict) -> Tensor:
        """What the update, of norm `norm` (0-d), has to be multiplied by; remembers the norm it has then. Without a look at it."""
        limit = torch.ones_like(norm)
        if state["step"]:
            most = self.growth * state["norm"]
            limit = torch.where((norm > most) & (most > 0), most / norm, limit)
        state["norm"] = norm * limit
        return limit

    def _matrix_bytes(self, matrix: Tensor) -> int:
        _, long, rank = _sides(matrix, self.rank)
        return 2 * 4 * rank * long + 4


def _row_slices(matrix: Tensor) -> Iterator[slice]:
    return (slice(*span) for span in spans(matrix.shape[0], ROWS_BYTES // (4 * matrix.shape[1])))
