"""Choose authors by hashes of their values, and summarize for privacy.json which data was used.

An author's hash does not depend on which other authors exist. So adding or removing one author moves no other author between
training and evaluation. `assign_sides` has one exception.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from author_dp.data.authors import encode_authors, get_column, hash_authors, hash_to_unit, holdout_scores
from author_dp.data.chat import resolve_bos_token
from author_dp.data.storage import filter_rows
from author_dp.errors import UserError


def author_hashes(authors: Sequence | pa.ChunkedArray) -> np.ndarray:
    """Return a hash of each author's value, uint64 (authors,), in the order of `group_by_author`."""
    return hash_authors(encode_authors(authors).dictionary.to_pylist(), "author:").astype(np.uint64)


def assign_sides(
    authors: list, eval_fraction: float, seed: int, train_fraction: float = 1.0, hold_out_at_least_one: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out about `eval_fraction` of the authors; train on `train_fraction` of the others.

    An author's side depends on the author's value and `seed` only. Adding or removing one author moves no other author between
    the sides, so neighboring data sets stay neighboring. Exception: if no author's hash is below `eval_fraction`, the author with
    the smallest hash is held out, which depends on the other authors. Without `hold_out_at_least_one`, this is an error.

    Args:
        authors: values, each once.
    Returns:
        (trained, held_out), masks, bool (authors,).
    Raises:
        UserError: where a side that is needed has no author.
    """
    scores = holdout_scores(authors, seed)
    held_out = scores < eval_fraction
    if eval_fraction > 0 and not held_out.any():
        if not hold_out_at_least_one:
            raise UserError(
                f"--eval_fraction {eval_fraction}: it holds out none of {len(authors)} authors. Raise it to publish their loss"
            )
        held_out[np.argmin(scores)] = True
    trained = ~held_out & (scores < eval_fraction + train_fraction * (1 - eval_fraction))
    if not trained.any():
        option = f"--eval_fraction {eval_fraction}" + (f" and --train_fraction {train_fraction}" if train_fraction < 1 else "")
        fix = "Raise the latter" if train_fraction < 1 else "Lower it"
        raise UserError(f"{option}: no author of {len(authors)} is left to train on. {fix}, or give more authors")
    return trained, held_out


def subsample_authors(samples: Dataset, author_column: str, limit: int, seed: int, folder: Optional[Path] = None) -> Dataset:
    """Return all samples of at most `limit` authors, those with the lowest hashes.

    Without one of them, one other author moves in.
    """
    values = encode_authors(get_column(samples, author_column))
    lowest = np.argsort(hash_to_unit(values.dictionary.to_pylist(), f"evaluation:{seed}:"), kind="stable")[:limit]
    return filter_rows(samples, np.isin(values.indices.to_numpy(), lowest), folder)


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
) -> dict[str, Any]:
    """Return how samples were made, for privacy.json. All of it is public.

    Args:
        dataset: name of the hub data set, if there is one; a local path is left out.
        row_limit: number of rows that were used, whoever wrote them; None: all.
        targets: "assistant" or "all" of a prompt or conversation; None for plain texts.
    """
    start = resolve_bos_token(tokenizer, prepend_bos)
    return {
        "dataset": dataset if dataset and not Path(dataset).exists() else None,
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
