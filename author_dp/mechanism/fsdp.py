"""Shares: each of W processes holds 1/W of the weights, clipped sums, noise and optimizer state, and of nothing twice.

Promise: a step is that of mechanism.py. Every coordinate of the released sum has exactly one owner, where the clipped sums of all
processes meet, and who draws its noise, N(0, sigma^2 C^2), from keys of its own: none is noised twice, and none goes without.

How: torch's FSDP2 [1, 2] cuts each parameter along its first dimension and gathers a block of the model when it runs, forward and
backward. It is told nothing of gradients: book-keeping asks autograd for the outputs of layers only, so no ordinary gradient of a
weight is ever computed or reduced. An author is on one process, so norms need nothing of others. Once they are known, the clipped
sum of a few parameters at a time is formed from the inputs and output gradients that were kept, reduce-scattered, and let go.

Every process must take part in every gather: who has fewer microbatches runs dummy ones, of which nothing counts.

Example:

    >>> shard(model, torch.device("cuda"))
    >>> engine = ShardedClipping(model, clip_norm=1.0)

References:
    [1] Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054, section 5
    [2] Zhao et al. 2023, PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, arXiv 2304.11277
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from author_dp.clipping import ClippingEngine, engine_class
from author_dp.clipping.author_groups import ClipFactors
from author_dp.clipping.factor_store import FactorStore
from author_dp.clipping.fallback import PerAuthorFallback
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import add_clipped
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses, needs_position_ids
from author_dp.mechanism.optimizer import PROBE_SIZE, AuthorDPOptimizer
from author_dp.types import Batch

BUCKET_ELEMENTS = 2**22  # elements of small parameters that are reduced together: 16 MB
FSDP_REMEDY = "leave out --fsdp"

# Names of torch 2.13, and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- weights ----------------------------------------------------------------------------------------------


def shard(model: Any, device: torch.device) -> None:
    """Cut the parameters into shares, in place; the whole of one block is on the device at a time. Collective.

    Args:
        model: a transformers or peft model, in float32, the same on all processes; frozen parameters are cut, too.
        device: of this process, where its share is to lie.
    Raises:
        UserError: for a model whose blocks cannot be told apart.
    """
    needs_position_ids(model)  # found by calls of the plain model, and remembered
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*blocks(root), *untied_embeddings(root), root]:
        # The root too, which FSDP2 would keep whole after a forward: evaluation would leave it so, and see old weights.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def blocks(root: Any) -> list[nn.Module]:
    """Return what is gathered at a time: the blocks that transformers names, the outer ones of nested ones."""
    kinds = set(getattr(root, "_no_split_modules", None) or ())
    found = {name: module for name, module in root.named_modules() if type(module).__name__ in kinds}
    found = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    seen = [parameter for block in found.values() for parameter in block.parameters()]
    if not found or len(set(seen)) < len(seen):
        raise UserError(f"--fsdp: the blocks of this model cannot be told apart, or share weights; {FSDP_REMEDY}")
    return list(found.values())


def untied_embeddings(root: Any) -> list[nn.Module]:
    """Return the embedding, where it need not be gathered for as long as the rest of the root; tied to a head it must."""
    words = root.get_input_embeddings()
    uses = sum(parameter is words.weight for _, parameter in root.named_parameters(remove_duplicate=False))
    return [words] if uses == 1 else []


def is_sharded(parameters: Iterable[Any]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process' share of a tensor, in its own memory; the tensor itself where it is in no shares."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(tensor: torch.Tensor) -> float:
    """Return the L2 norm of the whole tensor. Collective for one in shares."""
    square = local_shard(tensor).square().sum(dtype=torch.float64)
    if isinstance(tensor, DTensor):
        dist.all_reduce(square)
    return float(square) ** 0.5


def is_finite(parameter: Any) -> bool:
    """Whether every number of a parameter is finite; the same on all processes, of one in shares. Collective then."""
    share = local_shard(parameter)
    finite = torch.stack(torch.aminmax(share)).isfinite().all() if share.numel() else torch.ones((), dtype=torch.bool)
    if isinstance(parameter, DTensor):
        dist.all_reduce(finite := finite.to(parameter.device, torch.int32), op=dist.ReduceOp.MIN)
    return bool(finite)


def autograd_gradients(loss: torch.Tensor, parameters: list[Any]) -> list[Optional[torch.Tensor]]:
    """Return the gradients of a loss by ordinary autograd: in shares by FSDP2's own, of a loss that all processes have alike."""
    if not is_sharded(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    loss.backward()  # their mean over the processes
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


# --- as many forwards and backwards on every process ------------------------------------------------------


def missing_rounds(model: nn.Module, rounds: int) -> int:
    """Return by how many rounds this process has fewer than the one that has most; 0 for a model in no shares. Collective."""
    if not is_sharded(model.parameters()):
        return 0
    most = torch.tensor(rounds, device=next(model.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) - rounds


def dummy_batch(model: nn.Module) -> Batch:
    """Return an author of two tokens, who is nobody."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids, "author": ids[:, 0], "num_authors": 1}


def dummy_forwards(model: nn.Module, rounds: int) -> None:
    """Take part in the gathers of so many forwards of the others."""
    with torch.no_grad():
        for _ in range(rounds):
            author_losses(model, dummy_batch(model), False)


# --- clipping ---------------------------------------------------------------------------------------------


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
        self._buckets = list(buckets([p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor)]))

    def sum_pass(self, run_backward: Callable[[bool], None], clip: ClipFactors) -> None:
        if self.is_dummy:
            self.factors.clear()
        for bucket in self._buckets:
            world_size = bucket[0].device_mesh.size()
            totals = []  # of complete parameters, (world_size, elements of a shard), zeros at the end
            for parameter in bucket:
                rows = -(-len(parameter) // world_size) * world_size
                total = torch.zeros(rows, *parameter.shape[1:], device=clip.factors.device)
                for grad in self.factors.pop(parameter, []):
                    add_clipped(grad, total[: len(parameter)], clip)
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
            self.backward(author_losses(self.module, batch, False), batch["author"])
        finally:
            self.store.is_dummy = False


def buckets(parameters: list[Any]) -> Iterator[list[Any]]:
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
    """Return the norms of a batch, (authors,), that every process has: of a model in shares, one takes it, the others idle."""
    if not isinstance(engine, ShardedClipping):
        return engine.backward(author_losses(engine.module, batch), batch["author"])
    who, norms = turn % dist.get_world_size(), torch.zeros(batch["num_authors"], device=batch["author"].device)
    if dist.get_rank() == who:
        norms = engine.backward(author_losses(engine.module, batch), batch["author"])
    else:
        engine.dummy_backward()
    dist.broadcast(norms, src=who)
    return norms


# --- noise and update -------------------------------------------------------------------------------------


class ShardedOptimizer(AuthorDPOptimizer):
    """AuthorDPOptimizer for parameters in shares.

    Guarantee: as AuthorDPOptimizer's. `sums` holds this process' shares of the clipped sums, which are those of the whole draw
    already, and behind them its share of the pad and the canaries, so that the run's check of itself sees the noise of every
    process. A step is:
    1) `before_release` is called, which records the step in the ledger (on the first process)
    2) the canaries' sums of all processes are added up: none can go on before all have done 1)
    3) noise of the full variance is added to this process' shares, and they are divided by the constant B
    4) `after_release` is given what was released in the whole pad, and the wrapped optimizer updates this process' shares
    """

    def allocate_buffer(self, canaries: Any) -> None:
        device, world_size, rank = self.params[0].device, self.world_size, dist.get_rank()
        tables = [] if canaries is None else [canaries.table.weight]
        each = -(-(PROBE_SIZE + sum(table.numel() for table in tables)) // world_size)
        shares = [local_shard(parameter) for parameter in self.params]
        sizes = [*(share.numel() for share in shares), each]
        self.grad_buffer = torch.zeros(sum(sizes), device=device)
        *views, self._own_pad = self.grad_buffer.split(sizes)
        for parameter, share, view in zip(self.params, shares, views):
            parameter.summed_grad = as_dtensor(parameter, view.view_as(share))
        self._behind = torch.zeros(each * world_size, device=device)  # the clipped sums of pad and canaries, of this process
        self._place = slice(each * rank, each * (rank + 1))
        self.pad = torch.zeros_like(self._behind)
        for table in tables:
            table.summed_grad = self._behind[PROBE_SIZE : PROBE_SIZE + table.numel()].view_as(table)
        self._released = PROBE_SIZE + sum(table.numel() for table in tables)

    def noise_slice(self) -> torch.Tensor:
        """All that this process holds is its own."""
        return self.grad_buffer

    def pre_step(self, closure: Optional[Callable] = None) -> bool:
        self.check_sums()
        self.before_release()
        self._used = True
        dist.all_reduce(self._behind)
        self._own_pad.add_(self._behind[self._place])
        std = self.noise_multiplier * self.max_grad_norm
        if self.bands is not None:
            self.bands.add_(self._slice, self.noise, std)
            std = 0.0
        for part in self.grad_buffer.split(self.noise.elements):
            if std > 0:
                self.noise.add_(part, std)
            part.div_(self.expected_batch_size)
        all_gather(self.pad, self._own_pad.contiguous())
        if self.after_release is not None:
            self.after_release(self.pad[: self._released])
        self.set_gradients()
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._behind.zero_()

    def full_optim_state(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state as that of a run without shares; on the first process only. Collective."""
        state, first = self.original_optimizer.state_dict(), dist.get_rank() == 0
        whole: dict[int, dict[str, Any]] = {}
        for number, values in state["state"].items():
            found = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in values.items()}
            if first:
                whole[number] = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in found.items()}
        return {**state, "state": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process' shares of a whole state, whatever the number of processes that saved it."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        shares = {
            number: {name: shard_like(parameters[number], v) for name, v in values.items()}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": shares})


def as_dtensor(parameter: Any, share: torch.Tensor) -> DTensor:
    """Return the tensor of the parameter's layout of which `share` is this process', in the same memory."""
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def shard_like(parameter: Any, value: Any) -> Any:
    """Return a value of the parameter's shape in its layout, anything else as it is; each process has the whole of it."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# --- checkpoints ------------------------------------------------------------------------------------------


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as `save_pretrained` takes them, on the first process and its CPU; empty elsewhere. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(model, PeftModel))
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def load_weights(model: Any, folder: Path) -> None:
    """Take this process' shares of the weights that `save_pretrained` has written to `folder`, one tensor at a time."""
    places = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    found = set()
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if name not in places:
                        raise UserError(f"--resume_from_checkpoint {folder}: it holds {name}, which this model lacks")
                    places[name].copy_(shard_like(places[name], file.get_tensor(name)))
                    found.add(local_shard(places[name]).data_ptr())
    missing = [
        name for name, place in places.items() if local_shard(place).numel() and local_shard(place).data_ptr() not in found
    ]
    if missing:
        raise UserError(f"--resume_from_checkpoint {folder}: it lacks {missing[0]}; give an earlier checkpoint")
