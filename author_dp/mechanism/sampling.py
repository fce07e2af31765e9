"""Sample the authors of each step independently (Poisson sampling), and up to k samples of each.

Guarantees: under add-or-remove-one-author adjacency, one author more or less changes only whether that author is in a batch. The
others enter with the same probability, independently of that author, of each other, of other steps and of --seed. This is the
sampling of the subsampled Gaussian mechanism that `accounting` accounts for [1, Algorithm 1; 2, Algorithm 1]; with noise bands it
is the cyclic Poisson sampling of [3, Theorem 4]. Balls-in-bins sampling [4] draws once: each author's slot of an epoch.

Not protected: batches themselves are secret. Who is in a batch, and how many, is never released.

References:
    [1] Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133
    [2] McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, arXiv 1710.06963
    [3] Choquette-Choo et al. 2023, (Amplified) Banded Matrix Factorization, arXiv 2306.08153
    [4] Chua et al. 2024, Balls-and-Bins Sampling for DP-SGD, arXiv 2412.16802
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import numpy as np

from author_dp.accounting.events import cyclic_sample_rate


class AuthorBatch(NamedTuple):
    """One step's batch, as one process sees it."""

    samples: list[np.ndarray]  # the chosen sample indices of each author that this process handles
    batch_size: int  # authors in the batch of all processes, without canaries. Private: never divide a gradient by it
    batch_index: int  # of the sampler's batches, from 0


class PoissonAuthorSampler:
    """Sample the authors of each step independently, and up to k samples of each.

    Guarantee: every author is in a step's batch with probability `sample_rate`, independently of the other authors, of the other
    steps and of --seed. Empty batches are kept. The processes share `key`, so their shares of a batch are disjoint and together
    are the batch.

    Args:
        offsets, indices: samples grouped by author, from `data_utils.group_by_author`.
        sample_rate: q.
        samples_per_author: k; an author with fewer samples gives all of them.
        steps: number of batches of one iteration (an epoch); the next iteration samples new ones.
        key: 128 bits from the operating system, the same on all processes, new for each run.
        rank, world_size: which share of each batch this process handles.
        num_canaries: this many authors, the last ones, are canaries and not real authors (guards/gradient_canaries.py).
    Attributes:
        groups: int (authors,), the group of each author; None where there is one group.
        on_batch: if set, called with the authors of each batch, int (batch,); an exception ends the run.
        on_local_batch: if set, called with these authors, the samples of this process' authors, and the batch's index.
    """

    groups: Optional[np.ndarray] = None

    def __init__(
        self,
        offsets: np.ndarray,
        indices: np.ndarray,
        *,
        sample_rate: float,
        samples_per_author: int,
        steps: int,
        key: int,
        rank: int = 0,
        world_size: int = 1,
        num_canaries: int = 0,
    ):
        self.offsets, self.indices = offsets, indices
        self.num_real = len(offsets) - 1 - num_canaries
        self.on_batch: Optional[Callable[[np.ndarray], None]] = None
        self.on_local_batch: Optional[Callable[[np.ndarray, list[np.ndarray], int], None]] = None
        self.sample_rate, self.samples_per_author, self.steps = sample_rate, samples_per_author, steps
        self.batches = 0  # sampled so far
        self.rank, self.world_size = rank, world_size
        self._authors_generator = np.random.Generator(np.random.Philox(key=key))
        self._samples_generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[AuthorBatch]:
        for _ in range(self.steps):
            yield self.sample_batch()

    def sample_batch(self) -> AuthorBatch:
        """Sample a new batch, and return this process' share of it."""
        authors = self.sample_authors()
        if self.on_batch is not None:
            self.on_batch(authors)
        samples = choose_samples(
            self.offsets, self.indices, authors[self.rank :: self.world_size], self.samples_per_author, self._samples_generator
        )
        if self.on_local_batch is not None:
            self.on_local_batch(authors, samples, self.batches)
        self.batches += 1
        return AuthorBatch(samples, int((authors < self.num_real).sum()), self.batches - 1)

    def sample_authors(self) -> np.ndarray:
        """Sample the authors of a new batch, int (batch,), ascending, the same on every process."""
        return self.sample_indices(len(self.offsets) - 1)

    def sample_indices(self, size: int) -> np.ndarray:
        """Sample from range(size), each number with probability `sample_rate`, independently; return them ascending."""
        chunks, last = [], -1  # the last index sampled
        while last < size:
            # Between successes of independent trials the gaps are geometric. Sample somewhat more gaps than are expected.
            expected = (size - 1 - last) * self.sample_rate
            gaps = self._authors_generator.geometric(self.sample_rate, int(expected + 4 * math.sqrt(expected)) + 16)
            chunks.append(last + np.cumsum(np.minimum(gaps, size + 1)))
            last = chunks[-1][-1]
        sampled = np.concatenate(chunks)
        return sampled[sampled < size]


