"""Bound epsilon from below by guessing which canaries were in the data, from one training run.

Guarantees: with probability `CONFIDENCE`, a run's true epsilon is at least the lower bound, for any model and data [1, Theorem
5.2]; its mu is at least the bound of [2], if it is mu-GDP for some mu. A lower bound above the accounted epsilon shows that the
guarantee does not hold. One below it proves nothing: most leaks are weaker than m canaries can show.

Example:

    >>> one_run_lower_bound(scores, included, delta=1e-5)
    {'method': ..., 'confidence': 0.95, 'canaries': 1000, 'epsilon_lower_bound': 1.02, 'guesses': 250, 'correct': 197}

References:
    [1] Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, arXiv 2305.08846
    [2] Mahloujifar, Melis and Chaudhuri 2024, Auditing f-Differential Privacy in One Run, arXiv 2410.22235, algorithm 3
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import ndtr, ndtri

CONFIDENCE = 0.95
GUESS_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the canaries; each is a test of its own, so 1 - CONFIDENCE is divided among them


def one_run_lower_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> dict[str, Any]:
    """Return the best lower bound on epsilon over `GUESS_SHARES`, as in privacy.json.

    Args:
        scores: (canaries,), higher for canaries that look included.
        included: bool (canaries,), whether they were.
    """
    best = {"epsilon_lower_bound": 0.0, "guesses": 0, "correct": 0}
    for guesses, correct in guess_counts(scores, included):
        bound = epsilon_lower_bound(len(scores), guesses, correct, delta, 1 - (1 - CONFIDENCE) / len(GUESS_SHARES))
        if bound >= best["epsilon_lower_bound"]:
            best = {"epsilon_lower_bound": bound, "guesses": guesses, "correct": correct}
    return {"method": "one run (Steinke, Nasr and Jagielski 2023)", "confidence": CONFIDENCE, "canaries": len(scores), **best}


def guess_counts(scores: np.ndarray, included: np.ndarray) -> list[tuple[int, int]]:
    """Return the numbers of guesses and of correct ones for each of `GUESS_SHARES`.

    The canaries with the highest scores are guessed to be included, as many with the lowest to be excluded.
    """
    order, counts = np.argsort(scores, kind="stable"), []
    for share in GUESS_SHARES:
        half = int(len(scores) * share / 2)
        correct = included[order[len(order) - half :]].sum() + (~included[order[:half]]).sum()
        counts.append((2 * half, int(correct)))
    return counts


def largest_rejected(rejects: Callable[[float], bool], limit: float) -> float:
    """Return the largest value from 0 to `limit` that is rejected, to 1e-4 below; 0 if none is."""
    low, high = 0.0, limit
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if rejects(middle) else (low, middle)
    return low


# --- (epsilon, delta)-DP [1] --------------------------------------------------------------------------------


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that this many correct guesses reject; 0 if they reject none."""
    epsilon = largest_rejected(lambda e: one_run_p_value(canaries, guesses, correct, e, delta) <= 1 - confidence, 64.0)
    return round(epsilon, 4)


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability of at least `correct` correct guesses if the run is (epsilon, delta)-DP [1, Theorem 5.2].

    P[W >= v] <= beta + 2 m delta alpha, for B binomial with r trials of probability e^epsilon / (1 + e^epsilon):
    beta = P[B >= v], alpha = max over i of P[v > B >= v - i] / i.

    Args:
        canaries, guesses, correct: m, r, v.
    """
    binomial = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    within = np.cumsum(binomial.pmf(np.arange(correct - 1, -1, -1)))  # P[v > B >= v - i] for i = 1, 2, ...
    alpha = (within / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, binomial.sf(correct - 1) + 2 * canaries * delta * alpha))


# --- mu-GDP [2] ---------------------------------------------------------------------------------------------


def gaussian_mu_lower_bound(scores: np.ndarray, included: np.ndarray) -> float:
    """Return the largest mu for which mu-GDP is rejected over `GUESS_SHARES`, with CONFIDENCE; 0 if none is."""
    level = (1 - CONFIDENCE) / len(GUESS_SHARES)
    return max(
        largest_rejected(partial(one_run_rejects_mu, canaries=len(scores), guesses=guesses, correct=correct, level=level), 40.0)
        for guesses, correct in guess_counts(scores, included)
    )


def one_run_rejects_mu(mu: float, canaries: int, guesses: int, correct: int, level: float) -> bool:
    """Whether `correct` of `guesses` have probability below `level` if the run is mu-GDP. Algorithm 3 of [2].

    With p_j the probability of j correct guesses, r_i = sum_{j >= i} j p_j / m is the probability that a random canary is
    guessed correctly while i or more guesses are correct, and h_i = sum_{j >= i} (guesses - j) p_j / m that it is guessed
    wrongly. Flipping its coin turns a correct guess among i + 1 into a wrong one among i, so r_{i+1} <= 1 - f(h_i). If
    `correct` or more had probability `level`, r_0 + h_0 would exceed guesses / m, which it equals.
    """
    right, wrong = level * correct / canaries, level * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right, wrong = right + i / (guesses - i) * (least - wrong), least
        if right + wrong > guesses / canaries:
            return True
    return False


def format_one_run_audit(audit: dict[str, Any]) -> str:
    """Return epsilon's bounds for the run's last line."""
    bounds = f"at least {audit['epsilon_lower_bound']:.2f}"
    if None not in (between := audit.get("epsilon_between", [None])):
        bounds += f", and between {between[0]:.2f} and {between[1]:.2f} from the measured noise"
    return bounds
