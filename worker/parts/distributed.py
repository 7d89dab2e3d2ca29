"""Several processes as one: on a single process every function here is the identity."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as _all_gather


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(tensor: Tensor) -> Tensor:
    """Join `tensor` [batch, …] of all processes to [world_size * batch, …], in order of rank; gradients flow back."""
    if world_size() == 1:
        return tensor
    import torch

    return torch.cat(_all_gather(tensor), dim=0)
