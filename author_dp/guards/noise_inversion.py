"""Recover independent noise from correlated noise."""

from collections import deque
from typing import Optional

import numpy as np
import torch


class NoiseDecorrelator:
    """Turn what is released, step by step, x_t + w_t, into rows of C x + z, where the noise is independent over steps."""

    def __init__(self, coefficients: np.ndarray):
        self.coefficients = coefficients.tolist()
        self._past: deque[torch.Tensor] = deque(maxlen=len(self.coefficients))

    def __call__(self, released: torch.Tensor) -> torch.Tensor:
        self._past.appendleft(released.detach().clone())
        return torch.stack([c * past for c, past in zip(self.coefficients, self._past)]).sum(0)


class MatchedFilter:
    """Turn rows of C x + z into one number for each time that an author's group is drawn: x + N(0, sigma^2), independent.

    The draw of step t shows in rows t, ..., t + b - 1, c_i times each; their products with c_i are summed. Blocks of a group do
    not overlap.

    Args:
        coefficients: (bands,).
        groups: (coordinates,), when the author of each coordinate is drawn: at step t for t mod bands.
    """

    def __init__(self, coefficients: np.ndarray, groups: np.ndarray):
        self.coefficients, self.bands = torch.from_numpy(coefficients / np.linalg.norm(coefficients)), len(coefficients)
        self.groups = torch.from_numpy(groups)
        self._rows: deque[torch.Tensor] = deque(maxlen=2 * self.bands - 1)
        self._steps = 0

    def __call__(self, row: torch.Tensor) -> Optional[torch.Tensor]:
        """Take a row, (coordinates,); return the next number of each coordinate once in `bands` steps, None otherwise."""
        self._rows.append(row)
        self._steps += 1
        if len(self._rows) < 2 * self.bands - 1 or (self._steps + 1) % self.bands:
            return None
        rows = torch.stack(list(self._rows))  # the first of them is of group 0
        groups, coefficients = self.groups.to(row.device), self.coefficients.to(rows)
        windows = torch.stack([coefficients @ rows[g : g + self.bands] for g in range(self.bands)])  # (bands, coordinates)
        return windows.gather(0, groups[None])[0]
