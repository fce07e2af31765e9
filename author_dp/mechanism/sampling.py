"""Poisson sampling of authors, and of each sampled author's texts."""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import numpy as np

from author_dp.accounting.accountant import cyclic_sample_rate


class AuthorBatch(NamedTuple):
    """One step's batch, as one process sees it."""

    samples: list[np.ndarray]  # of each author in this process' share: the indices of the drawn samples
    batch_size: int  # authors in the whole draw, but for canaries. Private: never divide a gradient by it
    number: int  # of the sampler's draws, from 0


class PoissonAuthorSampler:
    """Draw the authors of each step, independently, and some samples of each.

    Guarantee: every author is in a step's draw with probability `sample_rate`, independently of the other
    authors, of the other steps and of --seed; empty draws are kept. With `groups`, draw t is of group t mod b alone, each author
    of it with probability b x `sample_rate`. This is the sampling that the accountant
    assumes. The processes share the key of the draw, so their shares are disjoint and together the whole draw.

    Args:
        offsets, indices: samples grouped by author, from `data_utils.group_by_author`.
        sample_rate: q.
        samples_per_author: k; an author with fewer samples gives them all.
        steps: number of draws of one iteration (an epoch); the next iteration goes on drawing afresh.
        key: 128 bits from the operating system, the same on all processes, new for each run.
        rank, world_size: which share of the draw is this process'.
        canaries: so many authors, the last ones, are no real ones (gradient_audit.py).
        groups: int (authors,), of each author, from `bands.deal`; the same on all processes. None: one group.
        bands: b, the number of groups.
    Attributes:
        on_draw: if set, called with each global draw, the places of its authors; an exception ends the run.
        on_share: if set, called with these, with the samples of this process' authors, and with the draw's number.
    Raises:
        UserError: for more bands than 1 / sample_rate.
        ValueError: for bands without groups.
    """

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
        canaries: int = 0,
        groups: Optional[np.ndarray] = None,
        bands: int = 1,
    ):
        if bands > 1 and (groups is None or len(groups) != len(offsets) - 1):
            raise ValueError("with several bands every author needs a group: all would be drawn in each step")
        self.offsets, self.indices = offsets, indices
        self.real = len(offsets) - 1 - canaries
        self.on_draw: Optional[Callable[[np.ndarray], None]] = None
        self.on_share: Optional[Callable[[np.ndarray, list[np.ndarray], int], None]] = None
        self.rate = cyclic_sample_rate(sample_rate, bands)  # of the authors of one group
        self.groups = groups
        self.members = None if groups is None else [np.flatnonzero(groups == group) for group in range(bands)]
        self.draws = 0
        self.samples_per_author = samples_per_author
        self.steps = steps
        self.rank, self.world_size = rank, world_size
        self._authors_generator = np.random.Generator(np.random.Philox(key=key))
        self._samples_generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[AuthorBatch]:
        for _ in range(self.steps):
            yield self.draw()

    def draw(self) -> AuthorBatch:
        """Return the share of this process in a new draw."""
        authors = self.draw_authors()
        if self.on_draw is not None:
            self.on_draw(authors)
        share = self.draw_samples(authors[self.rank :: self.world_size])
        if self.on_share is not None:
            self.on_share(authors, share, self.draws)
        self.draws += 1
        return AuthorBatch(share, int((authors < self.real).sum()), self.draws - 1)

    def draw_authors(self) -> np.ndarray:
        """Return the authors of a new global draw, the same on every process."""
        if self.members is None:
            return self.sample_indices(len(self.offsets) - 1)
        members = self.members[self.draws % len(self.members)]
        return members[self.sample_indices(len(members))]

    def sample_indices(self, number: int) -> np.ndarray:
        """Return which of so many are in, each with probability `rate`, ascending."""
        drawn = []
        last = -1  # the last one drawn
        while last < number:
            # Of independent draws the gaps between those that are in are geometric; somewhat more of them than are expected.
            expected = (number - 1 - last) * self.rate
            gaps = self._authors_generator.geometric(self.rate, int(expected + 4 * math.sqrt(expected)) + 16)
            places = last + np.cumsum(np.minimum(gaps, number + 1))
            drawn.append(places)
            last = places[-1]
        places = np.concatenate(drawn)
        return places[places < number]

    def draw_samples(self, authors: np.ndarray) -> list[np.ndarray]:
        """Return for each author min(k, all) sample indices, uniformly and without replacement."""
        counts = self.offsets[authors + 1] - self.offsets[authors]
        owners = np.repeat(np.arange(len(authors)), counts)
        starts = np.cumsum(counts) - counts
        # A random order within each author; its first k are the draw.
        order = np.lexsort((self._samples_generator.random(len(owners)), owners))
        place = np.arange(len(owners)) - starts[owners]
        chosen = place < self.samples_per_author
        samples = self.indices[(self.offsets[authors][owners] + order - starts[owners])[chosen]]
        taken = np.minimum(counts, self.samples_per_author)
        return np.split(samples, np.cumsum(taken)[:-1]) if len(authors) else []


def assign_groups(hashes: np.ndarray, bands: int, key: bytes) -> np.ndarray:
    """Return the group of each author, int64 (authors,), each of `bands` as likely; it follows from the author and the key alone.

    Args:
        hashes: uint64 (authors,), of each author's value (`data_utils.author_hashes`).
        key: secret bits, the same on all processes, new for each training.
    """
    if bands == 1:
        return np.zeros(len(hashes), np.int64)
    digests = (hashlib.blake2b(int(one).to_bytes(8, "big"), key=key, digest_size=8).digest() for one in hashes)
    return (np.frombuffer(b"".join(digests), dtype=">u8") % np.uint64(bands)).astype(np.int64)


def append_canary_hashes(hashes: Optional[np.ndarray], canaries: int) -> Optional[np.ndarray]:
    """Return the hashes with those of so many further authors, who have no value: their places from the end."""
    return None if hashes is None else np.concatenate([hashes, np.arange(canaries, dtype=np.uint64)])
