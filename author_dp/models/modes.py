"""Switch a model's mode, or transformers', for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

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
def one_text_per_row() -> Iterator[None]:
    """Spare transformers its search for several texts in a row of a batch, which are never there with `input_ids` alone.

    The search reads positions back from a GPU, which waits for all that is queued there, at each forward pass. Its result decides
    for all samples together how attention is computed, so one author's row could also change the rounding of all others.
    """
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search
