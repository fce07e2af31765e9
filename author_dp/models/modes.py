"""Switch a model's mode, or another setting, for a while."""

import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import masking_utils
from transformers.pytorch_utils import Conv1D

from author_dp.models.quantization import quantized_float32_compute


@contextmanager
def deterministic_eval(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout; restore the modes of all layers and the random generators afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def temporarily_set(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, attributes have other values.

    Args:
        settings: owner, name and value of each.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def one_text_per_row() -> AbstractContextManager[None]:
    """Spare transformers its search for several texts in a row of a batch, which are never there with `input_ids` alone.

    The search reads positions back from a GPU, which waits for all that is queued there, at each forward pass. Its result decides
    for all samples together how attention is computed, so one author's row could also change the rounding of all others.
    """
    return temporarily_set((masking_utils, "find_packed_sequence_indices", lambda position_ids: None))


@contextmanager
def frozen_weights_cast(model: nn.Module) -> Iterator[None]:
    """Inside autocast, cast the frozen weights of plain linear layers once, not at each call.

    Autocast itself remembers the casts of trained weights only. What layers compute does not change. Where layers are
    checkpointed, nothing is cast: these copies are what checkpointing does not keep.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for layer in model.modules():
        if checkpointed or type(layer) not in (nn.Linear, Conv1D):
            continue
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.requires_grad or parameter.dtype != torch.float32:
                continue
            # FSDP gathers the parameters of a sharded layer at each call.
            if torch.is_autocast_enabled(parameter.device.type) and not isinstance(parameter, DTensor):
                replaced.append((layer, name, parameter))
    try:
        for layer, name, parameter in replaced:
            layer._parameters[name] = parameter.to(torch.get_autocast_dtype(parameter.device.type))  # type: ignore[assignment]
        yield
    finally:
        for layer, name, parameter in replaced:
            layer._parameters[name] = parameter


@contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Put the model into training mode; restore modes, buffers and all global random generators."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, b, b.clone()) for module in modes for name, b in module._buffers.items() if b is not None]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


def is_dropout_rate(owner: Any, name: str, value: Any) -> bool:
    """Return whether an attribute says how much is dropped, or jittered, at random in training."""
    is_rate = "drop" in name or "jitter" in name or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
    return is_rate and isinstance(value, float) and value > 0


def float32_products() -> AbstractContextManager[None]:
    """Disable TF32 and bfloat16 for float32 products and convolutions, however they were enabled."""
    backends: Any = torch.backends
    flags = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv]
    return temporarily_set(*((flag, "fp32_precision", "ieee") for flag in flags))


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Make CUDA compute the same twice, for two backward passes that must agree.

    The backward pass of flash attention adds up in a random order by default. The norms of the first pass would bound the sums of
    the second one to rounding only. Where an operation has no deterministic kernel, the default one runs.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), temporarily_set((torch.utils.deterministic, "fill_uninitialized_memory", False)):
            warnings.filterwarnings("ignore", message=".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def full_precision_sums() -> AbstractContextManager[None]:
    """Make CUDA sum products of 16-bit factors in float32; by default it may add partial sums in 16 bits."""
    flags = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    return temporarily_set(*((torch.backends.cuda.matmul, flag, False) for flag in flags))


@contextmanager
def float32_train_mode(model: nn.Module) -> Iterator[None]:
    """Use training mode, in which alone batch norm mixes samples, without autocast, TF32 or bfloat16 products."""
    autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with training_mode(model), autocast, quantized_float32_compute(model), float32_products():
        yield


@contextmanager
def deterministic_train_mode(model: nn.Module) -> Iterator[None]:
    """Use `float32_train_mode` without dropout; set every dropout rate of modules and configurations to 0."""
    owners: dict[int, Any] = {id(o): o for m in model.modules() for o in (m, getattr(m, "config", None)) if o is not None}
    rates = [(o, name, type(v)(0)) for o in owners.values() for name, v in vars(o).items() if is_dropout_rate(o, name, v)]
    with float32_train_mode(model), temporarily_set(*rates):
        yield
