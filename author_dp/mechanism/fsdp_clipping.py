"""Ghost clipping of a model sharded by FSDP2, and the choice of a model's engine.

An author is on one process, so norms need nothing from other processes. Once they are known, the clipped sums of a few parameters
at a time are formed from the kept factors, reduce-scattered, and freed.

Example:

    >>> shard_model(model, torch.device("cuda"))
    >>> engine = ShardedClipping(model, clip_norm=1.0)
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from author_dp.clipping import ClippingEngine, engine_class
from author_dp.clipping.author_groups import AuthorClipFactors
from author_dp.clipping.factor_store import FactorStore
from author_dp.clipping.fallback import PerAuthorFallback
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import add_clipped_grad_factors
from author_dp.errors import UserError
from author_dp.mechanism.fsdp import FSDP_REMEDY, dummy_batch, is_sharded, local_shard
from author_dp.mechanism.losses import author_losses
from author_dp.types import Batch

BUCKET_ELEMENTS = 2**22  # elements of small parameters that are reduced together: 16 MB

# Its name in torch 2.13, and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class NoFallback(PerAuthorFallback):
    """Refuse parameters that no rule follows: their ordinary gradients would not be sharded."""

    def __init__(self, names: dict[Any, str], params: set[Any]):
        super().__init__(names, set())
        self.is_frozen = True
        if params:
            self.add(None, params)

    def add(self, layer: Any, params: Collection[Any]) -> None:
        name = next(name for parameter, name in self._names.items() if parameter in params)
        remedy = FSDP_REMEDY.capitalize()
        raise UserError(f"--fsdp: no clipping rule follows {name}, whose gradient would not be sharded. {remedy}.")


class ShardedStore(FactorStore):
    """Keep all factors, and reduce-scatter the clipped sums of a few parameters at a time.

    Attributes:
        is_dummy: whether the microbatch is a dummy, whose gradients are left out.
    """

    def __init__(self, model: nn.Module, tied: set[Any]):
        super().__init__(model, tied)
        self.is_dummy = False
        self._buckets = list(make_sharded_buckets([p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor)]))

    def is_joined(self, grads: list[Any]) -> bool:
        return False  # `sum_pass` reduces each parameter

    def sum_pass(self, run_backward: Callable[[bool], None], clip: AuthorClipFactors) -> None:
        if self.is_dummy:
            self.factors.clear()
        for bucket in self._buckets:
            world_size = bucket[0].device_mesh.size()
            totals = []  # of complete parameters, (world_size, elements of a shard), zeros at the end
            for parameter in bucket:
                rows = -(-len(parameter) // world_size) * world_size
                total = torch.zeros(rows, *parameter.shape[1:], device=clip.factors.device)
                for grad in self.factors.pop(parameter, []):
                    add_clipped_grad_factors(grad, total[: len(parameter)], clip)
                totals.append(total.view(world_size, -1))
            sizes = [total.shape[1] for total in totals]
            flat = totals[0] if len(totals) == 1 else torch.cat(totals, 1)
            shards = flat.new_empty(sum(sizes))
            reduce_scatter(shards, flat.view(-1), group=bucket[0].device_mesh.get_group())
            for parameter, summed in zip(bucket, shards.split(sizes)):
                local = local_shard(parameter.summed_grad)
                local.add_(summed[: local.numel()].view_as(local))
        super().sum_pass(run_backward, clip)  # of parameters that are not sharded: the canaries


class ShardedClipping(GhostClipping):
    """Ghost clipping of a model sharded by FSDP2.

    Guarantees: as `GhostClipping`; the sum over the authors of all processes is in the shards of `summed_grad`, a DTensor of the
    parameter's layout. Collective: all processes call `backward` or `dummy_backward` equally often.

    Raises:
        UserError: for a parameter that no rule follows.
    """

    store_class = ShardedStore
    fallback_class = NoFallback
    store: ShardedStore

    def dummy_backward(self) -> None:
        """Take part in the collectives of a microbatch of other processes; add nothing."""
        self.store.is_dummy = True
        try:
            batch = dummy_batch(self.module)
            self.backward(author_losses(self.module, batch), batch["author"])
        finally:
            self.store.is_dummy = False


def make_sharded_buckets(parameters: list[Any]) -> Iterator[list[Any]]:
    """Yield the parameters, small ones together."""
    bucket: list[Any] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def make_engine(model: nn.Module, clipping: str, clip_norm: float, checkpointed: bool) -> ClippingEngine:
    """Return the engine `--clipping clipping` of a model, or the one for sharded models.

    Args:
        checkpointed: whether the model's layers are checkpointed.
    """
    return (ShardedClipping if is_sharded(model.parameters()) else engine_class(clipping, checkpointed))(model, clip_norm)


def backward_on_one_rank(engine: ClippingEngine, batch: Batch, turn: int) -> torch.Tensor:
    """Clip a batch that every process has, and return its norms, (authors,), on every process. Collective for a sharded model.

    Args:
        turn: the rank of the process that clips it, modulo the number of processes; the others run dummies.
    """
    if not isinstance(engine, ShardedClipping):
        return engine.backward(author_losses(engine.module, batch), batch["author"])
    rank, norms = turn % dist.get_world_size(), torch.zeros(batch["num_authors"], device=batch["author"].device)
    if dist.get_rank() == rank:
        norms = engine.backward(author_losses(engine.module, batch), batch["author"])
    else:
        engine.dummy_backward()
    dist.broadcast(norms, src=rank)
    return norms
