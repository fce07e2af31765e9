"""Check that the processes of a run agree on data and options, on the sampled authors, and on which process clips whom.

Guarantees: a run ends on all of its processes if they start from different privacy options or different data (which samples
belong to whom, and the tokens of 1,024 samples), sample different authors in a step, assign authors to different groups, or do
not clip each sampled author exactly once. The accounted sampling and noise are those of all processes together. Each process
by itself looks correct, and so does what it releases.

How: at log lines, before checkpoints and at the end, the processes compare a hash chain of the batches so far, and sums of hashes
of the authors that each clips. The sums add up to that of the whole batch. Both are private: they are compared in memory, and
never printed.

Not found: an author clipped twice in place of another author of the same process. Tests and gradient canaries find that.

Example:

    >>> monitor = AgreementMonitor(sampler)
    >>> monitor.on_step(index=0, batch_size=12)
    >>> find_process_mismatches(gather(monitor.record(clipped=12)))  # empty if the processes agree
    []
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import gather
from author_dp.errors import UserError
from author_dp.mechanism.sampling import PoissonAuthorSampler

OPTIONS = {  # of the script, by the compared field; other fields are called like their options
    "clip_norm": "per_sample_max_grad_norm", "delta": "target_delta", "steps": "max_steps", "trained parameters": "model_name",
    "expected_batch_size": "per_device_train_batch_size",
}  # fmt: skip
HASHED_SAMPLES = 1_024  # samples whose tokens are compared: to read all tokens of a large data set would take long

# --- before training --------------------------------------------------------------------------------------


def check_processes_agree_at_start(plan: PrivacyPlan, dataset: Any, model: nn.Module, bf16: bool) -> None:
    """Raise UserError if processes have different data, options or trained parameters. Collective.

    Args:
        dataset: `data_utils.AuthorDataset`.
        bf16: whether matrix products are in bfloat16.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    fields = {**asdict(plan), "bf16": bf16, "trained parameters": shapes}
    starts = gather({"data": hash_process_data(dataset), **fields})
    if any(start["data"] != starts[0]["data"] for start in starts):
        raise UserError(
            "--train_file: processes have read different training data. Give the same files and options to all, on every machine"
        )
    if differing := [name for name in fields if any(start[name] != starts[0][name] for start in starts)]:
        option = OPTIONS.get(differing[0], differing[0])
        raise UserError(f"--{option}: processes differ in {', '.join(differing)}. Give all of them the same options")


def hash_process_data(dataset: Any) -> str:
    """Return a hash of which samples belong to whom, and of the tokens of `HASHED_SAMPLES` samples."""
    positions = np.linspace(0, len(dataset.indices) - 1, min(HASHED_SAMPLES, len(dataset.indices))).astype(np.int64)
    fetched = dataset.__getitems__([dataset.indices[position : position + 1] for position in positions])
    tokens = [{name: np.asarray(value).tolist() for name, value in sample.items()} for (sample,) in fetched]
    digest = hashlib.sha256(repr(tokens).encode())
    for array in (dataset.offsets, dataset.indices, getattr(dataset, "hashes", None)):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --- while training ---------------------------------------------------------------------------------------


class AgreementBatch(NamedTuple):
    """A batch as it was sampled."""

    digest: bytes  # of the indices of all its authors
    whole: int  # `hash_process_set` of all its authors
    share: int  # `hash_process_set` of this process' authors


@dataclass(frozen=True)
class AgreementRecord:
    """What a process knows of the steps so far. Private."""

    groups: bytes  # hash of the authors' groups
    batches: bytes = b""  # hash chain of the authors of each batch
    steps: int = 0
    sampled: int = 0  # sum of batch sizes, without canaries
    whole: int = 0  # sums over the batches of `AgreementBatch.whole` and `share`, modulo 2^64
    share: int = 0
    clipped: int = 0  # number of authors that this process has clipped


class AgreementMonitor:
    """Record the batches of one process.

    Args:
        sampler: of the training, whose `on_local_batch` is set.
    """

    def __init__(self, sampler: PoissonAuthorSampler):
        counts = np.diff(sampler.offsets)
        self._author_of = np.zeros(int(sampler.indices.max(initial=0)) + 1, np.int32)  # of each sample
        self._author_of[sampler.indices] = np.repeat(np.arange(len(counts)), counts)
        self._sampled: dict[int, AgreementBatch] = {}  # by the batch's index: the data loader is ahead of the steps
        self._record = AgreementRecord(b"" if sampler.groups is None else hashlib.sha256(sampler.groups.tobytes()).digest())
        sampler.on_local_batch = self.on_local_batch

    def on_local_batch(self, authors: np.ndarray, share: list[np.ndarray], index: int) -> None:
        """Add the authors of a batch, and the samples of each author of this process."""
        sample_authors = self._author_of[np.concatenate([np.zeros(0, np.int64), *share])]
        starts = np.cumsum([0, *map(len, share)])[:-1]
        expected = np.repeat(sample_authors[starts], [len(samples) for samples in share])
        strays = sample_authors[sample_authors != expected]  # samples of another author than the first sample's
        share_hash = hash_process_set(sample_authors[starts], index) + hash_process_set(strays, index)
        self._sampled[index] = AgreementBatch(
            hashlib.sha256(authors.tobytes()).digest(), hash_process_set(authors, index), share_hash
        )

    def on_step(self, index: int, batch_size: int) -> None:
        """Add a step, with its batch's index and number of authors, without canaries."""
        batch, old = self._sampled.pop(index), self._record
        self._record = replace(
            old,
            batches=hashlib.sha256(old.batches + index.to_bytes(8, "big") + batch.digest).digest(),
            steps=old.steps + 1,
            sampled=old.sampled + batch_size,
            whole=(old.whole + batch.whole) % 2**64,
            share=(old.share + batch.share) % 2**64,
        )

    def record(self, clipped: int) -> AgreementRecord:
        """Return the record to compare.

        Args:
            clipped: number of authors that this process has clipped so far.
        """
        return replace(self._record, clipped=clipped)


def find_process_mismatches(records: list[AgreementRecord]) -> list[str]:
    """Return the mismatches between the processes' records, in words that reveal nothing private."""
    main, found = records[0], []
    for name, words in {"steps": "number of steps", "groups": "groups of authors", "batches": "sampled authors"}.items():
        if any(getattr(record, name) != getattr(main, name) for record in records):
            found.append(f"processes differ in the {words}")
    if not found and sum(record.share for record in records) % 2**64 != main.whole:
        found.append("the processes' shares do not have each author of the batch once")
    if not found and sum(record.clipped for record in records) != main.sampled:
        found.append("the processes clipped more or fewer authors than were sampled")
    return [f"{words} (after {main.steps} steps)" for words in found]


def hash_process_set(authors: np.ndarray, index: int) -> int:
    """Return the sum of hashes of a batch's authors modulo 2^64; sums of disjoint sets add up.

    The hash, of the author and the batch's index, is the finalizer of SplitMix64 [Steele, Lea and Flood 2014]. It protects
    against bugs, not against attackers.
    """
    x = authors.astype(np.uint64) + np.uint64((index + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
