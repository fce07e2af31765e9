"""A run that checks its own draws: are authors sampled as the accountant assumes, each at rate q, independently, every time?

Promise: a run is stopped that draws too many authors or too few, skips empty draws, deals authors out in turn as shuffled batches
do, draws one of them always, or repeats a draw; also one whose draws follow --seed. A run that samples rightly is stopped with
probability below `FALSE_ALARM / CHECKS`.

How: the places of the drawn authors, and how many of them each step takes, against the binomial distribution, exactly. They
depend on chance and the number of authors only, never on texts or gradients, so neither the check nor its stop tells anything
about anybody.

Not found: an author beyond the first `WATCHED` who is always in, and samples that are chosen wrongly within an author.

Example:

    >>> check = DrawCheck(authors=20_000, canaries=0, sample_rate=0.01)
    >>> sampler.on_batch = check.drawn  # a PoissonAuthorSampler
    >>> check.taken(batch_size)  # in each step
    >>> check.test()  # at log lines and at the end
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from author_dp.errors import MechanismError
from author_dp.guards.noise_monitor import SequentialTest, replay_global_rng

WATCHED_AUTHORS = 2**20  # authors, the first ones, whose draws are counted one by one
UNLIKELY, MOST_DRAWS = 1e-12, 2**14


class SamplingMonitor(SequentialTest):
    """Count draws and test them.

    Args:
        authors: in the training data, canaries included.
        canaries: so many, the last of them, are not among what a step takes.
        sample_rate: q.
    """

    def __init__(self, authors: int, canaries: int, sample_rate: float):
        super().__init__()
        self.authors, self.real, self.rate = authors, authors - canaries, sample_rate
        self.draws = self.total = 0
        self.times = np.zeros(min(authors, WATCHED_AUTHORS), np.int32)  # that each of the first authors was drawn
        self.taken_in_all = self.empty = 0
        self.before, self.both = 0, 0  # authors of the first draw of each pair, and who of them is in the second too
        self._first = np.zeros(0, np.int64)

    def drawn(self, authors: np.ndarray) -> None:
        """Take the places of the authors of a global draw, ascending."""
        self.draws, self.total = self.draws + 1, self.total + len(authors)
        self.times[authors[: np.searchsorted(authors, len(self.times))]] += 1
        if self.draws % 2:  # pairs that share no draw, so that what is counted is binomial
            self._first = authors
        else:
            self.before += len(self._first)
            self.both += len(np.intersect1d(self._first, authors, assume_unique=True))

    def taken(self, batch_size: int) -> None:
        """Take how many real authors are in the draw of a step."""
        self.steps += 1
        self.taken_in_all, self.empty = self.taken_in_all + batch_size, self.empty + (batch_size == 0)

    def p_values(self) -> dict[str, float]:
        q, watched = self.rate, len(self.times)
        of_one = stats.binom(self.draws, q)
        rarest, most = of_one.cdf(self.times.min()), of_one.sf(self.times.max() - 1)
        return {
            "how many authors are drawn": binomial_p_value(self.total, self.authors * self.draws, q),
            "how many authors a step takes": binomial_p_value(self.taken_in_all, self.real * self.steps, q),
            "how many draws are empty": binomial_p_value(
                self.empty, self.steps, math.exp(self.real * math.log1p(-q)) if q < 1 else 0.0
            ),
            "how many authors were never drawn": binomial_p_value(int((self.times == 0).sum()), watched, (1 - q) ** self.draws),
            "how often one author is drawn": min(1.0, 2 * watched * float(min(rarest, most))),
            "how many authors are in two draws in a row": binomial_p_value(self.both, self.before, q),
        }

    def failure_message(self, failed: str) -> str:
        return f"authors are not drawn as promised: {failed} (seen in {self.steps} steps)"


class CyclicSamplingMonitor(SequentialTest):
    """The same where groups take turns (bands.py): each group's draws are checked by themselves, and whose turn it is.

    Args:
        groups: int (authors,), of each author, canaries last.
        bands: number of groups.
        canaries: so many, the last of them, are not among what a step takes.
        sample_rate: of an author in the draws of the own group.
    """

    def __init__(self, groups: np.ndarray, bands: int, canaries: int, sample_rate: float):
        super().__init__()
        self.groups, self.places = groups, np.zeros(len(groups), np.int64)  # of an author among those of the group
        self.parts = []
        for group in range(bands):
            members = np.flatnonzero(groups == group)
            self.places[members] = np.arange(len(members))
            self.parts.append(SamplingMonitor(len(members), int((members >= len(groups) - canaries).sum()), sample_rate))
        self.draws, self.strangers = 0, 0

    def drawn(self, authors: np.ndarray) -> None:
        """Take the places of the authors of a global draw, ascending."""
        group = self.draws % len(self.parts)
        own = self.groups[authors] == group
        self.strangers += int((~own).sum())
        self.parts[group].drawn(self.places[authors[own]])
        self.draws += 1

    def taken(self, batch_size: int) -> None:
        """Take how many real authors are in the draw of a step."""
        self.parts[self.steps % len(self.parts)].taken(batch_size)
        self.steps += 1

    def p_values(self) -> dict[str, float]:
        number, authors = len(self.parts), len(self.groups)
        sizes = min(binomial_p_value(part.authors, authors, 1 / number) for part in self.parts)
        found = {"authors of another group than the step's": 0.0 if self.strangers else 1.0, "sizes of groups": number * sizes}
        for part in self.parts:
            for name, p_value in part.p_values().items() if part.authors else ():
                found[name] = min(found.get(name, 1.0), number * p_value)
        return found

    def failure_message(self, failed: str) -> str:
        return f"authors are not drawn as promised, by groups in turn: {failed} (seen in {self.steps} steps)"


def binomial_p_value(found: int, trials: int, probability: float) -> float:
    """Return the two-sided probability of `found` or a number as odd of so many independent trials."""
    law = stats.binom(trials, probability)
    return min(1.0, 2 * float(min(law.cdf(found), law.sf(found - 1))))


def check_unseeded_sampling(make_draw: Callable[[], Callable[[], np.ndarray]], authors: int, sample_rate: float) -> None:
    """Raise MechanismError where two samplers, made from one state of every global generator, draw the same authors.

    Args:
        make_draw: makes a sampler as the run does, and returns what draws authors from it.
        authors, sample_rate: how many are drawn from, each with this probability.
    """
    # Two honest samplers agree on one author with this probability, in one draw.
    agree = sample_rate**2 + (1 - sample_rate) ** 2
    draws = math.ceil(math.log(UNLIKELY) / (authors * math.log(agree))) if agree < 1 else MOST_DRAWS + 1
    if draws > MOST_DRAWS:  # with everybody in every draw, or hardly anybody ever, there is nothing to tell
        return

    def draw() -> list[list[int]]:
        one = make_draw()
        return [one().tolist() for _ in range(draws)]

    first, second = replay_global_rng(draw)
    if first == second:
        raise MechanismError(
            "the draws follow the seed of torch, numpy or random: whoever knows --seed knows who is in which step"
        )


def check_unseeded_groups(make_groups: Callable[[], np.ndarray], bands: int) -> None:
    """Raise MechanismError where authors are dealt alike from one state of all global generators, if enough are there to tell."""
    first, second = replay_global_rng(make_groups)
    if -len(first) * math.log(bands) < math.log(UNLIKELY) and (first == second).all():
        raise MechanismError("the groups of authors follow the seed of torch, numpy or random, or are always the same")
