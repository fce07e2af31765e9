"""A run that checks its own mechanism: is what it releases noised as its ledger says?

Promise: a run whose noise is not what the ledger says is stopped with `MechanismError`: of another scale (1 % off within about a
hundred steps), shape or mean, used twice, correlated between steps or coordinates, absent, or made from a seed. A run whose noise
is right is stopped with probability below `FALSE_ALARM`, however long it is and however often it looks.

How: behind the parameters, the sums that are clipped, noised, reduced and divided have mechanism.PAD further coordinates to which
nobody contributes. What is released there must be N(0, (sigma C / B)^2), independent of everything. So the check sees noise
alone, which is independent of the data and of the noise on the parameters: neither the check, nor its stop, nor when it comes,
tells anything about anybody. The first pad of a run is kept in its folder, for the runs that go on there.

Why in the run and not in a test: people copy this code and change it, and a test suite does not travel with a copy.

Not found: a wrong clip (gradient_audit.py does), wrong sampling (drawcheck.py does), noise that somebody could predict by other
means than a seed, and a bug that spares the pad.

Example:

    >>> check = NoiseCheck(std=0.9 * 1.0 / 256)
    >>> check.add(optimizer.grad_buffer.probe)  # after each step
    >>> check.test()  # at log lines and at the end

References:
    [1] Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, section 2 (Bonferroni: p-values are just added up)
"""

import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from scipy import stats
from scipy.special import ndtri

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import barrier, is_main_process
from author_dp.errors import MechanismError
from author_dp.mechanism.noise import GaussianNoise
from author_dp.mechanism.optimizer import PROBE_SIZE

FALSE_ALARM = 1e-9  # of a run
CHECKS = 3  # among which it is shared: of noise (here), of draws (drawcheck.py), of canaries (gradient_audit.py)
PROBES_NAME = "_noise_check.npy"  # in the output folder; the leading _ keeps it out of uploads to the hub
KEPT_RUNS = 8  # of a folder, whose first pads are kept
LAGS = 8  # steps back to which each step is compared, and the first one
BIN_EDGES = ndtri(np.arange(1, 32) / 32)  # of bins of equal probability
LARGEST_KEPT = 40.0  # of a kept pad, in standard deviations: what is beyond is no noise
BUFFERED_STEPS = 64  # steps that may wait on the device, so that not every one has to wait for its copy
EQUAL_DRAWS = 200  # float32 numbers of one pad that were seen in it before; by chance it is about one


class ZStatistic:
    """A sum of what is, without a bug, standard normal at every step whatever came before."""

    def __init__(self) -> None:
        self.count, self.total, self.largest = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.largest = self.count + 1, self.total + value, max(self.largest, abs(value))

    def p_value(self) -> float:
        if not self.count:
            return 1.0
        return 2 * min(two_sided(self.total / self.count**0.5), self.count * two_sided(self.largest))


def two_sided(z: float) -> float:
    return 2 * float(stats.norm.sf(abs(z)))


class SequentialTest:
    """What a run tests again and again; a run that is right fails with probability below FALSE_ALARM / CHECKS, over all tests.

    Attributes:
        steps: that were looked at.
    """

    def __init__(self) -> None:
        self.steps, self.tests = 0, 0

    def p_values(self) -> dict[str, float]:
        """Return for each question the probability of an answer as odd as this one, or a bound on it."""
        raise NotImplementedError

    def failure_message(self, failed: str) -> str:
        """Return in words what is wrong."""
        raise NotImplementedError

    def flush(self) -> None:
        """Count what still waits."""

    def test(self) -> None:
        """Test all steps so far.

        Raises:
            MechanismError: where they are not what they must be.
        """
        self.flush()
        if not self.steps:
            return
        self.tests += 1
        p_values = self.p_values()
        # The allowed false alarms are shared among all tests that may ever come (the shares sum to 1), and among what each asks.
        allowed = FALSE_ALARM / CHECKS / (self.tests * (self.tests + 1)) / len(p_values)
        failed = [name for name, p_value in p_values.items() if not p_value >= allowed]
        if failed:
            raise MechanismError(self.failure_message(", ".join(failed)))


