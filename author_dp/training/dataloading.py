"""What the Trainer's own loop is given, and told otherwise: logical batches as the sampler draws them, one a step.

Promise: keys of sampling and groups come from the operating system, are the same on all processes, and new for each training.
"""

import copy
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.mechanism.microbatches import LogicalBatchDataset, MicrobatchShape
from author_dp.mechanism.sampling import CyclicAuthorSampler, PoissonAuthorSampler, assign_groups
from author_dp.models.quantization import quant_scales

logger = logging.get_logger(f"transformers.{__name__}")


def adapt_trainer_args(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of `args` for a Trainer's loop that sees one logical batch a step, on one device a process."""
    args = copy.copy(args)
    if args.n_gpu > 1:
        logger.warning(
            "Several GPUs in one process would need DataParallel, which mixes authors: using one. To use all, start a "
            "process for each with torch.distributed.run."
        )
        args._n_gpu = 1
    args.ignore_data_skip = True  # batches are drawn afresh: there is nothing to skip
    args.gradient_accumulation_steps = 1  # the logical batch is cut in training_step
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    return args


def make_sampler(dataset: Any, plan: PrivacyPlan, args: TrainingArguments, canaries: int) -> PoissonAuthorSampler:
    """Return a sampler of this process' shares of draws, ceil(1 / q) of them an epoch, with keys of its own."""
    options: dict[str, Any] = dict(
        sample_rate=plan.sample_rate,
        samples_per_author=plan.samples_per_author,
        steps=math.ceil(1 / plan.sample_rate),
        key=broadcast(secrets.randbits(128)),
        rank=args.process_index,
        world_size=args.world_size,
        num_canaries=canaries,
    )
    if plan.noise_bands == 1:
        return PoissonAuthorSampler(dataset.offsets, dataset.indices, **options)
    groups = assign_groups(dataset.hashes, plan.noise_bands, broadcast(secrets.token_bytes(32)))
    return CyclicAuthorSampler(dataset.offsets, dataset.indices, groups=groups, bands=plan.noise_bands, **options)


def load_logical_batches(
    dataset: Any,
    sampler: PoissonAuthorSampler,
    args: TrainingArguments,
    collate: Callable,
    max_authors: int,
    shape: Optional[MicrobatchShape],
) -> DataLoader:
    """Return the logical batches of an epoch, as the sampler draws them, padded in the workers."""
    return DataLoader(
        LogicalBatchDataset(dataset, max_authors, collate, shape),
        batch_sampler=sampler,  # type: ignore[arg-type]  # of AuthorBatch, which LogicalBatchDataset takes as they are
        collate_fn=identity_collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def max_bands_in_memory(model: nn.Module, args: TrainingArguments) -> int:
    """Return for how many noise bands half of the free memory suffices, on the first process; each but one takes what the
    trained parameters take, over all processes."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * 4 / args.world_size
    if args.device.type == "cuda":
        free = torch.cuda.mem_get_info(args.device)[0]
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return broadcast(1 + int(free / 2 / size))


def to_device(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Move the model to where the Trainer will, unless it is spread over devices."""
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)  # type: ignore[arg-type]


class PlainEngine:
    """Training without privacy, called as the clipping engines are: one path for both.

    Args:
        model: called as it is.
        expected_batch_size: by which the sum of losses is divided.
    """

    def __init__(self, model: nn.Module, expected_batch_size: int):
        self.module, self.expected_batch_size = model, expected_batch_size

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Add the gradients of the authors' losses, (authors,), to `grad`; return zeros for norms, which nobody reads."""
        (losses.sum() / self.expected_batch_size).backward()
        return torch.zeros_like(losses.detach())

    def close(self) -> None:
        """Do nothing: there are no hooks."""


class NoDDPWrapper(nn.Module):
    """Call the model, nothing else: accelerate adds DistributedDataParallel to a bare model only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def identity_collate(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches. A function by name, so that workers can be spawned."""
    return batch


@contextmanager
def as_user_error(option: str) -> Iterator[None]:
    """Name the option that the Trainer's complaint is about."""
    try:
        yield
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError(f"{option}: {error}") from error


def broadcast_parameters(model: nn.Module) -> None:
    """Give every process the first one's weights, frozen ones included."""
    if dist.is_initialized():
        for parameter in model.parameters():
            for tensor in (parameter.data, *quant_scales(parameter)):
                dist.broadcast(tensor, src=0)
