"""Choose authors by hashes of their values, and summarize for privacy.json which data was used.

An author's hash does not depend on which other authors exist. So adding or removing one author moves no other author between
training and evaluation. `split_by_author` has one exception.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from author_dp.data.authors import encode_authors, hash_authors, hash_to_unit
from author_dp.data.chat import resolve_bos_token
from author_dp.data.columns import get_column
from author_dp.data.storage import filter_rows, new_arrow_file
from author_dp.errors import UserError

FEW_HELD_OUT = 30  # authors; below it, the log warns
MAX_EVAL_FRACTION = 0.2  # that the log recommends


def author_hashes(authors: Sequence | pa.ChunkedArray) -> np.ndarray:
    """Return a hash of each author's value, uint64 (authors,), in the order of `group_by_author`."""
    return hash_authors(encode_authors(authors).dictionary.to_pylist(), "author:").astype(np.uint64)


def split_by_author(
    samples: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    author_column: str,
    eval_fraction: float,
    seed: int,
    train_fraction: float = 1.0,
    folder: Optional[Path] = None,
    hold_out_at_least_one: bool = True,
) -> tuple[Dataset, Optional[Dataset]]:
    """Write samples to disk as they are read, those of held-out authors to a file of their own.

    About `eval_fraction` of the authors are held out, with all their samples; `train_fraction` of the others are trained on. An
    author's side depends on the author's value and `seed` only. Adding or removing one author moves no other author between
    the sides, so neighboring data sets stay neighboring. Exception: if no author's hash is below `eval_fraction`, the author with
    the smallest hash is held out, which depends on the other authors. Without `hold_out_at_least_one`, this is an error.

    Args:
        schema: of the samples.
        folder: where texts are kept while they are used; by default `make_private_temp_dir()`.
    Returns:
        (train, evaluation); evaluation is None where `eval_fraction` is 0.
    Raises:
        UserError: where a side that is needed has no author.
    """
    train_below = math.inf if train_fraction == 1 else eval_fraction + train_fraction * (1 - eval_fraction)
    train, evaluation, scores = write_split_sides(samples, schema, folder, author_column, seed, eval_fraction, train_below)
    if len(scores) < 2:
        raise UserError(f"--author_column {author_column!r}: one author only, whom no noise can hide. Give data of many authors")
    if eval_fraction > 0 and not len(evaluation):
        if not hold_out_at_least_one:
            raise UserError(
                f"--eval_fraction {eval_fraction}: it holds out none of {len(scores)} authors. Raise it to publish their loss"
            )
        lowest, batches = np.nextafter(scores[0], 1), train.data.to_batches()
        train, evaluation, _ = write_split_sides(batches, schema, folder, author_column, seed, lowest, train_below)
    if not len(train):
        option = f"--eval_fraction {eval_fraction}" + (f" and --train_fraction {train_fraction}" if train_fraction < 1 else "")
        fix = "Raise the latter" if train_fraction < 1 else "Lower it"
        raise UserError(f"{option}: no author of {len(scores)} is left to train on. {fix}, or give more authors")
    return train, evaluation if eval_fraction > 0 else None


def write_split_sides(
    samples: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    folder: Optional[Path],
    author_column: str,
    seed: int,
    eval_below: float,
    train_below: float,
) -> tuple[Dataset, Dataset, np.ndarray]:
    """Write samples to two files, by the hash of the author; leave out those of `train_below` or more.

    Returns:
        (train, evaluation, hashes of all authors in increasing order).
    """
    all_scores = [np.zeros(0)]  # of each batch
    with new_arrow_file(schema, folder) as (train_path, train), new_arrow_file(schema, folder) as (eval_path, evaluation):
        for batch in samples:
            authors = batch.column(author_column).dictionary_encode()
            all_scores.append(holdout_split_scores(authors.dictionary.to_pylist(), seed))
            scores = all_scores[-1][authors.indices.to_numpy()]
            evaluation.write(batch.filter(scores < eval_below))
            train.write(batch.filter((scores >= eval_below) & (scores < train_below)))
    return Dataset.from_file(train_path), Dataset.from_file(eval_path), np.unique(np.concatenate(all_scores))


def subsample_split_authors(
    samples: Dataset, author_column: str, limit: int, seed: int, folder: Optional[Path] = None
) -> Dataset:
    """Return all samples of at most `limit` authors, those with the lowest hashes.

    Without one of them, one other author moves in.
    """
    values = encode_authors(get_column(samples, author_column))
    lowest = np.argsort(hash_to_unit(values.dictionary.to_pylist(), f"evaluation:{seed}:"), kind="stable")[:limit]
    return filter_rows(samples, np.isin(values.indices.to_numpy(), lowest), folder)


