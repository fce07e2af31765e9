"""Per-author clipping: the engines by name, and what one must do.

Promise: whichever engine is chosen, each author's gradient enters the sum with norm at most C over all trainable parameters
together, and nothing is trained unclipped.

`ghost.py` is the fast engine, `rules.py` its rule for each type of layer, `contributions.py` the norms and clipped sums that the
rules are made of; `grad_sample.py` is the plain engine, by Opacus, and the reference. `statistics.py` counts norms.

Example:

    >>> engine = ENGINES["ghost"](model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])
"""

from typing import Protocol

import torch
from torch import nn

from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_sample import GradSampleClipping


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
