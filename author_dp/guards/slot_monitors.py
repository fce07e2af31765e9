"""Check while a run trains that balls-in-bins sampling takes each author once an epoch, in a random slot.

Guarantees: a run is stopped with `MechanismError` if a step has other authors than those of its slot, if slots change between
epochs, or if their sizes are more or less even than those of independent slots. So is one whose gradient canaries do not release
what they should. A correct run is stopped with probability below `FAMILY_WISE_ERROR / NUM_MONITORS`.

How: batches are compared with the slots that the sampler had at the start; that depends on chance alone, never on texts.

Not found: slots that somebody can predict by other means than a seed.

References:
    [1] Boucheron, Lugosi and Massart 2013, Concentration Inequalities, section 2.2 (Chernoff's bound)
    [2] Mitzenmacher and Upfal 2005, Probability and Computing, section 5.4 (balls in bins by independent Poisson numbers)
"""

import numpy as np
from scipy import stats

from author_dp.accounting.balls_in_bins import log_mean_exp
from author_dp.guards.noise_monitor import NoiseMonitor
from author_dp.guards.noise_statistics import NoiseDuplicates, normal_p_value
from author_dp.guards.sequential_test import SequentialTest
from author_dp.mechanism.sampling import split_by_sampling_group

TILTS = np.geomspace(1e-3, 1e2, 60)  # at which Chernoff's bound is evaluated; the best one counts


class SlotMonitor(SequentialTest):
    """Test balls-in-bins sampling.

    Args:
        slots: int (authors,), of each author, canaries last, as the sampler has them before its first batch.
        number: n, of slots.
        num_canaries: number of canaries; a step's batch size excludes them.
    """

    def __init__(self, slots: np.ndarray, number: int, num_canaries: int):
        super().__init__()
        self.number, self.members = number, split_by_sampling_group(slots, number)
        self.sizes = np.array([len(members) for members in self.members])
        self.real_sizes = np.bincount(slots[: len(slots) - num_canaries], minlength=number)
        self.batches, self.wrong_batches, self.wrong_sizes = 0, 0, 0

    def on_sample(self, authors: np.ndarray) -> None:
        """Add the authors of a batch over all processes, their indices ascending."""
        self.wrong_batches += not np.array_equal(authors, self.members[self.batches % self.number])
        self.batches += 1

    def on_step(self, batch_size: int) -> None:
        """Add a step, with the number of authors in its batch, without canaries."""
        self.wrong_sizes += batch_size != self.real_sizes[self.steps % self.number]
        self.steps += 1

    def p_values(self) -> dict[str, float]:
        null = stats.binom(self.sizes.sum(), 1 / self.number)  # of the size of one slot
        extremes = np.minimum(null.cdf(self.sizes), null.sf(self.sizes - 1))
        return {
            "authors other than those of the step's slot": 0.0 if self.wrong_batches else 1.0,
            "batch size": 0.0 if self.wrong_sizes else 1.0,
            "size of one slot": min(1.0, 2 * self.number * float(extremes.min())),
            "slots of equal size": slot_sizes_p_value(self.sizes),
        }

    def failure_message(self, failed: str) -> str:
        return f"balls-in-bins sampling of authors fails a test: {failed} (after {self.steps} steps)"


def slot_sizes_p_value(sizes: np.ndarray) -> float:
    """Bound the probability that independent slots have sizes with so small a sum of squares, (slots,).

    The sizes are independent Poisson numbers, given that their sum is the number of authors ([2], Theorem 5.6). So a probability
    is at most that of Poisson numbers, by Chernoff [1], over the probability of that sum.
    """
    total, number = int(sizes.sum()), len(sizes)
    if number < 2 or not total:
        return 1.0
    mean = total / number
    counts = np.arange(int(mean + 12 * mean**0.5) + 40)
    square_of_one = (counts - mean) ** 2 / mean
    log_moments = np.log(np.exp(-TILTS[:, None] * square_of_one) @ stats.poisson.pmf(counts, mean) + 1e-15)
    observed = float(((sizes - mean) ** 2 / mean).sum())
    log_bound = float((TILTS * observed + number * log_moments).min()) - float(stats.poisson.logpmf(total, total))
    return min(1.0, float(np.exp(min(0.0, log_bound))))


class SlotCanaryMonitor(NoiseMonitor):
    """Test what gradient canaries release: rows of C x + z, with x 1 in the steps of the canary's slot.

    The likelihood ratios, by which the audit guesses, are those of an attacker who does not know the slots: mixtures over all.

    Args:
        sigma: noise multiplier.
        coefficients: (bands,), of the noise.
        number: n, of slots.
        included: bool (canaries,).
        scale: C / B, by which releases are divided.
    """

    def __init__(self, sigma: float, coefficients: np.ndarray, number: int, included: np.ndarray, scale: float = 1.0):
        super().__init__(std=scale)
        self.sigma, self.coefficients, self.number, self.included = sigma, coefficients, number, included
        self.statistics = [statistic for statistic in self.statistics if not isinstance(statistic, NoiseDuplicates)]
        self._products = np.zeros((len(included), number))  # <x_j, y> of each canary and slot
        self._squares = np.zeros(number)  # |x_j|^2
        self._score, self._score_variance = 0.0, 0.0  # of the clip norm
        self._slots = np.zeros(0, np.int64)

    def set_slots(self, slots: np.ndarray) -> None:
        """Say which slots the included canaries have: those of the last authors in `slots`, int (authors,)."""
        self._slots = slots[len(slots) - int(self.included.sum()) :].copy()

    def add_step(self, values: np.ndarray) -> None:
        """Add one step's row of C x + z, (canaries,)."""
        step, bands = self.steps, len(self.coefficients)
        lag = (step - self._slots) % self.number  # steps since the canary's slot
        mean = np.where((lag < bands) & (lag <= step), self.coefficients[np.minimum(lag, bands - 1)], 0.0)
        for shift, coefficient in enumerate(self.coefficients[: step + 1]):
            self._products[:, (step - shift) % self.number] += coefficient * values
            self._squares[(step - shift) % self.number] += coefficient**2
        normal = values / self.sigma
        normal[self.included] -= mean / self.sigma
        self._score += float(mean @ normal[self.included])
        self._score_variance += float(mean @ mean)
        super().add_step(normal)

    def log_likelihood_ratios(self) -> np.ndarray:
        """Return for each canary how much more likely its values are if it is included, in any slot, (canaries,)."""
        self.flush()
        return log_mean_exp((self._products - self._squares / 2) / self.sigma**2)

    def p_values(self) -> dict[str, float]:
        of_norm = normal_p_value(self._score / self._score_variance**0.5) if self._score_variance else 1.0
        return super().p_values() | {"clip norm": of_norm}

    def failure_message(self, failed: str) -> str:
        return f"gradient canaries fail a test: {failed} (after {self.steps} steps)"
