"""Tensors that are cut over ranks: which are, the piece that is here, and where it begins."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor; any other tensor itself."""
    with torch.no_grad():  # else a view that autograd knows of
        return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The row of a sharded tensor that this rank's piece begins with; 0 of any other."""
    if not is_sharded(tensor):
        return 0
    return tensor.device_mesh.get_local_rank() * -(-tensor.shape[0] // tensor.device_mesh.size())


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter's and buffer's bytes, by name: equal for equal weights, to the
    bit. Of shards, this rank's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                local(tensor)
                .detach()
                .cpu()
                .contiguous()
                .flatten()
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
    return digest.hexdigest()
