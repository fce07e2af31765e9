"""The authors of a microbatch: sums over their samples, and their clipping factors."""

from functools import cached_property
from typing import Optional

import torch


class AuthorIndex:
    """Which sample of a microbatch belongs to which author.

    Args:
        author: int64 (samples,), ascending: 0 to num_authors - 1, each at least once.
        num_authors: of the microbatch.
        samples_each: how many samples each author has, where they all have equally many and the caller built `author` so.
    Raises:
        ValueError: for any other order, which would clip samples of one author as those of several. On a GPU this is checked
            only where an author has several samples and `samples_each` is not given, as the check waits for the device.
    """

    def __init__(self, author: torch.Tensor, num_authors: int, samples_each: Optional[int] = None):
        self.author, self.num_authors = author, num_authors
        self.has_several = num_authors < len(author)  # whether an author has several samples
        if samples_each is not None and num_authors * samples_each != len(author):
            raise ValueError(f"{num_authors} authors with {samples_each} samples each are not {len(author)} samples")
        if author.device.type == "cpu" or (self.has_several and samples_each is None):
            jumps = torch.cat([author[:1] + 1, author.diff(), num_authors - author[-1:]])  # 0 to the same author, 1 to the next
            if not (len(author) and (jumps[:: len(author)] == 1).all() and ((jumps == 0) | (jumps == 1)).all()):
                raise ValueError(f"authors must be ascending, 0 to {num_authors - 1}, each at least once: {author.tolist()}")
        if not self.has_several or samples_each is not None:
            self._max_samples = samples_each or 1
        else:
            counts = torch.bincount(author, minlength=num_authors)
            self._position = torch.arange(len(author), device=author.device) - (counts.cumsum(0) - counts)[author]
            self._max_samples = int(counts.max())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Line up each author's samples: (samples, tokens, ...) to (authors, tokens of all, ...), zeros at the end."""
        if not self.has_several:
            return tensor
        if self.num_authors * self._max_samples == len(tensor):  # all authors have equally many: a view
            return tensor.unflatten(0, (self.num_authors, self._max_samples)).flatten(1, 2)
        rows = tensor.new_zeros(self.num_authors, self._max_samples, *tensor.shape[1:])
        rows[self.author, self._position] = tensor
        return rows.flatten(1, 2)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over each author's samples: (samples, ...) to float32 (authors, ...)."""
        tensor = tensor.float()
        if not self.has_several:
            return tensor
        return tensor.new_zeros(self.num_authors, *tensor.shape[1:]).index_add_(0, self.author, tensor)


class AuthorClipFactors:
    """The clipping factor of each author of a microbatch.

    Args:
        clip_norm: C.
        norms: (authors,), over all parameters.
    Attributes:
        factors: min(1, C / norm), (authors,).
        non_finite: bool (authors,), whose norms are not finite; None where all are.
    """

    def __init__(self, clip_norm: float, norms: torch.Tensor, authors: AuthorIndex):
        self.authors = authors
        self.factors = (clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||)
        self.non_finite = None if norms.isfinite().all() else ~norms.isfinite()
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    @cached_property
    def _of_samples(self) -> torch.Tensor:
        """The factor of each sample's author, (samples, 1, 1)."""
        return self.factors[self.authors.author].view(-1, 1, 1)

    def scale(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return (samples, tokens, ...) times the factor of each sample's author; the next call overwrites it.

        Newly allocated memory would cost as much time as the matrix product that follows. A dtype other than float32 is rounded
        once more.
        """
        scratch = self._scratch.get(tensor.dtype)
        if scratch is None or len(scratch) < tensor.numel():
            scratch = self._scratch[tensor.dtype] = torch.empty_like(tensor).flatten()
        return torch.mul(tensor, self._of_samples, out=scratch[: tensor.numel()].view_as(tensor))
