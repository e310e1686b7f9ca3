"""Tensors that are sharded over ranks: this rank's piece of one, and where it begins."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor; any other tensor itself."""
    with torch.no_grad():  # else autograd would track a view
        return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The first row of this rank's piece of a sharded tensor; 0 for any other tensor."""
    if not is_sharded(tensor):
        return 0
    return tensor.device_mesh.get_local_rank() * -(-tensor.shape[0] // tensor.device_mesh.size())


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of all parameters and buffers: equal if and only if all bits
    are. Of a sharded tensor, this rank's piece."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            numbers = local(tensor).detach().cpu().contiguous().flatten()
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