class CyclicAuthorSampler(PoissonAuthorSampler):
    """Sample from one group of authors at a time, in turn: cyclic Poisson sampling, for noise bands.

    Guarantee: batch t is of group t mod b alone. Each author of that group is in it with probability b x `sample_rate`,
    independently of all else, so an author's batches are at least b steps apart. Otherwise as PoissonAuthorSampler.

    Args:
        sample_rate: q, the mean over b steps.
        groups: int (authors,), of each author, from `assign_sampling_groups`; the same on all processes.
        bands: b, the number of groups.
        options: PoissonAuthorSampler's.
    Raises:
        UserError: for more bands than 1 / sample_rate.
        ValueError: where an author has no group.
    """

    def __init__(
        self, offsets: np.ndarray, indices: np.ndarray, *, sample_rate: float, groups: np.ndarray, bands: int, **options: Any
    ):
        if groups is None or len(groups) != len(offsets) - 1:
            raise ValueError("with noise bands every author needs a group, or all would be sampled in each step")
        super().__init__(offsets, indices, sample_rate=cyclic_sample_rate(sample_rate, bands), **options)
        self.groups = groups
        self.members = split_by_sampling_group(groups, bands)

    def sample_authors(self) -> np.ndarray:
        """Sample from the group whose turn it is."""
        members = self.members[self.batches % len(self.members)]
        return members[self.sample_indices(len(members))]


class BallsInBinsAuthorSampler(PoissonAuthorSampler):
    """Sample each author in one step of every epoch, the author's slot: balls-in-bins sampling.

    Guarantee: batch t has exactly the authors whose slot is t mod n, for n steps of an epoch. Slots are drawn once for the
    training, so an author's batches are n steps apart. Otherwise as PoissonAuthorSampler.

    Args:
        slots: int (authors,), of each author, from `assign_sampling_groups`; secret, and the same on all processes.
        options: PoissonAuthorSampler's; `steps` is n.
    Raises:
        ValueError: where an author has no slot of the epoch.
    """

    def __init__(self, offsets: np.ndarray, indices: np.ndarray, *, slots: np.ndarray, **options: Any):
        super().__init__(offsets, indices, sample_rate=1.0, **options)
        if len(slots) != len(offsets) - 1 or slots.min(initial=0) < 0 or slots.max(initial=0) >= self.steps:
            raise ValueError("every author needs a slot of the epoch, or the author would never be sampled")
        self.groups, self.members = slots, split_by_sampling_group(slots, self.steps)

    def sample_authors(self) -> np.ndarray:
        """Return all authors of the slot whose turn it is."""
        return self.members[self.batches % self.steps]


def split_by_sampling_group(groups: np.ndarray, number: int) -> list[np.ndarray]:
    """Return the authors of each of `number` groups, ascending.

    Args:
        groups: int (authors,).
    """
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, number)))


def choose_samples(
    offsets: np.ndarray, indices: np.ndarray, authors: np.ndarray, max_samples: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Choose up to k samples of each author, uniformly and without replacement.

    Guarantee: an author's samples depend on that author's data and on the generator alone.

    Args:
        offsets, indices: samples grouped by author, from `data_utils.group_by_author`.
        authors: int (authors,), whose samples to choose.
        max_samples: k.
    Returns:
        for each author min(k, all) sample indices.
    """
    sizes = offsets[authors + 1] - offsets[authors]
    owners = np.repeat(np.arange(len(authors)), sizes)
    starts = np.cumsum(sizes) - sizes
    # Shuffle the samples within each author; the first k are chosen.
    order = np.lexsort((generator.random(len(owners)), owners))
    chosen = np.arange(len(owners)) - starts[owners] < max_samples
    samples = indices[(offsets[authors][owners] + order - starts[owners])[chosen]]
    return np.split(samples, np.cumsum(np.minimum(sizes, max_samples))[:-1]) if len(authors) else []


def assign_sampling_groups(hashes: np.ndarray, bands: int, key: bytes) -> np.ndarray:
    """Assign each author to one of `bands` groups, uniformly at random; return int64 (authors,).

    Guarantee: a group depends on the author and the key alone. Adding or removing an author moves no other author.

    Args:
        hashes: uint64 (authors,), of each author's value (`data.splits.author_hashes`).
        key: secret bits, the same on all processes, new for each training.
    """
    if bands == 1:
        return np.zeros(len(hashes), np.int64)
    digests = (hashlib.blake2b(int(value).to_bytes(8, "big"), key=key, digest_size=8).digest() for value in hashes)
    return (np.frombuffer(b"".join(digests), dtype=">u8") % np.uint64(bands)).astype(np.int64)


def append_canary_sampling_hashes(hashes: Optional[np.ndarray], num_canaries: int) -> Optional[np.ndarray]:
    """Append hashes for canaries. They have no author value, so their index is used."""
    return None if hashes is None else np.concatenate([hashes, np.arange(num_canaries, dtype=np.uint64)])


def without_groups(sampler: PoissonAuthorSampler) -> Callable[[], np.ndarray]:
    """Return the function that samples authors as one group; secret groups would hide that two samplers are seeded alike."""
    return lambda: sampler.sample_indices(len(sampler.offsets) - 1)


def sampler_groups(sampler: PoissonAuthorSampler) -> np.ndarray:
    """Return the group of each author, with several groups."""
    assert sampler.groups is not None
    return sampler.groups