class NoiseMonitor(SequentialTest):
    """Accumulate and test what is released in the pad.

    Args:
        std: what its standard deviation must be: noise multiplier x clip norm / expected batch size.
        file: in which the first pads of the runs of a folder are kept; None where there was none and will be none.
    """

    def __init__(self, std: float, file: Optional[Path] = None):
        super().__init__()
        self.std, self.file = std, file
        self._known = load_probe_history(file) if file is not None else []
        self.equal = 0  # the most draws of one pad that were seen before
        self._waiting: list[torch.Tensor] = []
        self._earlier: deque[np.ndarray] = deque(maxlen=LAGS)
        self._first: np.ndarray = np.zeros(0)
        self._moments = np.zeros(3)  # count, sum, sum of squares
        self._largest = 0.0
        self._bins = np.zeros(len(BIN_EDGES) + 1, dtype=np.int64)
        self._walks: dict[str, ZStatistic] = {}

    def add(self, pad: torch.Tensor) -> None:
        """Take what one step released in the pad, flat."""
        self._waiting.append(pad.detach().clone())
        if len(self._waiting) >= BUFFERED_STEPS:
            self.flush()

    def test(self) -> None:
        """Test, and keep the first pad of a run whose noise is right."""
        super().test()
        self._keep_first()

    def failure_message(self, failed: str) -> str:
        return (
            f"noise is released that is not as promised in {failed} (seen in {self.steps} steps where nobody contributes; its "
            f"standard deviation is {(self._moments[2] / self._moments[0]) ** 0.5:.4g} times what it must be)"
        )

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return between which multiples of `std` the noise's standard deviation is, if it is Gaussian."""
        self.flush()
        count, _, squares = self._moments
        return tuple(float((squares / stats.chi2.isf(p, count)) ** 0.5) for p in ((1 - confidence) / 2, (1 + confidence) / 2))  # type: ignore[return-value]

    def p_values(self) -> dict[str, float]:
        count, total, squares = self._moments
        if not np.isfinite(self._moments).all():
            return {"values that are not finite": 0.0}
        bins, n = stats.binom(int(count), 1 / len(self._bins)), len(self._bins)
        return {
            "its scale": 2 * float(min(stats.chi2.sf(squares, count), stats.chi2.cdf(squares, count))),
            "its mean": two_sided(total / count**0.5),
            "its shape": min(1.0, 2 * n * float(np.minimum(bins.sf(self._bins - 1), bins.cdf(self._bins)).min())),
            "its tails": count * two_sided(self._largest),
            "draws that are equal": 0.0 if self.equal > EQUAL_DRAWS else 1.0,
            **{f"correlation {name}": walk.p_value() for name, walk in self._walks.items()},
        }

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            for pad in torch.stack(waiting).cpu().double().numpy():
                self._flush_one(pad / self.std)

    def _flush_one(self, pad: np.ndarray) -> None:
        self.steps += 1
        self._moments += len(pad), pad.sum(), pad @ pad
        self._largest = max(self._largest, np.abs(pad).max())
        self._bins += np.bincount(np.searchsorted(BIN_EDGES, pad), minlength=len(self._bins))
        self.equal = max(self.equal, len(pad) - len(np.unique(pad)))
        half = len(pad) // 2
        self._compare("between coordinates", pad[:half], pad[half:])
        self._compare("between neighbours", pad[::2], pad[1::2])
        for lag, earlier in enumerate(reversed(self._earlier), 1):
            self._compare(f"between steps, {lag} apart", earlier, pad)
        for run, earlier in enumerate(self._known, 1):
            self._compare(f"with run {run} of the folder", earlier, pad)
        if not len(self._first):
            self._first = pad
        elif self.steps > LAGS + 1:
            self._compare("with the first step", self._first, pad)
        self._earlier.append(pad)

    def _keep_first(self) -> None:
        """Write the first pad of this run into `file`, after those of earlier runs; the first process does."""
        if self.file is None or not len(self._first) or not is_main_process():
            return
        temporary = self.file.with_name(f"{self.file.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.save(file, np.stack([*self._known, self._first])[-KEPT_RUNS:].astype(np.float32))
            os.replace(temporary, self.file)
            self.file = None
        except OSError:  # no space for it: the ledger and the checkpoints say so, and this is tried again at the next test
            temporary.unlink(missing_ok=True)

    def _compare(self, name: str, earlier: np.ndarray, later: np.ndarray) -> None:
        """Given `earlier`, its product with independent standard normals is N(0, |earlier|^2)."""
        norm = float(np.linalg.norm(earlier))
        if norm > 0 and len(earlier) == len(later):
            self._walks.setdefault(name, ZStatistic()).add(float(earlier @ later) / norm)


def make_noise_monitor(plan: PrivacyPlan, folder: Path, device: torch.device, secure: bool) -> Optional[NoiseMonitor]:
    """Return what checks the noise of a run under `plan` in `folder`; None where there is none. Collective.

    Args:
        device, secure: as `NoiseSource` of the run.
    Raises:
        MechanismError: where its noise follows a seed.
    """
    if plan.disable_dp or plan.noise_multiplier == 0:
        return None
    check_unseeded(lambda: GaussianNoise(device, secure).add_(torch.zeros(PROBE_SIZE, device=device), 1.0))
    check = NoiseMonitor(plan.noise_multiplier * plan.clip_norm / plan.expected_batch_size, folder / PROBES_NAME)
    barrier()  # before one of the processes writes that file
    return check


def check_unseeded(draw: Callable[[], torch.Tensor], subject: str = "the noise follows") -> None:
    """Raise MechanismError where two sources of random numbers, made from one state of every global generator, draw alike.

    Results do not show whether somebody can predict them: noise from --seed is perfect noise to whoever lacks the seed.

    Args:
        draw: makes a new source, and returns its first numbers, flat.
        subject: of the error's sentence.
    """
    draws = torch.stack([draw.cpu().double() for draw in replay_global_rng(draw)])
    if not abs(float(torch.corrcoef(draws)[0, 1])) < 10 / draws.shape[1] ** 0.5:
        raise MechanismError(f"{subject} the seed of torch, numpy or random: whoever knows --seed can predict them")


def replay_global_rng(draw: Callable[[], Any]) -> list[Any]:
    """Return what `draw` returns from one state of every global generator, twice; the generators are as before, afterwards."""
    python, old = random.getstate(), np.random.get_state()
    draws = []
    with torch.random.fork_rng():
        for _ in range(2):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            draws.append(draw())
    random.setstate(python)
    np.random.set_state(old)
    return draws


def load_probe_history(file: Path) -> list[np.ndarray]:
    """Return the pads in `file`, over their standard deviation, but for damaged ones."""
    try:
        pads = np.load(file, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError):
        return []
    return [pad for pad in pads if np.abs(pad).max(initial=0.0) < LARGEST_KEPT] if pads.ndim == 2 else []  # nan is not less
