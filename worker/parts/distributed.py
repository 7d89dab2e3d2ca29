"""Several processes as one: on a single process every function here is the identity.

Each process holds an equal part of every batch. The loss of a run is the mean of the losses of its processes, which is
what DistributedDataParallel's averaging of gradients is the gradient of; so a term that looks at the whole batch passes
through `all_gather`, whose backward sums what every process has to say about a row.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

Anything = TypeVar("Anything")
# The first process watches over the others and ends a run that lost one, so nothing has to time out on its own.
PATIENCE = timedelta(days=7)

_alone = False
_host: dist.ProcessGroup | None = None  # for numbers of the host, beside the gradients' group


def world_size() -> int:
    """Count the processes that train together."""
    return 1 if _alone or not dist.is_available() or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def lane() -> tuple[int, ...]:
    """Give what tells the random numbers of this process from those of others: nothing where there are none."""
    return (rank(),) if world_size() > 1 else ()


@contextmanager
def joined(store: Path, number: int, count: int, device: str) -> Iterator[None]:
    """Be process `number` of `count` for a while; they find each other through a file, on this host alone.

    After an error inside, the group is given up and not destroyed: destroying waits for what was begun in it, which on
    GPUs takes every process, and the others may be gone or know nothing of the error.
    """
    global _host
    if Path("/sys/class/net/lo").exists():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.FileStore(str(store), count), rank=number, world_size=count,
        timeout=PATIENCE, device_id=torch.device("cuda", number) if device == "cuda" else None,
    )  # fmt: skip
    try:
        _host = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        yield
    except BaseException:
        distributed_c10d._abort_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        _host = None


@contextmanager
def alone() -> Iterator[None]:
    """Compute without the others for a while, as in an evaluation of which every process does another part."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004 (autograd's argument)
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return mean(gradients[0])  # through itself, because a penalty on gradients (R1) has a gradient too


def all_gather(tensor: Tensor) -> Tensor:
    """Join `tensor` [batch, …] of all processes to [world_size * batch, …], in order of rank; gradients flow back."""
    return tensor if world_size() == 1 else cast(Tensor, _Gather.apply(tensor.contiguous()))


def mean(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes; gradients flow back."""
    return tensor if world_size() == 1 else cast(Tensor, _Mean.apply(tensor))


def from_first(value: Anything) -> Anything:
    """Give all processes what the first one has: anything small that can be pickled, through the host's memory."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, group=_host)
    return held[0]


def gather_objects(value: Anything) -> list[Anything]:
    """Give all processes what each has, in order of rank."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value, group=_host)
    return held


def interleave(batches: Sequence[Tensor], size: int, rows: int) -> Tensor:
    """Join what was made of batches 0, world_size, … by process 0, of batches 1, … by process 1 and so on.

    Args:
        batches: each [size, …], but for the very last of all; at least one in every process.
        rows: of all batches together.
    """
    world = world_size()
    if world == 1:
        return torch.cat(list(batches))
    turns = -(-rows // (size * world))
    own = batches[0].new_zeros(turns, size, *batches[0].shape[1:])
    for turn, batch in enumerate(batches):
        own[turn, : len(batch)] = batch
    return all_gather(own).unflatten(0, (world, turns)).transpose(0, 1).flatten(0, 2)[:rows]


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give all processes the first one's weights and buffers."""
    if world_size() > 1:
        for value in (*module.parameters(), *module.buffers()):
            held = value.contiguous()
            dist.broadcast(held, src=0)
            value.copy_(held)


class _Callable(nn.Module):
    """What DistributedDataParallel wraps: the objective or, without a batch, a touch of every trainable parameter."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *given: Any) -> Any:
        if given:
            return self.objective(*given)
        return torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()


def parallel(module: nn.Module, *, idle_parameters: bool = False) -> nn.Module:
    """Wrap an objective so that its gradients are averaged over all processes.

    Args:
        idle_parameters: whether some trainable parameters get no gradient in some steps.
    """
    if world_size() == 1:
        return module
    # Said once in a run at the first step that leaves no parameter idle, which is as it should be.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    made = DistributedDataParallel(_Callable(module), find_unused_parameters=idle_parameters)
    if not idle_parameters:
        # Gradients are summed in buckets, which are laid out anew after the first backward pass; with three processes
        # or more the order of summing follows the layout. One pass before the first step gives every attempt the same.
        made().backward()
        for parameter in module.parameters():
            parameter.grad = None
    return made


def without_averaging(module: nn.Module, *, when: bool) -> AbstractContextManager[object]:
    """Let gradients add up in each process by itself: for every micro-batch of a step but the last."""
    return module.no_sync() if when and isinstance(module, DistributedDataParallel) else nullcontext()


class _SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes; torch's own knows GPUs only, and its gradient has none."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        over, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        wide = input.float()
        centre = mean(wide.mean(over))
        centred = wide - centre.view(shape)
        variance = mean(centred.square().mean(over))
        if self.track_running_stats:
            self._track(centre.detach(), variance.detach(), world_size() * input.numel() // input.shape[1])
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _track(self, centre: Tensor, variance: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(centre, share)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


def synchronise_norms(module: nn.Module, device: str) -> None:
    """Let every batch norm see the whole batch. In place, because an objective may hold its layers twice."""
    if world_size() == 1:
        return
    # torch's own keeps less for the backward pass. Opponents may be held apart by a penalty on gradients.
    wanted = nn.SyncBatchNorm if device == "cuda" and not hasattr(module, "opponents") else _SynchronisedBatchNorm
    for each in module.modules():
        if isinstance(each, _BatchNorm) and not isinstance(each, nn.SyncBatchNorm | _SynchronisedBatchNorm):
            norm = cast(Any, each)
            norm.apart, norm.process_group, norm.__class__ = norm.__class__, None, wanted


def separate_norms(module: nn.Module) -> None:
    """Undo `synchronise_norms`."""
    for each in module.modules():
        if isinstance(each, nn.SyncBatchNorm | _SynchronisedBatchNorm) and hasattr(each, "apart"):
            norm = cast(Any, each)
            norm.__class__ = norm.apart
