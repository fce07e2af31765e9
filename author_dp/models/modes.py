"""Switch a model's mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
