"""Shard a model with FSDP2: each of W processes holds 1/W of weights, clipped sums, noise and optimizer state.

Guarantees: a step is that of optimizer.py, under the same adjacency. Every coordinate of the released sum is on exactly one
process. There the clipped sums of all processes meet, and that process adds the coordinate's noise, N(0, sigma^2 C^2), with its
own keys. No coordinate is noised twice, and none goes without noise.

How: torch's FSDP2 [1, 2] splits each parameter along its first dimension and gathers one block of the model at a time, forward
and backward. FSDP2 handles no gradients: book-keeping asks autograd for those of layers' outputs only, so no ordinary gradient of
a weight is ever computed or reduced. `fsdp_clipping.py` reduce-scatters the clipped sums. Under --bf16, blocks are gathered in
bfloat16; clipped sums, noise, optimizer state and the updated weights are float32 always.

Every process must take part in every gather. A process with fewer microbatches runs dummy ones, which count for nothing.

Example:

    >>> shard_model(model, torch.device("cuda"))
    >>> optimizer = ShardedOptimizer(torch.optim.AdamW(model.parameters()), ...)

References:
    [1] Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054, section 5
    [2] Zhao et al. 2023, PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, arXiv 2304.11277
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
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

from author_dp.distributed import is_main_process, rank_and_world_size
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.optimizer import PROBE_SIZE, AuthorDPOptimizer, GradBuffer
from author_dp.types import Batch

FSDP_REMEDY = "leave out --fsdp"

# Its name in torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- sharding ---------------------------------------------------------------------------------------------


def shard_model(model: Any, device: torch.device) -> None:
    """Shard the parameters in place; one complete block is on the device at a time. Collective.

    Args:
        model: a transformers or peft model, in float32, the same on all processes; frozen parameters are sharded, too.
        device: of this process' shards.
    Raises:
        UserError: for a model whose blocks are not known.
    """
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*find_blocks(root), *find_untied_embeddings(root), root]:
        # By default FSDP2 keeps the root complete after a forward: evaluation would leave it so, and see old weights.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


class BF16AllGather:
    """FSDP2's interface of an all-gather: send float32 parameters as bfloat16, and return them as float32."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather within FSDP2's stream, in which whatever uses the result waits; bytes, as gloo knows few types."""
        rounded = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        all_gather(rounded.view(torch.uint8), input_tensor.to(torch.bfloat16).view(torch.uint8), group=group)
        output_tensor.copy_(rounded)


def gather_in_bfloat16(model: Any) -> None:
    """Let the blocks of a sharded model gather their weights in bfloat16, for runs under autocast; the shards stay float32.

    Autocast rounds the matrices in the same way. Norms' weights are rounded too. Embeddings and head are gathered in float32.
    The model check needs float32, so call this after it.
    """
    for block in find_blocks(model.get_base_model() if isinstance(model, PeftModel) else model):
        block.set_custom_all_gather(BF16AllGather())  # type: ignore[operator]


def find_blocks(root: Any) -> list[nn.Module]:
    """Return the modules that are gathered one at a time: the blocks that transformers names; of nested ones, the outer."""
    class_names = set(getattr(root, "_no_split_modules", None) or ())
    # FSDP2 prefixes the names of the classes that it has sharded.
    found = {name: m for name, m in root.named_modules() if type(m).__name__.removeprefix("FSDP") in class_names}
    found = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    parameters = [parameter for block in found.values() for parameter in block.parameters()]
    if not found or len(set(parameters)) < len(parameters):
        raise UserError(f"--fsdp: the blocks of this model are not known, or share weights. {FSDP_REMEDY.capitalize()}.")
    return list(found.values())


def find_untied_embeddings(root: Any) -> list[nn.Module]:
    """Return the input embedding, unless it is tied to the head: then it must stay gathered as long as the rest of the root."""
    words = root.get_input_embeddings()
    uses = sum(parameter is words.weight for _, parameter in root.named_parameters(remove_duplicate=False))
    return [words] if uses == 1 else []


def is_sharded(parameters: Iterable[Any]) -> bool:
    """Return whether any of the parameters is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process' shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(tensor: torch.Tensor) -> float:
    """Return the L2 norm of the complete tensor, in float64 over its rows. Collective for a sharded one."""
    square = local_shard(tensor).square().sum(-1).cpu().double().sum()  # on the CPU, as Macs' GPUs have no float64
    if isinstance(tensor, DTensor):
        dist.all_reduce(square := square.to(tensor.device))
    return float(square) ** 0.5


def find_non_finite_shard(parameters: Iterable[tuple[str, Any]]) -> Optional[str]:
    """Return the name of a parameter with a number that is not finite; None if there is none. Collective for sharded ones.

    The host waits once for each device, not for each parameter.
    """
    by_device: dict[torch.device, list[tuple[str, Any]]] = defaultdict(list)
    for name, parameter in parameters:
        by_device[parameter.device].append((name, parameter))
    for device, group in by_device.items():
        shards = [local_shard(parameter) for _, parameter in group]
        extremes = [torch.stack(torch.aminmax(s)) if s.numel() else torch.zeros(2, device=device) for s in shards]
        finite = torch.stack([values.isfinite().all() for values in extremes])
        if is_sharded(parameter for _, parameter in group):
            dist.all_reduce(finite := finite.to(torch.int32), op=dist.ReduceOp.MIN)
        if not all(flags := finite.tolist()):
            return group[flags.index(False)][0]
    return None


