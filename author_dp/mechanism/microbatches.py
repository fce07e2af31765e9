"""Cut a step's batch into microbatches that fit in memory.

Guarantees: with `MicrobatchShape`, the shapes of all microbatches follow from options alone, and an author's rows and tokens from
the author's samples alone. Adding or removing an author then changes no other author's shapes.

Why: the kernel of a matrix product, and so the rounding of every row, follows from the product's shape, and so does the way in
which a norm is computed. Were microbatches as large as the batch happens to be, one author more or less would change the norms
and clip factors of all others: by 0.23 C together in bfloat16 for identical texts, and by 81 C in float32 where the gradients of
an author's tokens cancel (`python benchmarks/checks.py rounding`).

Not protected: the order in which float32 sums over authors are added up (docs/threat-model.md, "Rounding and shapes").

Example:

    >>> shape = make_microbatch_shape(per_device=32, accumulation=2, samples_per_author=1, sequence_len=128)
    >>> shape
    MicrobatchShape(authors=8, samples=1, lengths=(16, 24, 32, 48, 64, 96, 128))
    >>> [batch["input_ids"].shape for batch in make_microbatches(authors, 32, collate, shape)]
    [torch.Size([8, 32]), torch.Size([8, 128])]
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

from author_dp.errors import UserError
from author_dp.mechanism.sampling import AuthorBatch
from author_dp.types import IGNORE_INDEX, Batch

LENGTH_EIGHTHS = (1, 1.5, 2, 3, 4, 6, 8)  # of sequence_len: the lengths of microbatches
MIN_MICROBATCHES = 16  # a microbatch has 1/16 of the expected authors: the last one of each length is partly empty
FEWEST_AUTHORS = 8  # of a microbatch, where --per_device_train_batch_size allows: fewer keep a device waiting
MOST_AUTHORS = 256  # of a microbatch: more bring no speed
DUMMY_SAMPLE = {"input_ids": np.zeros(1, np.int32), "labels": np.full(1, IGNORE_INDEX)}  # no targets: its gradient is zero


class MicrobatchShape(NamedTuple):
    """The shape that all microbatches of a run have."""

    authors: int  # rows / samples; dummy authors without targets fill it up
    samples: int  # k; dummy samples fill up an author who has fewer
    lengths: tuple[int, ...]  # tokens, ascending: an author's microbatch has the shortest length that holds all its samples


def max_microbatch_authors(expected: int) -> int:
    """Return how many authors a microbatch has at most, if a process expects `expected` of them in a step."""
    return min(MOST_AUTHORS, max(FEWEST_AUTHORS, expected // MIN_MICROBATCHES))


def make_microbatch_shape(per_device: int, accumulation: int, samples_per_author: int, sequence_len: int) -> MicrobatchShape:
    """Return the shape of a run's microbatches, from options alone.

    The number of authors is 1 / MIN_MICROBATCHES of those expected, from FEWEST_AUTHORS to MOST_AUTHORS, and at most
    `per_device`.

    Args:
        per_device, accumulation: the batch options; their product is how many authors a process expects in a step.
        samples_per_author: k.
        sequence_len: tokens of the longest sample.
    """
    authors = min(per_device, max_microbatch_authors(per_device * accumulation))
    lengths = sorted({math.ceil(sequence_len * eighths / 8) for eighths in LENGTH_EIGHTHS})
    return MicrobatchShape(authors, samples_per_author, tuple(lengths))


class LogicalBatch(NamedTuple):
    """One step's batch on one process, cut into microbatches that fit in memory."""

    microbatches: list[Batch]
    batch_size: int  # as in AuthorBatch
    batch_index: int


class LogicalBatchDataset(torch.utils.data.Dataset):
    """Adapter for DataLoader: turn an AuthorBatch into a LogicalBatch, so that its workers fetch and pad."""

    def __init__(self, dataset, max_authors: int, collate: Callable, shape: Optional[MicrobatchShape] = None):
        self.dataset, self.max_authors, self.collate, self.shape = dataset, max_authors, collate, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: AuthorBatch) -> LogicalBatch:
        authors = self.dataset.__getitems__(batch.samples)
        microbatches = make_microbatches(authors, self.max_authors, self.collate, self.shape)
        return LogicalBatch(microbatches, batch.batch_size, batch.batch_index)


