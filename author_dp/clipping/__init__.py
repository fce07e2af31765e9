"""Per-author clipping engines, by name, and their interface.

Guarantees: with every engine, each author's gradient enters the sum with norm at most C over all trainable parameters together,
and nothing is trained unclipped.

`ghost.py` is the fast engine. Its parts are `capture.py` (hooks on layers), `layer_rules.py` (a rule for each type of layer),
`norms.py`, `grad_factors.py` (factors and their clipped sums), `factor_store.py` (what is kept until norms are known) and
`fallback.py` (parameters without a rule). `two_pass.py` replaces it where layers are checkpointed, and needs less memory.
`grad_sample.py` is the reference engine, by Opacus. `norm_stats.py` counts norms.

Example:

    >>> engine = ENGINES["ghost"](model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])
"""

from typing import Optional, Protocol

import torch
from torch import nn

from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_sample import GradSampleClipping
from author_dp.clipping.two_pass import TwoPassClipping


class ClippingEngine(Protocol):
    """Interface of a clipping engine. To add one, write its class in a module of its own and name it in ENGINES."""

    module: nn.Module  # call it instead of the model

    def __init__(self, model: nn.Module, clip_norm: float): ...

    def backward(self, losses: torch.Tensor, author: torch.Tensor, samples_each: Optional[int] = None) -> torch.Tensor:
        """Add the clipped gradients of losses (authors,) to `summed_grad`; return the norms before clipping, (authors,).

        Args:
            author, samples_each: as for `AuthorIndex`.
        """
        ...

    def close(self) -> None:
        """Restore the model."""


ENGINES: dict[str, type[ClippingEngine]] = {"ghost": GhostClipping, "grad_sample": GradSampleClipping}


def engine_class(name: str, checkpointed: bool) -> type[ClippingEngine]:
    """Return the class of the engine `--clipping name`.

    Args:
        checkpointed: whether the model's layers are checkpointed.
    """
    return TwoPassClipping if checkpointed and name == "ghost" else ENGINES[name]