def autograd_gradients(loss: torch.Tensor, parameters: list[Any]) -> list[Optional[torch.Tensor]]:
    """Return the gradients of a loss by ordinary autograd; None for an unused parameter.

    Of a sharded model FSDP2 returns sharded gradients; the loss must then be the same on all processes. Collective then.
    """
    if not is_sharded(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    loss.backward()  # FSDP2 averages gradients over the processes
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


# --- collectives: as many forwards and backwards on every process -----------------------------------------


def missing_fsdp_rounds(model: nn.Module, rounds: int) -> int:
    """Return how many rounds this process has fewer than the one with the most; 0 if the model is not sharded. Collective."""
    if not is_sharded(model.parameters()):
        return 0
    most = torch.tensor(rounds, device=next(model.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) - rounds


def dummy_batch(model: nn.Module) -> Batch:
    """Return a microbatch of one dummy author with two tokens."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids, "author": ids[:, 0], "num_authors": 1}


def dummy_forwards(model: nn.Module, rounds: int) -> None:
    """Take part in the gathers of `rounds` forwards of other processes. Collective."""
    with torch.no_grad():
        for _ in range(rounds):
            author_losses(model, dummy_batch(model))


# --- optimizer --------------------------------------------------------------------------------------------


class ShardedGradBuffer(GradBuffer):
    """Hold this process' shards of the clipped sums, and of the probe and canaries behind them.

    Every coordinate is on one process, which adds all of its noise. The clipping engine has already summed the shards over the
    authors of all processes. Sums of canaries are still those of this process' authors, so `reduce_sums` adds them up; the probe
    is gathered after noise is added, so that each process checks the noise of all.
    """

    def __init__(self, parameters: list[Any], canaries: Any = None):
        rank, world_size = rank_and_world_size()
        tables = [] if canaries is None else [canaries.table.weight]
        probe_size = PROBE_SIZE + sum(table.numel() for table in tables)
        chunk_size = -(-probe_size // world_size)  # of the probe, on each process
        shards = [local_shard(parameter) for parameter in parameters]
        sizes = [*(shard.numel() for shard in shards), chunk_size]
        self.sums = torch.zeros(sum(sizes), device=parameters[0].device)
        *views, self._probe_chunk = self.sums.split(sizes)
        for parameter, shard, view in zip(parameters, shards, views):
            parameter.summed_grad = as_dtensor(parameter, view.view_as(shard))
        self._probe_sums = torch.zeros(chunk_size * world_size, device=self.sums.device)  # clipped sums of this process' authors
        for table in tables:
            table.summed_grad = self._probe_sums[PROBE_SIZE:probe_size].view_as(table)
        self._chunk_slice = slice(chunk_size * rank, chunk_size * (rank + 1))
        self._released = torch.zeros_like(self._probe_sums)
        self.probe = self._released[:probe_size]
        self.noise_shares, self.noise_slice = 1, self.sums

    def reduce_sums(self) -> None:
        """Sum the canaries' clipped gradients over the processes. Collective: none can proceed before all are at this step."""
        dist.all_reduce(self._probe_sums)
        self._probe_chunk.add_(self._probe_sums[self._chunk_slice])

    def reduce_released(self) -> None:
        """Gather the released probe from all processes. Collective."""
        all_gather(self._released, self._probe_chunk.contiguous())

    def zero_(self) -> None:
        super().zero_()
        self._probe_sums.zero_()


class ShardedOptimizer(AuthorDPOptimizer):
    """AuthorDPOptimizer for sharded parameters; the wrapped optimizer updates this process' shards.

    Guarantee: as AuthorDPOptimizer's.
    """

    buffer_class = ShardedGradBuffer

    def full_optim_state(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state as an unsharded run has it; without values except on rank 0. Collective."""
        state = self.original_optimizer.state_dict()
        complete: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            gathered = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in values.items()}
            if is_main_process():
                complete[index] = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in gathered.items()}
        return {**state, "state": complete}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process' shards of a complete state, whatever the number of processes that saved it."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        shards = {
            index: {name: shard_like(parameters[index], v) for name, v in values.items()}
            for index, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": shards})


def as_dtensor(parameter: Any, shard: torch.Tensor) -> DTensor:
    """Return a tensor of the parameter's layout whose local shard is `shard`, sharing its memory."""
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def shard_like(parameter: Any, value: Any) -> Any:
    """Shard a value of the parameter's shape by its layout; return anything else as it is.

    Every process has the complete value.
    """
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# --- checkpoints ------------------------------------------------------------------------------------------


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as `save_pretrained` takes them, on rank 0 and its CPU; empty elsewhere. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(model, PeftModel))
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def load_sharded_weights(model: Any, folder: Path) -> None:
    """Load this process' shards of the weights that `save_pretrained` has written, one tensor at a time.

    Raises:
        UserError: where `folder` holds a tensor that the model lacks, or lacks one that the model has.
    """
    targets = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    loaded = set()
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if name not in targets:
                        raise UserError(
                            f"--resume_from_checkpoint {folder}: it holds {name}, which this model lacks. Give a checkpoint of "
                            "this model."
                        )
                    targets[name].copy_(shard_like(targets[name], file.get_tensor(name)))
                    loaded.add(local_shard(targets[name]).data_ptr())
    # Tied weights are one tensor under several names, of which one is saved: compare memory, not names.
    shards = {name: local_shard(target) for name, target in targets.items()}
    missing = [name for name, shard in shards.items() if shard.numel() and shard.data_ptr() not in loaded]
    if missing:
        raise UserError(f"--resume_from_checkpoint {folder}: it lacks {missing[0]}. Give an earlier checkpoint.")
