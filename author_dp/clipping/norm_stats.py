"""What the per-author gradients of a run were like: how many were clipped, how many not finite, and how large they were.

Promise: nothing here enters an update. All of it is computed on private data without noise: not for publication.
"""

import torch
from transformers.utils import logging

from author_dp.distributed import all_reduce_sum

logger = logging.get_logger(f"transformers.{__name__}")


class NormStatistics:
    """Count the norms of per-author gradients.

    Args:
        clip_norm: C; norms are counted as multiples of it.
        device: where the norms are.
    Attributes:
        edges: (81,), a tenth of a decade apart, of the bins of norm / C.
        authors: clipped by this process; to be set to 0 where a training begins.
    """

    def __init__(self, clip_norm: float, device: torch.device):
        self.clip_norm = clip_norm
        self.edges = torch.logspace(-4, 4, 81, device=device)
        self._bins = torch.zeros(len(self.edges) + 1, device=device)
        self._counts = torch.zeros(3, device=device)  # authors seen, clipped, not finite, since the last log line
        self._steps = 0
        self.authors = 0

    def add(self, norms: torch.Tensor, is_real: torch.Tensor) -> None:
        """Count the norms of a microbatch's real authors.

        Args:
            norms: (authors,), before clipping; inf or nan for a gradient that is not finite.
            is_real: bool (authors,) on the CPU, False for an author who is not to be counted.
        """
        self.authors += int(is_real.sum())
        is_real = is_real.to(norms.device, non_blocking=True)
        kinds = torch.stack([is_real, norms > self.clip_norm, ~norms.isfinite()]) & is_real
        self._counts += kinds.sum(1)
        self._bins.scatter_add_(0, torch.bucketize(norms / self.clip_norm, self.edges), is_real.to(norms.dtype))

    def end_step(self) -> None:
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """Return clip_fraction and authors_per_step of all processes since the last call; warn of gradients not finite."""
        authors, clipped, not_finite = all_reduce_sum(self._counts).tolist()
        steps, self._steps = self._steps, 0
        self._counts.zero_()
        if not_finite:
            logger.warning(f"The gradients of {not_finite:.0f} authors were not finite; they contributed zero.")
        return {"clip_fraction": clipped / max(1, authors), "authors_per_step": authors / max(1, steps)}

    def histogram(self) -> list[float]:
        """Return how many norms of all processes lie below, between and above `edges`, since the start; (82,)."""
        return all_reduce_sum(self._bins.clone()).tolist()
