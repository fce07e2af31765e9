"""Check before training that neither noise nor sampling follows a seed.

Guarantees: training starts only if noise, random numbers inside the model, sampled authors and their groups differ between two
generators that are made from one state of every global generator.

Why: statistics do not show who can predict the noise. Noise from --seed passes every test of its distribution, and anyone with
the seed can subtract it.

Not found: values that are predictable by other means than a seed.

Example:

    >>> check_unseeded(lambda: GaussianNoise(device).add_(torch.zeros(PROBE_SIZE), 1.0), "noise")
"""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from author_dp.errors import MechanismError

SEEDS = "the seed of torch, numpy or random"
MAX_CHANCE = 1e-12  # probability at most that two correct samplers, or two group assignments, coincide by chance
MAX_BATCHES = 2**14  # batches compared at most


def check_unseeded(sample: Callable[[], torch.Tensor], subject: str) -> None:
    """Raise MechanismError if two new random sources are correlated under the same seeds.

    Args:
        sample: makes a new source and returns its first numbers, flat.
        subject: of the error message.
    """
    first, second = (numbers.cpu().double() for numbers in replay_global_rng(sample))
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    if not abs(correlation) < 10 / len(first) ** 0.5:  # also if it is nan
        raise MechanismError(f"{subject} follows {SEEDS}: anyone who knows --seed can predict it")


def check_unseeded_sampling(make_sample: Callable[[], Callable[[], np.ndarray]], num_authors: int, sample_rate: float) -> None:
    """Raise MechanismError if two new samplers return the same authors under the same seeds.

    Args:
        make_sample: makes a sampler as the run does, and returns its function that samples authors.
        num_authors: number of authors to sample from.
        sample_rate: probability of each author.
    """
    # Two correct samplers agree on one author in one batch with this probability.
    agreement = sample_rate**2 + (1 - sample_rate) ** 2
    batches = math.ceil(math.log(MAX_CHANCE) / (num_authors * math.log(agreement))) if agreement < 1 else MAX_BATCHES + 1
    if batches > MAX_BATCHES:  # if every author is in every batch, or hardly any ever is, correct samplers agree too
        return

    def sample() -> list[list[int]]:
        sample_authors = make_sample()
        return [sample_authors().tolist() for _ in range(batches)]

    first, second = replay_global_rng(sample)
    if first == second:
        raise MechanismError(f"sampling follows {SEEDS}: anyone who knows --seed knows which authors are in which step")


def check_unseeded_groups(make_groups: Callable[[], np.ndarray], bands: int) -> None:
    """Raise MechanismError if authors get the same groups twice under the same seeds.

    With so few authors that two correct assignments may coincide, nothing is checked.
    """
    first, second = replay_global_rng(make_groups)
    if -len(first) * math.log(bands) < math.log(MAX_CHANCE) and (first == second).all():
        raise MechanismError(f"group assignment follows {SEEDS}, or is always the same")


def replay_global_rng(function: Callable[[], Any]) -> list[Any]:
    """Return the results of two calls from the same state of every global generator. Restores the generators."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    results = []
    # All devices, as torch.manual_seed seeds them all; by default torch would warn of several.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for _ in range(2):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            results.append(function())
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    return results
