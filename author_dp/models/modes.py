"""Switch a model's mode, or another setting, for a while."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import masking_utils


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
