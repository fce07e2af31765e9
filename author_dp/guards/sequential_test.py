"""Test a run repeatedly while it trains, with one bound on the probability of a false alarm.

Guarantees: a correct run fails any of its tests with probability below `FAMILY_WISE_ERROR`. The bound holds for any number of
steps and of tests.

How: each monitor gets an equal share of that error rate. Of this share its n-th test may spend 1 / (n (n + 1)); these sum to 1.
The p-values of one test share what it may spend equally [1].

References:
    [1] Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, section 2 (Bonferroni: p-values simply add up)
"""

from scipy import stats

from author_dp.errors import MechanismError

FAMILY_WISE_ERROR = 1e-9  # probability that a correct run fails any of its tests
NUM_MONITORS = 3  # monitors that share it: noise_monitor.py, sampling_monitor.py, canary_monitor.py


class SequentialTest:
    """Hypothesis test that is repeated as steps come in.

    Attributes:
        steps: number of steps in the statistics.
        num_tests: number of tests so far.
    """

    def __init__(self) -> None:
        self.steps, self.num_tests = 0, 0

    def p_values(self) -> dict[str, float]:
        """Return the p-value of each statistic, or an upper bound on it, by name."""
        raise NotImplementedError

    def failure_message(self, failed: str) -> str:
        """Return the error message for the rejected statistics in `failed`."""
        raise NotImplementedError

    def flush(self) -> None:
        """Add buffered steps to the statistics."""

    def test(self) -> None:
        """Test all steps so far.

        Raises:
            MechanismError: if a p-value is below its threshold, or not a number.
        """
        self.flush()
        if not self.steps:
            return
        self.num_tests += 1
        p_values = self.p_values()
        threshold = FAMILY_WISE_ERROR / NUM_MONITORS / (self.num_tests * (self.num_tests + 1)) / len(p_values)
        if failed := [name for name, p_value in p_values.items() if not p_value >= threshold]:
            raise MechanismError(self.failure_message(", ".join(failed)))


def binomial_p_value(successes: int, trials: int, probability: float) -> float:
    """Return the two-sided p-value of a number of successes in independent trials."""
    null = stats.binom(trials, probability)
    return min(1.0, 2 * float(min(null.cdf(successes), null.sf(successes - 1))))
