"""Check while a run trains that its noise has the distribution that the ledger records.

Guarantees: a run is stopped with `MechanismError` if its noise is missing, has another scale (1 % off: within about a hundred
steps), shape or mean, is used twice, is correlated between steps or coordinates, or follows a seed. A run with correct noise is
stopped with probability below `FAMILY_WISE_ERROR`, for any number of steps and tests.

How: the buffer of clipped sums ends with a probe, `PROBE_SIZE` coordinates that receive no gradient. They are noised, reduced and
divided like the others. What is released there must be N(0, (sigma C / B)^2), independent of everything. The monitor thus sees
noise only, which is independent of the data and of the noise on the parameters. Neither the monitor, nor a stop, nor the time of
a stop reveals anything about any author. The first probe of each run stays in the output directory, for runs that resume there.

Why in the run and not in a test: people copy and change this code, and the test suite does not travel with the copy.

Not found: wrong clipping (gradient_canaries.py finds it), wrong sampling (sampling_monitor.py finds it), noise that is
predictable by other means than a seed, and a bug that spares the probe.

Example:

    >>> monitor = NoiseMonitor(std=0.9 * 1.0 / 256)
    >>> monitor.add(optimizer.grad_buffer.probe)  # after each step
    >>> monitor.test()  # at log lines and at the end
"""

import os
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from scipy import stats

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import barrier, is_main_process
from author_dp.guards.noise_statistics import (
    NoiseCorrelations,
    NoiseDuplicates,
    NoiseMoments,
    NoiseShape,
    NoiseStatistic,
    NoiseTails,
)
from author_dp.guards.sequential_test import SequentialTest
from author_dp.mechanism.noise import GaussianNoise
from author_dp.mechanism.optimizer import PROBE_SIZE

PROBES_NAME = "_noise_check.npy"  # in the output directory; the leading _ keeps it out of uploads to the hub
MAX_SAVED_PROBES = 8  # runs of a directory whose first probes are saved
MAX_SAVED_VALUE = 40.0  # of a saved probe, in standard deviations; larger values are damage, not noise
BUFFERED_STEPS = 64  # probes that may wait on the device, so that not every step waits for a copy to the CPU


class NoiseMonitor(SequentialTest):
    """Test the noise that is released in the probe.

    Args:
        std: standard deviation that the noise must have: noise multiplier x clip norm / expected batch size.
        file: where the first probes of the runs of a directory are saved; None: nowhere.
    """

    def __init__(self, std: float, file: Optional[Path] = None):
        super().__init__()
        self.std, self.file = std, file
        self._saved = [] if file is None else load_probe_history(file)
        self._buffer: list[torch.Tensor] = []
        self.moments, self.correlations = NoiseMoments(), NoiseCorrelations(self._saved)
        self.statistics: list[NoiseStatistic] = [self.moments, NoiseShape(), NoiseTails(), NoiseDuplicates(), self.correlations]

    def add(self, probe: torch.Tensor) -> None:
        """Add what one step released in the probe, flat."""
        self._buffer.append(probe.detach().clone())
        if len(self._buffer) >= BUFFERED_STEPS:
            self.flush()

    def flush(self) -> None:
        buffer, self._buffer = self._buffer, []
        if buffer:
            for values in torch.stack(buffer).cpu().double().numpy():
                self.add_step(values / self.std)

    def add_step(self, values: np.ndarray) -> None:
        """Add one step's values, N(0, 1) if the mechanism is correct."""
        self.steps += 1
        for statistic in self.statistics:
            statistic.add(values)

    def p_values(self) -> dict[str, float]:
        if not np.isfinite(self.moments.squares):
            return {"values that are not finite": 0.0}
        return {name: p_value for statistic in self.statistics for name, p_value in statistic.p_values().items()}

    def failure_message(self, failed: str) -> str:
        ratio = (self.moments.squares / self.moments.count) ** 0.5
        return (
            f"released noise fails a test: {failed} (after {self.steps} steps; its standard deviation in coordinates "
            f"without gradients is {ratio:.4g} times the expected one)"
        )

    def test(self) -> None:
        """Test all steps so far, and save the first probe of a run that passes."""
        super().test()
        if self.file is not None and self.correlations.first is not None and is_main_process():
            if save_probe_history(self.file, [*self._saved, self.correlations.first]):
                self.file = None

    def confidence_interval(self, confidence: float) -> tuple[float, float]:
        """Return an interval for the noise's standard deviation over `std`, if the noise is Gaussian."""
        self.flush()
        quantiles = stats.chi2.isf([(1 - confidence) / 2, (1 + confidence) / 2], self.moments.count)
        low, high = (self.moments.squares / quantiles) ** 0.5
        return float(low), float(high)


def sample_noise(device: torch.device, secure: bool) -> torch.Tensor:
    """Return noise of standard deviation 1 from a new source, (PROBE_SIZE,); arguments as for the run's `GaussianNoise`."""
    return GaussianNoise(device, secure).add_(torch.zeros(PROBE_SIZE, device=device), 1.0)


def make_noise_monitor(plan: PrivacyPlan, folder: Path) -> Optional[NoiseMonitor]:
    """Return the noise monitor of a run; None for a run without noise. Collective.

    Args:
        folder: output directory, with the first probes of earlier runs.
    """
    if plan.disable_dp or plan.noise_multiplier == 0:
        return None
    monitor = NoiseMonitor(plan.noise_multiplier * plan.clip_norm / plan.expected_batch_size, folder / PROBES_NAME)
    barrier()  # every process has read the file before the main process writes it
    return monitor


def load_probe_history(file: Path) -> list[np.ndarray]:
    """Return the saved probes, in standard deviations, without damaged ones; none if they have another size."""
    try:
        probes = np.load(file, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError):
        return []
    if probes.ndim != 2 or probes.shape[1] != PROBE_SIZE:
        return []
    return [probe for probe in probes if np.abs(probe).max(initial=0.0) < MAX_SAVED_VALUE]  # False for nan


def save_probe_history(file: Path, probes: list[np.ndarray]) -> bool:
    """Save the last probes atomically, and return whether that succeeded.

    A full disk raises nothing here: the ledger and the checkpoints report it, and the next test tries again.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            np.save(stream, np.stack(probes[-MAX_SAVED_PROBES:]).astype(np.float32))
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True
