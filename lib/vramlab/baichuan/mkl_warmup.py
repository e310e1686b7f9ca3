"""Calls each of MKL's vector functions once, in one thread; importing this does it.

MKL chooses a function's kernel when it is first called. Where several threads make that call at
once, one of them may get a kernel of low accuracy for its share: the first `exp` or `cos` of a
process was wrong by up to 2e-4 of its value, in one process of 10 to 30, and so was its first step
(https://github.com/pytorch/pytorch/issues/188792). A tensor of one number is computed by one
thread. Where torch has no MKL this does nothing that counts.
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