def limit_eval_split_texts(samples: Dataset, author_column: str, limit: int, seed: int, folder: Optional[Path] = None) -> Dataset:
    """Return all samples of authors whose hash is below a threshold: about `limit` samples.

    The threshold is one of 1, 1/2, 1/4, 1/8, ... It follows from the number of samples, so an author moves others only where
    that author's samples take the number across one of a few limits. If no author's hash is below it, the one with the smallest
    hash is returned.
    """
    # The nearest power in ratio. So the limits are irrational, and round numbers are near none.
    threshold = 2.0 ** math.floor(math.log2(limit / len(samples)) + 0.5)
    if threshold >= 1:
        return samples
    values = encode_authors(get_column(samples, author_column))
    scores = hash_to_unit(values.dictionary.to_pylist(), f"evaluation:{seed}:")
    chosen = scores < max(threshold, np.nextafter(scores.min(), 1))
    return filter_rows(samples, chosen[values.indices.to_numpy()], folder)


def describe_held_out_split(
    held_out: pa.ChunkedArray, training: pa.ChunkedArray, validation_file: bool, eval_fraction: float, limit: Optional[int]
) -> tuple[int, str]:
    """Return level and text of a line for the log about held-out authors: a warning, where they are too few.

    The numbers are exact counts of private data.

    Args:
        held_out, training: the author of each sample, from `get_column`.
        validation_file: whether they are those of a file.
        limit: --max_eval_samples.
    """
    num_authors, num_training = (pc.count_distinct(authors).as_py() for authors in (held_out, training))
    counts = f"{num_authors:,} {'author' if num_authors == 1 else 'authors'} with {len(held_out):,} texts"
    if num_authors >= FEW_HELD_OUT:
        return INFO, f"Held out for evaluation: {counts}."
    option = "--validation_file" if validation_file else f"--eval_fraction {eval_fraction:g}"
    enough, fix = min(MAX_EVAL_FRACTION, FEW_HELD_OUT / (num_authors + num_training)), "give texts of more authors"
    if limit is not None:
        option, fix = f"{option}, --max_eval_samples {limit}", "raise the latter or both"
    elif not validation_file and enough > eval_fraction:
        fix = f"raise it to about {enough:.2g}"
    return WARNING, f"{option}: only {counts} are held out, so their loss says little of others. To compare models, {fix}"


def check_author_overlap(train_authors: pa.ChunkedArray, eval_authors: pa.ChunkedArray) -> None:
    """Raise UserError where evaluation authors are training authors too: their texts are no test.

    Args:
        train_authors, eval_authors: the author of each sample, from `get_column`.
    """
    train_values, eval_values = pc.unique(train_authors), pc.unique(eval_authors)
    shared = pc.sum(pc.is_in(eval_values, value_set=train_values)).as_py()
    if shared:
        raise UserError(
            f"--validation_file: {shared:,} of its {len(eval_values):,} authors are in the training data too. Remove them from "
            "one of the files, or add --allow_shared_authors if it is intended"
        )


def data_summary(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: Optional[str],
    row_limit: Optional[int],
    train_fraction: float,
    sequence_len: int,
    prepend_bos: bool,
    append_eos: bool,
    targets: Optional[str],
    text_column: str,
    messages_column: Optional[str],
    author_column: str,
) -> dict[str, Any]:
    """Return how samples were made, for privacy.json. All of it is public.

    Args:
        dataset: name of the hub data set, if there is one; a local path is left out.
        row_limit: number of rows that were used, whoever wrote them; None: all.
        targets: "assistant" or "all" of a prompt or conversation; None for plain texts.
        text_column, messages_column, author_column: their names; without a column of messages, that of texts is used.
    """
    start = resolve_bos_token(tokenizer, prepend_bos)
    return {
        "dataset": dataset if dataset and not Path(dataset).exists() else None,
        **({"text_column": text_column} if messages_column is None else {"messages_column": messages_column}),
        "author_column": author_column,
        "row_limit": row_limit,
        "train_fraction": train_fraction,
        "sequence_len": sequence_len,
        "start_token": None if start is None else tokenizer.decode([start]),
        "end_token": tokenizer.eos_token if append_eos else None,
        **({} if targets is None else {"targets": targets}),
    }


def format_data_summary(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a `data_summary` that a reader of the log should see."""
    lines = []
    if summary["row_limit"]:
        lines.append(
            f"  rows                    first {summary['row_limit']:,}, taken as given: the guarantee covers these, not all of "
            "the data (--train_fraction selects whole authors)"
        )
    if summary["train_fraction"] < 1:
        lines.append(f"  train_fraction          {summary['train_fraction']:g} of the training authors, by a hash of each")
    if "targets" in summary:
        learned = "completions and the assistant's turns" if summary["targets"] == "assistant" else "all of each sample"
        lines.append(f"  targets                 {learned}")
    if summary["start_token"] is not None:
        lines.append(f"  start_token             {summary['start_token']!r} begins each sample")
    if summary["end_token"] is not None:
        lines.append(f"  end_token               {summary['end_token']!r} ends each sample that is not truncated")
    return lines


def holdout_split_scores(authors: list, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each author, (authors,): authors below --eval_fraction are held out."""
    return hash_to_unit(authors, f"{seed}:")


def split_id(seed: int, eval_fraction: float, author_column: str) -> str:
    """Return an ID of the rule that holds authors out. Under one ID, held-out authors are never trained on."""
    rule = f"{seed}:{eval_fraction}:{author_column}"  # another column has other values for the same people
    return hashlib.sha256(rule.encode()).hexdigest()[:16]
