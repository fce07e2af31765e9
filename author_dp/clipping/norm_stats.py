"""Statistics of the norms of per-author gradients: how many were clipped or not finite, and a histogram.

Guarantees: nothing here enters an update. All statistics are computed on private data without noise and are not for publication.
"""

import torch

from author_dp.distributed import all_reduce_sum
from author_dp.logs import get_logger

logger = get_logger(__name__)


class NormStatistics:
    """Count the norms of per-author gradients.

    Args:
        clip_norm: C; norms are counted as multiples of it.
        device: of the norms.
    Attributes:
        edges: of the bins of norm / C, (81,), a tenth of a decade from each other.
        authors: how many this process clipped; the caller sets it to 0 when training begins.
    """

    def __init__(self, clip_norm: float, device: torch.device):
        self.clip_norm = clip_norm
        self.edges = torch.logspace(-4, 4, 81, device=device)
        self._bins = torch.zeros(len(self.edges) + 1, device=device)
        self._counts = torch.zeros(3, device=device)  # authors seen, clipped, not finite, since the last log line
        self._steps = 0
        self.authors = 0

    def add(self, norms: torch.Tensor, is_real: torch.Tensor, num_real: int) -> None:
        """Count the norms of a microbatch's real authors.

        Args:
            norms: (authors,), before clipping; inf or nan for a gradient that is not finite.
            is_real: bool (authors,), False for dummy authors and canaries, which are not counted.
            num_real: how many are real.
        """
        self.authors += num_real
        self._counts += (torch.stack([is_real, norms > self.clip_norm, ~norms.isfinite()]) & is_real).sum(1)
        self._bins.scatter_add_(0, torch.bucketize(norms / self.clip_norm, self.edges), is_real.to(norms.dtype))

    def end_step(self) -> None:
        """Count a step of the log interval."""
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """Return clip_fraction and authors_per_step of all processes since the last call; warn of non-finite gradients."""
        authors, clipped, non_finite = all_reduce_sum(self._counts).tolist()
        steps, self._steps = self._steps, 0
        self._counts.zero_()
        if non_finite:
            logger.warning(f"The gradients of {non_finite:.0f} authors were not finite; they contributed zero.")
        return {"clip_fraction": clipped / max(1, authors), "authors_per_step": authors / max(1, steps)}

    def histogram(self) -> list[float]:
        """Return the numbers of norms below, between and above `edges`, of all processes since the start, (82,)."""
        return all_reduce_sum(self._bins.clone()).tolist()
