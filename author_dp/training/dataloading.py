"""Adapt the Trainer's loop to our sampler: one logical batch per optimizer step.

Guarantees: keys of sampling and groups come from the operating system, agree on all processes, and are new for each training.
"""

import copy
import os
import secrets
from collections.abc import Callable
from typing import Any, Optional

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import broadcast
from author_dp.logs import get_logger
from author_dp.mechanism.microbatches import LogicalBatchDataset, MicrobatchShape
from author_dp.mechanism.sampling import (
    BallsInBinsAuthorSampler,
    CyclicAuthorSampler,
    PoissonAuthorSampler,
    assign_sampling_groups,
)
from author_dp.models.quantization import quant_scales

logger = get_logger(__name__)


def adapt_trainer_args(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of `args` for one logical batch per step and one device per process."""
    args = copy.copy(args)
    if args.n_gpu > 1:
        logger.warning(
            "Using one GPU: several GPUs in one process need DataParallel, which mixes authors. To use all of them, start one "
            "process per GPU with torch.distributed.run."
        )
        args._n_gpu = 1
    args.ignore_data_skip = True  # batches are sampled afresh: there is nothing to skip
    args.gradient_accumulation_steps = 1  # training_step splits the logical batch
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    args.logging_nan_inf_filter = False  # it waits for the device at each step; training_step counts such losses as 0
    return args


def make_sampler(dataset: Any, plan: PrivacyPlan, args: TrainingArguments, num_canaries: int) -> PoissonAuthorSampler:
    """Return a sampler of this process's shares of an epoch's batches, with new keys."""
    options: dict[str, Any] = dict(
        sample_rate=plan.sample_rate,
        samples_per_author=plan.samples_per_author,
        steps=plan.steps_per_epoch,
        key=broadcast(secrets.randbits(128)),
        rank=args.process_index,
        world_size=args.world_size,
        num_canaries=num_canaries,
    )
    if plan.noise_bands == 1 and not plan.slots:
        return PoissonAuthorSampler(dataset.offsets, dataset.indices, **options)
    groups = assign_sampling_groups(dataset.hashes, plan.slots or plan.noise_bands, broadcast(secrets.token_bytes(32)))
    if plan.slots:
        del options["sample_rate"]
        return BallsInBinsAuthorSampler(dataset.offsets, dataset.indices, slots=groups, **options)
    return CyclicAuthorSampler(dataset.offsets, dataset.indices, groups=groups, bands=plan.noise_bands, **options)


def load_logical_batches(
    dataset: Any,
    sampler: PoissonAuthorSampler,
    args: TrainingArguments,
    collate: Callable,
    max_authors: int,
    shape: Optional[MicrobatchShape],
) -> DataLoader:
    """Return a loader of the logical batches that `sampler` samples in an epoch, padded in the workers."""
    return DataLoader(
        LogicalBatchDataset(dataset, max_authors, collate, shape),
        batch_sampler=sampler,  # type: ignore[arg-type]  # yields AuthorBatch, which LogicalBatchDataset accepts
        collate_fn=identity_collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def max_bands_in_memory(model: nn.Module, args: TrainingArguments) -> int:
    """Return how many noise bands fit into half of the free memory of rank 0. Collective.

    Each band but one takes as many bytes as the trained parameters, divided over all processes.
    """
    band_bytes = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * 4 / args.world_size
    if args.device.type == "cuda":
        free = torch.cuda.mem_get_info(args.device)[0]
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return broadcast(1 + int(free / 2 / band_bytes))


def to_device(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Move the model to the Trainer's device, unless it is spread over several devices."""
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)  # type: ignore[arg-type]


def identity_collate(batch: Any) -> Any:
    """Return a batch unchanged, as the data set returns complete ones. A named function, so that workers can be spawned."""
    return batch


def broadcast_parameters(model: nn.Module) -> None:
    """Copy rank 0's weights, frozen ones included, to every process. Collective."""
    if dist.is_initialized():
        for parameter in model.parameters():
            for tensor in (parameter.data, *quant_scales(parameter)):
                dist.broadcast(tensor, src=0)
