"""Check that the processes of a run agree: on data and options, on who is sampled, and on who clips whom.

Guarantees: a run ends, on all of its processes, where they started from different privacy options or different data (ownership
of all samples, tokens of 1,024 of them), sampled different authors in a step,
dealt authors to other groups, or did not clip each sampled author exactly once. The sampling and the noise that is accounted for
hold for the processes together only; each by itself looks right, and so does what it releases.

How: at log lines, before checkpoints and at the end the processes compare a chained hash of the batches so far, and sums of
hashes of their authors, which add up to that of the whole batch. Both are private; they are compared in memory, never printed.

Not found: an author clipped twice in place of another one of the same process, which tests and gradient canaries find.

Example:

    >>> check = RankCheck(sampler)
    >>> check.step(number=0, batch_size=12)
    >>> compare(gather(check.record(clipped=12)))  # what differs; empty if nothing does
    []
"""

import hashlib
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import gather
from author_dp.errors import UserError
from author_dp.mechanism.sampling import PoissonAuthorSampler

OPTIONS = {  # of the script, by what is compared
    "clip_norm": "per_sample_max_grad_norm", "delta": "target_delta", "steps": "max_steps", "trained parameters": "model_name",
    "expected_batch_size": "per_device_train_batch_size",
}  # fmt: skip
SHOWN_NAMES = 1_024  # samples whose tokens stand for all, as reading all of a large data set takes time

# --- before training --------------------------------------------------------------------------------------


def check_same_start(plan: PrivacyPlan, dataset: Any, model: nn.Module, bf16: bool) -> None:
    """Raise UserError where the processes have other data, options or trained parameters. Collective.

    Args:
        dataset: `data_utils.AuthorDataset`.
        bf16: whether products are in bfloat16.
    """
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    known = {**asdict(plan), "bf16": bf16, "trained parameters": trained}
    every = gather({"data": describe_data(dataset), **known})
    if len(every) == 1:
        return
    if any(one["data"] != every[0]["data"] for one in every):
        raise UserError(
            "--train_file: the processes have read other training data: give the same files and options to all, on every machine"
        )
    if other := [name for name in known if any(one[name] != every[0][name] for one in every)]:
        raise UserError(
            f"--{OPTIONS.get(other[0], other[0])}: the processes differ in {', '.join(other)}. Give all of them the same options"
        )


def describe_data(dataset: Any) -> str:
    """Return a hash of which samples are whose, and of the tokens of some of them."""
    places = np.linspace(0, len(dataset.indices) - 1, min(SHOWN_NAMES, len(dataset.indices))).astype(np.int64)
    fetched = dataset.__getitems__([dataset.indices[place : place + 1] for place in places])
    tokens = [{name: np.asarray(value).tolist() for name, value in sample.items()} for (sample,) in fetched]
    known = hashlib.sha256(repr(tokens).encode())
    for array in (dataset.offsets, dataset.indices, getattr(dataset, "hashes", None)):
        known.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return known.hexdigest()


# --- while training ---------------------------------------------------------------------------------------


class SampledBatch(NamedTuple):
    """A batch as it was sampled."""

    digest: bytes  # of the places of all its authors
    whole: int  # `set_hash` of them
    share: int  # of those whom this process takes


class RankRecord(NamedTuple):
    """What a process knows of the steps so far. Private."""

    batches: bytes  # a chained hash of the authors of each
    groups: bytes
    steps: int
    drawn: int  # authors, in all batches together, without canaries
    whole: int  # sums over the batches of `set_hash`, of the whole batch and of this process' share
    share: int
    clipped: int  # authors, by this process


class RankMonitor:
    """Follow the batches of one process.

    Args:
        sampler: of the training, whose `on_local_batch` is set.
    """

    def __init__(self, sampler: PoissonAuthorSampler):
        counts = np.diff(sampler.offsets)
        self._owner = np.zeros(int(sampler.indices.max(initial=0)) + 1, np.int32)  # author of each sample
        self._owner[sampler.indices] = np.repeat(np.arange(len(counts)), counts)
        self._drawn: dict[int, SampledBatch] = {}  # by number; the loader is ahead of the steps
        self._groups = b"" if sampler.groups is None else hashlib.sha256(sampler.groups.tobytes()).digest()
        self._batches, self._steps, self._authors, self._whole, self._share = b"", 0, 0, 0, 0
        sampler.on_local_batch = self.drawn

    def drawn(self, authors: np.ndarray, share: list[np.ndarray], number: int) -> None:
        """Take the authors of a batch, and the samples of those whom this process takes."""
        owners = self._owner[np.concatenate([np.zeros(0, np.int64), *share])]
        starts = np.cumsum([0, *map(len, share)])[:-1]
        mixed = owners[owners != np.repeat(owners[starts], [len(samples) for samples in share])]  # several authors as one
        digest = hashlib.sha256(authors.tobytes()).digest()
        mine = set_hash(owners[starts], number) + set_hash(mixed, number)
        self._drawn[number] = SampledBatch(digest, set_hash(authors, number), mine)

    def step(self, number: int, batch_size: int) -> None:
        """Take the number of a step's batch, and of its authors without canaries."""
        drawn = self._drawn.pop(number)
        self._batches = hashlib.sha256(self._batches + number.to_bytes(8, "big") + drawn.digest).digest()
        self._steps, self._authors = self._steps + 1, self._authors + batch_size
        self._whole, self._share = self._whole + drawn.whole, self._share + drawn.share

    def record(self, clipped: int) -> RankRecord:
        """Return what is compared.

        Args:
            clipped: authors whom this process has clipped so far.
        """
        return RankRecord(
            self._batches, self._groups, self._steps, self._authors, self._whole % 2**64, self._share % 2**64, clipped
        )


def find_mismatches(records: list[RankRecord]) -> list[str]:
    """Return what is wrong with the processes' records, in words that tell nothing private; empty if nothing is."""
    first, found = records[0], []
    for name, words in {"steps": "number of steps", "groups": "groups of authors", "batches": "sampled authors"}.items():
        if any(getattr(record, name) != getattr(first, name) for record in records):
            found.append(f"the processes differ in the {words}")
    if not found and sum(record.share for record in records) % 2**64 != first.whole:
        found.append("the shares of the processes are not the batch, each author once")
    if not found and sum(record.clipped for record in records) != first.drawn:
        found.append("not as many authors were clipped as were sampled")
    return [f"{words} (seen in {first.steps} steps)" for words in found]


def set_hash(authors: np.ndarray, number: int) -> int:
    """Return the sum, modulo 2^64, of a hash of each author in the batch of that number: those of disjoint sets add up.

    The hash is the finalizer of SplitMix64 [Steele, Lea and Flood 2014]: against bugs, not against attackers.
    """
    x = authors.astype(np.uint64) + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
