"""Check while a run trains that each author is sampled at rate q, independently, in every step.

Guarantees: a run is stopped with `MechanismError` if it samples too many or too few authors, skips empty batches, takes authors
in turn as shuffled batches do, always samples one author, or repeats a batch. A run that samples correctly is stopped with
probability below `FAMILY_WISE_ERROR / NUM_MONITORS`. (seed_checks.py refuses sampling that follows --seed.)

How: exact binomial tests of the sampled authors' indices, and of the number of authors in each step. Both depend on chance and
on the number of authors only, never on texts or gradients. So neither the monitor nor a stop reveals anything about any author.

Not found: an author beyond the first `MAX_WATCHED_AUTHORS` who is always sampled, and wrong sampling of an author's texts.

Example:

    >>> monitor = SamplingMonitor(num_authors=20_000, num_canaries=0, sample_rate=0.01)
    >>> sampler.on_batch = monitor.on_sample
    >>> monitor.on_step(batch_size)  # in each step
    >>> monitor.test()  # at log lines and at the end
"""

import math

import numpy as np
from scipy import stats

from author_dp.guards.sequential_test import SequentialTest, binomial_p_value

MAX_WATCHED_AUTHORS = 2**20  # authors, the first ones, whose samplings are counted for each


class SamplingMonitor(SequentialTest):
    """Test Poisson sampling.

    Args:
        num_authors: number of authors in the training data, with canaries.
        num_canaries: number of canaries, the last authors; a step's batch size excludes them.
        sample_rate: q.
    """

    def __init__(self, num_authors: int, num_canaries: int, sample_rate: float):
        super().__init__()
        self.num_authors, self.num_real, self.sample_rate = num_authors, num_authors - num_canaries, sample_rate
        self.batches, self.sampled = 0, 0  # number of batches; sum of their sizes, with canaries
        self.times_sampled = np.zeros(min(num_authors, MAX_WATCHED_AUTHORS), np.int32)  # of each watched author
        self.real_sampled, self.empty = 0, 0  # over the steps: sum of batch sizes; number of empty batches
        self.pair_first, self.pair_both = 0, 0  # over disjoint pairs of consecutive batches: size of the first; of the overlap
        self._first = np.zeros(0, np.int64)  # of the current pair

    def on_sample(self, authors: np.ndarray) -> None:
        """Add the authors of a batch over all processes, their indices ascending."""
        self.batches, self.sampled = self.batches + 1, self.sampled + len(authors)
        self.times_sampled[authors[: np.searchsorted(authors, len(self.times_sampled))]] += 1
        if self.batches % 2:  # pairs share no batch, so that the overlap is binomial
            self._first = authors
        else:
            self.pair_first += len(self._first)
            self.pair_both += len(np.intersect1d(self._first, authors, assume_unique=True))

    def on_step(self, batch_size: int) -> None:
        """Add a step, with the number of authors in its batch, without canaries."""
        self.steps += 1
        self.real_sampled, self.empty = self.real_sampled + batch_size, self.empty + (batch_size == 0)

    def p_values(self) -> dict[str, float]:
        q, watched = self.sample_rate, len(self.times_sampled)
        null = stats.binom(self.batches, q)  # of the times that one author is sampled
        least, most = null.cdf(self.times_sampled.min()), null.sf(self.times_sampled.max() - 1)
        empty_rate = math.exp(self.num_real * math.log1p(-q)) if q < 1 else 0.0
        never = int((self.times_sampled == 0).sum())
        return {
            "number of sampled authors": binomial_p_value(self.sampled, self.num_authors * self.batches, q),
            "batch size": binomial_p_value(self.real_sampled, self.num_real * self.steps, q),
            "number of empty batches": binomial_p_value(self.empty, self.steps, empty_rate),
            "number of authors never sampled": binomial_p_value(never, watched, (1 - q) ** self.batches),
            "frequency of one author": min(1.0, 2 * watched * float(min(least, most))),
            "overlap of consecutive batches": binomial_p_value(self.pair_both, self.pair_first, q),
        }

    def failure_message(self, failed: str) -> str:
        return f"sampling of authors fails a test: {failed} (after {self.steps} steps)"


class CyclicSamplingMonitor(SequentialTest):
    """Test cyclic Poisson sampling, for noise bands: whose turn it is, and each group's sampling separately.

    Args:
        groups: int (authors,), the group of each author, canaries last.
        bands: number of groups.
        num_canaries: number of canaries, the last authors; a step's batch size excludes them.
        sample_rate: of an author in batches of the author's group.
    """

    def __init__(self, groups: np.ndarray, bands: int, num_canaries: int, sample_rate: float):
        super().__init__()
        self.groups, self.index_in_group = groups, np.zeros(len(groups), np.int64)
        self.monitors = []
        for group in range(bands):
            members = np.flatnonzero(groups == group)
            self.index_in_group[members] = np.arange(len(members))
            canaries = int((members >= len(groups) - num_canaries).sum())
            self.monitors.append(SamplingMonitor(len(members), canaries, sample_rate))
        self.batches, self.wrong_group = 0, 0

    def on_sample(self, authors: np.ndarray) -> None:
        """Add the authors of a batch over all processes, their indices ascending."""
        group = self.batches % len(self.monitors)
        in_group = self.groups[authors] == group
        self.wrong_group += int((~in_group).sum())
        self.monitors[group].on_sample(self.index_in_group[authors[in_group]])
        self.batches += 1

    def on_step(self, batch_size: int) -> None:
        """Add a step, with the number of authors in its batch, without canaries."""
        self.monitors[self.steps % len(self.monitors)].on_step(batch_size)
        self.steps += 1

    def p_values(self) -> dict[str, float]:
        bands, authors = len(self.monitors), len(self.groups)
        sizes = min(binomial_p_value(monitor.num_authors, authors, 1 / bands) for monitor in self.monitors)
        found = {"authors of another group than the step's": 0.0 if self.wrong_group else 1.0, "group sizes": bands * sizes}
        for monitor in self.monitors:
            for name, p_value in monitor.p_values().items() if monitor.num_authors else ():
                found[name] = min(found.get(name, 1.0), bands * p_value)
        return found

    def failure_message(self, failed: str) -> str:
        return f"cyclic sampling of authors fails a test: {failed} (after {self.steps} steps)"