def make_microbatches(
    authors: list[list[dict[str, Any]]],
    max_authors: int,
    collate: Callable[[list], dict[str, torch.Tensor]],
    shape: Optional[MicrobatchShape] = None,
) -> list[Batch]:
    """Cut a batch into microbatches.

    Args:
        authors: the sampled texts of each author.
        max_authors: of a microbatch without `shape`; it then has authors of similar length, padded to the longest sample.
        collate: pads a list of samples to tensors of shape (samples, tokens).
        shape: of all microbatches; None without privacy.
    Returns:
        microbatches: what `collate` returns; `author`, int64 (samples,), the author of each sample within the microbatch, counted
        from 0; `num_authors`; `num_dummies`, how many of them are dummies, which come last; `samples_each`, as for `AuthorIndex`;
        `is_real`, bool (authors,), and `num_real`, which and how many authors are neither dummies nor canaries.
    Raises:
        UserError: for a sample longer than `shape` allows.
    """
    if not authors:
        return []
    if shape is not None:
        return [
            make_microbatch(group[start : start + shape.authors], collate, shape, length)
            for length, group in group_by_length(authors, shape.lengths).items()
            for start in range(0, len(group), shape.authors)
        ]
    ordered = sorted(authors, key=longest_length)
    slices = np.array_split(np.arange(len(ordered)), math.ceil(len(ordered) / max_authors))
    return [make_microbatch([ordered[i] for i in indices], collate) for indices in slices]


def longest_length(samples: list[dict[str, Any]]) -> int:
    """Return the number of tokens of an author's longest sample."""
    return max(len(sample["input_ids"]) for sample in samples)


def group_by_length(authors: list[list[dict[str, Any]]], lengths: tuple[int, ...]) -> dict[int, list[list[dict[str, Any]]]]:
    """Return the authors of each length: the shortest of `lengths` that holds all of an author's samples."""
    groups: dict[int, list[list[dict[str, Any]]]] = {length: [] for length in lengths}
    for samples in authors:
        longest = longest_length(samples)
        if longest > lengths[-1]:
            raise UserError(f"sequence_len {lengths[-1]}: a sample has {longest} tokens. Give DPTrainer the longest length.")
        groups[next(length for length in lengths if length >= longest)].append(samples)
    return groups


def make_microbatch(
    authors: list[list[dict[str, Any]]], collate: Callable, shape: Optional[MicrobatchShape] = None, length: int = 0
) -> Batch:
    """Collate the samples of these authors; with `shape`, fill up its authors and samples, and pad to `length` tokens."""
    dummies = 0 if shape is None else shape.authors - len(authors)
    if shape is not None:
        authors = [samples + [DUMMY_SAMPLE] * (shape.samples - len(samples)) for samples in [*authors, *[[]] * dummies]]
    batch = collate([sample for samples in authors for sample in samples])
    if shape is not None:
        missing = (0, length - batch["input_ids"].shape[1])
        padding = {"input_ids": 0, "labels": IGNORE_INDEX}
        batch |= {name: F.pad(batch[name], missing, value=value) for name, value in padding.items()}
    owners = np.repeat(np.arange(len(authors)), [len(samples) for samples in authors])
    batch |= {"author": torch.from_numpy(owners), "num_authors": len(authors), "num_dummies": dummies}
    real, numbers = is_real(batch), {len(samples) for samples in authors}
    # Known here, on the CPU: on a GPU each of these would cost a wait.
    known = {"is_real": real, "num_real": int(real.sum()), "samples_each": numbers.pop() if len(numbers) == 1 else None}
    return {**batch, **known}


def is_real(batch: Batch) -> torch.Tensor:
    """Return which authors of a microbatch are neither dummies nor canaries, bool (authors,)."""
    author = batch["author"]
    real = torch.arange(batch["num_authors"]) < batch["num_authors"] - batch["num_dummies"]
    if "canary" in batch:
        real &= torch.zeros(len(real)).index_add(0, author, (batch["canary"] >= 0).float()) == 0
    return real
