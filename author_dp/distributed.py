"""Share values between the processes of a run; without torch.distributed, act as the only process.

Guarantees: a collective function returns the same result on all processes, if all call it in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def broadcast(value: Any) -> Any:
    """Return rank 0's value, of any type that can be pickled, on every process. Collective."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, of any type that can be pickled, on every process. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the processes, in place, and return it. Collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes, in one buffer; a missing gradient counts as zeros. Collective."""
    if not dist.is_initialized():
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)


def rank_and_world_size() -> tuple[int, int]:
    """Return this process' rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    """Return whether this process has rank 0."""
    return rank_and_world_size()[0] == 0


def barrier() -> None:
    """Wait until all processes call this. Collective."""
    if dist.is_initialized():
        dist.barrier()
