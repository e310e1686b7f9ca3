"""Calls each of MKL's vector functions once, in one thread, when it is imported.

MKL chooses a function's kernel at the first call. When several threads make that call at once, one
of them may get a kernel of low accuracy for its share: in one process of 10 to 30 the first `exp`
or `cos`, and with it the first step, was wrong by up to 2e-4 of its value
(https://github.com/pytorch/pytorch/issues/188792). A tensor of one number is computed by one
thread. Without MKL these calls have no effect.
"""

import torch

FUNCTIONS = (
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "rsqrt",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
)

for dtype in (torch.float32, torch.float64):
    for name in FUNCTIONS:
        getattr(torch.full((1,), 0.5, dtype=dtype, device="cpu"), name)()
