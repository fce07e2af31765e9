"""Recover independent noise from noise that is correlated over steps (noise bands)."""

from collections import deque
from typing import Optional

import numpy as np
import torch


class NoiseDecorrelator:
    """Turn the releases x_t + w_t of each step into rows of C x + z, whose noise is independent over steps."""

    def __init__(self, coefficients: np.ndarray):
        self.coefficients = coefficients.tolist()
        self._recent: deque[torch.Tensor] = deque(maxlen=len(self.coefficients))

    def __call__(self, released: torch.Tensor) -> torch.Tensor:
        self._recent.appendleft(released.detach().clone())
        return torch.stack([c * values for c, values in zip(self.coefficients, self._recent)]).sum(0)


class MatchedFilter:
    """Turn rows of C x + z into one value for each time an author's group is sampled: x + N(0, sigma^2), independent.

    Sampling in step t adds c_i to row t + i, for i = 0, ..., b - 1. The rows' products with c_i are summed. Windows of a group do
    not overlap.

    Args:
        coefficients: (bands,).
        groups: (coordinates,), group g of the coordinate's author, who can be sampled in steps t with t mod b = g.
    """

    def __init__(self, coefficients: np.ndarray, groups: np.ndarray):
        self.coefficients, self.bands = torch.from_numpy(coefficients / np.linalg.norm(coefficients)), len(coefficients)
        self.groups = torch.from_numpy(groups)
        self._rows: deque[torch.Tensor] = deque(maxlen=2 * self.bands - 1)
        self._steps = 0

    def __call__(self, row: torch.Tensor) -> Optional[torch.Tensor]:
        """Add a row, (coordinates,); return each coordinate's next value once in `bands` steps, None otherwise."""
        self._rows.append(row)
        self._steps += 1
        if len(self._rows) < 2 * self.bands - 1 or (self._steps + 1) % self.bands:
            return None
        rows = torch.stack(list(self._rows))  # the first row is of group 0
        groups, coefficients = self.groups.to(row.device), self.coefficients.to(rows)
        windows = torch.stack([coefficients @ rows[g : g + self.bands] for g in range(self.bands)])  # (bands, coordinates)
        return windows.gather(0, groups[None])[0]
