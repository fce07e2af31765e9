"""Per-author clipping: the engines by name, and what one must do.

Promise: whichever engine is chosen, each author's gradient enters the sum with norm at most C over all trainable parameters
together, and nothing is trained unclipped.

`ghost.py` is the fast engine, `rules.py` its rule for each type of layer, `contributions.py` the norms and clipped sums that the
rules are made of; `two_pass.py` takes its place where layers are checkpointed, with less memory. `grad_sample.py` is the plain
engine, by Opacus, and the reference. `statistics.py` counts norms.

Example:

    >>> engine = ENGINES["ghost"](model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])
"""

from typing import Protocol

import torch
from torch import nn

from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_sample import GradSampleClipping
from author_dp.clipping.two_pass import TwoPassClipping


class ClippingEngine(Protocol):
    """What is asked of a clipping engine. A further one is a class in a module of its own, and a name in ENGINES."""

    module: nn.Module  # to be called instead of the model

    def __init__(self, model: nn.Module, clip_norm: float): ...

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Add the clipped gradients of losses (authors,) to `summed_grad`; return the norms before clipping, (authors,)."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""


ENGINES: dict[str, type[ClippingEngine]] = {"ghost": GhostClipping, "grad_sample": GradSampleClipping}


def engine_class(name: str, checkpointed: bool) -> type[ClippingEngine]:
    """Return the engine of --clipping `name`, for a model whose layers are checkpointed or not."""
    return TwoPassClipping if checkpointed and name == "ghost" else ENGINES[name]
