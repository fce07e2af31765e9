"""Samples and their authors: load, split by author, tokenize, group, collate.

Promise: a row never silently changes who its author is. Authors are the texts that stand in the files (data/readers.py), and
are compared exactly (" alice" and "alice" are two authors); a missing author is an error, and no author is on both sides of the
split. This module knows nothing of privacy; `dp_utils.py` consumes what it returns.

Example:

    >>> samples = load_files("--train_file", ["comments.jsonl"], text_column="body", author_column="user")
    >>> train, evaluation = split_by_author(samples, "user", eval_fraction=0.02, seed=42)
    >>> train = tokenize(train, tokenizer, text_column="body", sequence_len=128)
    >>> dataset = AuthorDataset(train, *group_by_author(column_of(train, "user")))
    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])["labels"]
    tensor([[   5,    6,    7],
            [   8,    9, -100]])
"""

import glob
import os
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from author_dp.data.authors import (
    encode_authors,
    get_column,
    hash_authors,
    hash_to_unit,
    holdout_scores,
    split_id,
    suspicious_author_warnings,
)
from author_dp.data.chat import TARGETS, ChatFormatter, resolve_bos_token
from author_dp.data.hub import read_hub
from author_dp.data.readers import FORMATS, ColumnSpec, read_files, split_suffix
from author_dp.data.storage import exit_on_sigterm, filter_rows, temp_dirs, write_arrow
from author_dp.data.tokenization import tokenize
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.types import IGNORE_INDEX

# A child of transformers' own logger, so that its handler and --log_level hold here too.
logger = logging.get_logger(f"transformers.{__name__}")

DEFAULT_DATASET = "webis/tldr-17"
DEFAULT_DATASET_SAMPLES = 500_000


@dataclass
class DataArguments:
    """What to train on. Without a data option: the first 500,000 samples of webis/tldr-17 (Reddit)."""

    dataset_name: Optional[str] = field(
        default=None, metadata={"help": f"Hub data set, or a local folder laid out like one. Default: {DEFAULT_DATASET}."}
    )
    dataset_config_name: str = field(default="default", metadata={"help": "Configuration of the hub data set."})
    dataset_revision: str = field(
        default="refs/convert/parquet",
        metadata={"help": "Revision of the hub data set that holds its Parquet files, by default the hub's conversion."},
    )
    train_file: Optional[list[str]] = field(
        default=None, metadata={"help": "Own data: .jsonl, .json, .csv or .parquet, also .gz or .zst; several files or a glob."}
    )
    validation_file: Optional[list[str]] = field(
        default=None, metadata={"help": "Evaluation data of the same form. Default: held-out authors of the training data."}
    )
    text_column: str = field(default="content", metadata={"help": "Column of the text."})
    author_column: str = field(default="author", metadata={"help": "Column of the author, the privacy unit."})
    prompt_column: Optional[str] = field(
        default=None, metadata={"help": "Column of what comes before the text: context, which is not learned."}
    )
    messages_column: Optional[str] = field(
        default=None, metadata={"help": "Column of conversations, lists of {role, content}, instead of --text_column."}
    )
    targets: str = field(
        default="assistant",
        metadata={
            "help": "What of a prompt or conversation is learned: completions and the assistant's turns, or all.",
            "choices": list(TARGETS),
        },
    )
    chat_template: Optional[str] = field(
        default=None, metadata={"help": "File of a chat template, for a tokenizer that has none; saved with the model."}
    )
    sequence_len: int = field(default=128, metadata={"help": "Tokens per sample; longer samples are cut."})
    prepend_bos: bool = field(
        default=False,
        metadata={
            "help": "Begin each text by the tokenizer's start (or end-of-text) token where the tokenizer itself does not, so "
            "that a generator learns how texts begin."
        },
    )
    append_eos: bool = field(
        default=False,
        metadata={"help": "End each text by the tokenizer's end-of-text token, so that a generator learns to stop."},
    )
    long_samples: str = field(
        default="truncate",
        metadata={
            "help": "What of a sample longer than --sequence_len: truncate it, or split it into samples of the same author.",
            "choices": ["truncate", "split"],
        },
    )
    eval_fraction: float = field(
        default=0.02, metadata={"help": "Share of the authors held out for evaluation when there is no --validation_file."}
    )
    train_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the training authors to train on, each with all samples; chosen by a hash of the author."},
    )
    allow_shared_authors: bool = field(default=False, metadata={"help": "Let --validation_file hold texts of training authors."})
    max_train_samples: Optional[int] = field(
        default=None,
        metadata={"help": "Train on the first so many rows only, which the guarantee then takes as given; see --train_fraction."},
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "Evaluate on the first so many rows only (so many authors, with --release_eval_epsilon)."}
    )
    preprocessing_num_workers: Optional[int] = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise UserError("--dataset_name and --train_file exclude each other: give one of them")
        if self.sequence_len < 2:
            raise UserError(f"--sequence_len {self.sequence_len}: a sample needs at least 2 tokens to predict one")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction} must be at least 0 and below 1")
        if not 0 < self.train_fraction <= 1:
            raise UserError(f"--train_fraction {self.train_fraction} must be above 0 and at most 1")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.messages_column is not None and self.prompt_column is not None:
            raise UserError("--messages_column and --prompt_column exclude each other: give one of them")
        if self.targets not in TARGETS:
            raise UserError(f"--targets {self.targets} must be one of {', '.join(TARGETS)}")
        if self.targets != "assistant" and not self.has_targets:
            raise UserError("--targets is for --messages_column or --prompt_column: of a text all is learned; leave it out")
        text = ("text", self.text_column) if self.messages_column is None else ("messages", self.messages_column)
        named = [text, ("prompt", self.prompt_column), ("author", self.author_column)]
        for i, (option, column) in enumerate(named):
            for other, value in named[i + 1 :]:
                if column is not None and column == value:
                    raise UserError(f"--{option}_column and --{other}_column both name {column!r}: they must differ")
        self.text_column = text[1]

    @property
    def has_targets(self) -> bool:
        """Whether a part of a sample only is to be learned, or a template writes it."""
        return self.messages_column is not None or self.prompt_column is not None

    def reading(self, tokenizer: Optional[PreTrainedTokenizerBase]) -> dict[str, Any]:
        """Return how rows become texts, as `readers.Columns` wants it: as they stand, or packed examples (`conversations`)."""
        if not self.has_targets:
            return {}
        form = ChatFormatter(tokenizer, self.targets)
        if self.messages_column is not None:
            return {"as_text": form.messages, "text_option": "--messages_column"}
        return {"as_text": form.completion, "prompt": self.prompt_column}

    def split_id(self, seed: int) -> Optional[str]:
        """Return the ID of the rule that holds authors out, None with a file. Under one ID nobody held out is trained on."""
        return None if self.validation_file is not None else split_id(seed, self.eval_fraction, self.author_column)

    @property
    def row_limit(self) -> Optional[int]:
        """How many rows were taken as given, whoever wrote them: without one author, others would move up into the cut."""
        default = DEFAULT_DATASET_SAMPLES if self.train_file is None and self.dataset_name is None else None
        return min((limit for limit in (default, self.max_train_samples) if limit is not None), default=None)


# --- load ---------------------------------------------------------------------------------------------


def load_author_datasets(
    args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, released: bool = False
) -> tuple[Dataset, Optional[Dataset]]:
    """Load and tokenize, once a machine; every process then sees the result.

    Args:
        released: whether a loss on the held-out authors is to be published.
    Returns:
        (train, evaluation), with the author column and input_ids; evaluation is None where there is none.
    """
    set_chat_template(tokenizer, args.chat_template)
    if args.has_targets and not tokenizer.is_fast:
        raise UserError("--messages_column and --prompt_column need a fast tokenizer, which tells where its tokens stand")
    folder = Path(tempfile.gettempdir()) / f"author-texts-{broadcast(secrets.token_hex(8))}-{os.environ.get('GROUP_RANK', 0)}"
    with training_args.main_process_first(desc="load and tokenize"):
        if training_args.local_process_index == 0:
            folder.mkdir(mode=0o700)
            temp_dirs.append(folder)
            options: dict[str, Any] = {
                "text_column": args.text_column,
                "sequence_len": args.sequence_len,
                "long_samples": args.long_samples,
                "prepend_bos": args.prepend_bos,
                "append_eos": args.append_eos,
                "has_targets": args.has_targets,
                "num_proc": args.preprocessing_num_workers,
            }
            with exit_on_sigterm():
                train, evaluation = load_train_and_eval(args, training_args.seed, folder, released, tokenizer)
                tokenize(train, tokenizer, **options).save_to_disk(folder / "train")
                if evaluation is not None:
                    option = "--validation_file" if args.validation_file else "--eval_fraction: of the held-out authors"
                    tokenize(evaluation, tokenizer, **options, option=option).save_to_disk(folder / "evaluation")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data loader workers may be forked from here on
    has_evaluation = args.validation_file is not None or args.eval_fraction > 0
    if not all((folder / name / "state.json").exists() for name in ["train", *["evaluation"] * has_evaluation]):
        raise UserError("--train_file: another process could not load the data, see what it said")
    return load_from_disk(folder / "train"), load_from_disk(folder / "evaluation") if has_evaluation else None


def load_train_and_eval(
    args: DataArguments,
    seed: int,
    folder: Optional[Path] = None,
    released: bool = False,
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
) -> tuple[Dataset, Optional[Dataset]]:
    """Load, check and split the data named by `args`.

    Args:
        folder: where the texts are kept while they are used, `temporary_folder()` by default.
        released: whether a loss on the held-out authors is to be published: then nobody is held out by force, and
            --max_eval_samples takes whole authors, by a hash of each.
        tokenizer: whose chat template writes conversations.
    Returns:
        (train, evaluation), both with the text and the author column; evaluation is None where
        --eval_fraction is 0 and no --validation_file is given.
    Raises:
        UserError: for a file or column that cannot be used.
    """
    columns: dict[str, Any] = {"text_column": args.text_column, "author_column": args.author_column, "folder": folder}
    columns["reading"] = args.reading(tokenizer)
    columns["kinds"] = {}  # one kind of author in both files, or who is in both would not show
    if args.train_file is not None:
        samples = load_files("--train_file", args.train_file, **columns)
    else:
        limit = DEFAULT_DATASET_SAMPLES if args.dataset_name is None else None
        name = args.dataset_name or DEFAULT_DATASET
        samples = load_hub(name, args.dataset_config_name, args.dataset_revision, limit=limit, **columns)
    if args.validation_file is None:
        train, evaluation = split_by_author(
            samples, args.author_column, args.eval_fraction, seed, args.train_fraction, folder, not released
        )
    else:
        train, _ = split_by_author(samples, args.author_column, 0.0, seed, args.train_fraction, folder)
        evaluation = load_files("--validation_file", args.validation_file, **columns)
        check_author_overlap(train, evaluation, args)
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
        if pc.count_distinct(get_column(train, args.author_column)).as_py() < 2:
            raise UserError(f"--max_train_samples {args.max_train_samples} leaves rows of one author only: raise it")
    if evaluation is not None and args.max_eval_samples is not None:
        if released:
            evaluation = subsample_authors(evaluation, args.author_column, args.max_eval_samples, seed, folder)
        else:
            evaluation = evaluation.select(range(min(args.max_eval_samples, len(evaluation))))
    for warning in suspicious_author_warnings(train, args.text_column, args.author_column):
        logger.warning(warning)
    return train, evaluation


def load_files(
    option: str,
    patterns: list[str],
    *,
    text_column: str,
    author_column: str,
    folder: Optional[Path] = None,
    kinds: Optional[dict[str, str]] = None,
    reading: Optional[dict[str, Any]] = None,
) -> Dataset:
    """Load local files, given by name or glob, all of one format: both columns as strings, exactly as they stand there.

    Args:
        reading: how else texts come about, from `DataArguments.reading`.
    Raises:
        UserError: naming `option` and the file, line or column at fault.
    """
    files = expand_files(option, patterns)
    suffixes = {split_suffix(name)[0] for name in files}
    if len(suffixes) > 1 or not suffixes <= set(FORMATS):
        raise UserError(
            f"{option}: files must all be of one kind of {', '.join(FORMATS)} (or these with .gz or .zst), not "
            f"{', '.join(sorted(suffixes))}"
        )
    batches = read_files(files, ColumnSpec(option, text_column, author_column, **reading or {}), kinds)
    return write_arrow_dataset(batches, [text_column, author_column], f"{option} {' '.join(patterns)}", folder)


def write_arrow_dataset(batches: Iterable[pa.RecordBatch], columns: list[str], source: str, folder: Optional[Path]) -> Dataset:
    """Write the samples of a source to `folder`, and return them."""
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    samples = write_arrow((batch.select(columns) for batch in batches), schema, folder)
    if not len(samples):
        raise UserError(f"{source} holds no rows")
    return samples


def expand_files(option: str, patterns: list[str]) -> list[str]:
    """Expand globs, but for names of files that are there; check that every file is."""
    files = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"{option} {pattern}: there is no such file")
        files += found
    for name in files:
        if not os.path.isfile(name):
            raise UserError(f"{option} {name} is a folder: name the files in it, for example '{os.path.join(name, '*.jsonl')}'")
        if os.path.getsize(name) == 0:
            raise UserError(f"{option} {name} is empty")
    for name in sorted({name for name in files if files.count(name) > 1}):
        raise UserError(f"{option} names {name} {files.count(name)} times: its samples would count as often; name it once")
    return files


def load_hub(
    name: str,
    config: str,
    revision: str,
    *,
    text_column: str,
    author_column: str,
    limit: Optional[int],
    folder: Optional[Path] = None,
    kinds: Optional[dict[str, str]] = None,
    reading: Optional[dict[str, Any]] = None,
) -> Dataset:
    """Load the first `limit` samples (all where it is None) of a hub data set, or of a local folder of the same layout.

    Raises:
        UserError: where the hub or the data set cannot be reached, or a column is missing.
    """
    columns = ColumnSpec("--dataset_name", text_column, author_column, **reading or {})
    batches = read_hub(name, config, revision, columns, limit, {} if kinds is None else kinds)
    return write_arrow_dataset(batches, [text_column, author_column], f"--dataset_name {name}", folder)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Optional[str]) -> None:
    """Give the tokenizer the template in a file, if one is named."""
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--chat_template {path} cannot be read: {error}") from error


def data_summary(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is to be known of how texts became samples; privacy.json holds it. All of it is public."""
    start = resolve_bos_token(tokenizer, args.prepend_bos)
    dataset = (args.dataset_name or DEFAULT_DATASET) if args.train_file is None else None
    return {
        "dataset": dataset if dataset and not Path(dataset).exists() else None,
        "row_limit": args.row_limit,
        "train_fraction": args.train_fraction,
        "sequence_len": args.sequence_len,
        "start_token": None if start is None else tokenizer.decode([start]),
        "end_token": tokenizer.eos_token if args.append_eos else None,
        **({"targets": args.targets} if args.has_targets else {}),
    }


def format_data_summary(notes: dict[str, Any]) -> list[str]:
    """Return the lines of `data_notes` that a reader of the log should not miss."""
    lines = []
    if notes["row_limit"]:
        lines.append(
            f"  rows                    the first {notes['row_limit']:,}, taken as given: the promise is for these, not for "
            "all of the data (--train_fraction takes whole authors)"
        )
    if notes["train_fraction"] < 1:
        lines.append(f"  train_fraction          {notes['train_fraction']:g} of the training authors, by a hash of each")
    if "targets" in notes:
        learned = "completions and the assistant's turns" if notes["targets"] == "assistant" else "all of each sample"
        lines.append(f"  targets                 {learned}")
    for name, place in (("start_token", "begins"), ("end_token", "ends")):
        if notes[name] is not None:
            lines.append(f"  {name:<23} {notes[name]!r} {place} each sample" + (" that is not cut" if place == "ends" else ""))
    return lines


# --- authors ------------------------------------------------------------------------------------------


def split_by_author(
    samples: Dataset,
    author_column: str,
    eval_fraction: float,
    seed: int,
    train_fraction: float = 1.0,
    folder: Optional[Path] = None,
    by_force: bool = True,
) -> tuple[Dataset, Optional[Dataset]]:
    """Hold out about `eval_fraction` of the authors, each with all samples; train on `train_fraction` of the others.

    An author's side depends on the author's value and `seed` only, not on who else is there: adding or
    removing one author moves nobody else between the sides, so neighbouring data sets stay neighbours. (Where chance
    holds out nobody, one author is held out, or an error raised where not `by_force`.)

    Returns:
        (train, evaluation); evaluation is None where `eval_fraction` is 0.
    """
    values = encode_authors(get_column(samples, author_column))
    codes, authors = values.indices.to_numpy(), values.dictionary.to_pylist()
    if len(authors) < 2:
        raise UserError(f"--author_column {author_column!r}: there is one author only, whom no noise can hide; give data of many")
    if eval_fraction == 0 and train_fraction == 1:
        return samples, None
    draws = holdout_scores(authors, seed)
    held_out = draws < eval_fraction
    if eval_fraction > 0 and not held_out.any():
        if not by_force:
            raise UserError(
                f"--eval_fraction {eval_fraction} holds out none of {len(authors)} authors: raise it to publish their loss"
            )
        held_out[np.argmin(draws)] = True
    trained = ~held_out & (draws < eval_fraction + train_fraction * (1 - eval_fraction))
    if not trained.any():
        option = f"--eval_fraction {eval_fraction}" + (f" and --train_fraction {train_fraction}" if train_fraction < 1 else "")
        remedy = "raise the latter" if train_fraction < 1 else "lower it"
        raise UserError(f"{option} of {len(authors)} authors leaves none to train on: {remedy}, or give more authors")
    return filter_rows(samples, trained[codes], folder), filter_rows(
        samples, held_out[codes], folder
    ) if eval_fraction > 0 else None


def author_hashes(authors: Sequence | pa.ChunkedArray) -> np.ndarray:
    """Return a hash of each author's value, uint64 (authors,), in the order of `group_by_author`."""
    return hash_authors(encode_authors(authors).dictionary.to_pylist(), "author:").astype(np.uint64)


def subsample_authors(samples: Dataset, author_column: str, limit: int, seed: int, folder: Optional[Path] = None) -> Dataset:
    """Return all samples of at most `limit` authors, those of the lowest hashes: one author less lets one other in."""
    values = encode_authors(get_column(samples, author_column))
    lowest = np.argsort(hash_to_unit(values.dictionary.to_pylist(), f"evaluation:{seed}:"), kind="stable")[:limit]
    return filter_rows(samples, np.isin(values.indices.to_numpy(), lowest), folder)


def check_author_overlap(train: Dataset, evaluation: Dataset, args: DataArguments) -> None:
    """Raise UserError where evaluation authors are training authors too: their texts are no test."""
    ours, theirs = (pc.unique(get_column(samples, args.author_column)) for samples in (train, evaluation))
    shared = pc.sum(pc.is_in(theirs, value_set=ours)).as_py()
    if shared and not args.allow_shared_authors:
        raise UserError(
            f"--validation_file: {shared:,} of its {len(theirs):,} authors are in the training data too: take them out of one of "
            "the files, or add --allow_shared_authors if it is meant"
        )


def group_by_author(authors: Sequence | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Group sample indices by author (compressed sparse rows).

    Args:
        authors: author of each sample, (samples,): scalars of one type (strings, integers, ...).
    Returns:
        (offsets, indices), int64 of shapes (authors + 1,) and (samples,): the samples of the a-th author, in
        order of first appearance, are indices[offsets[a]:offsets[a + 1]], in their original order.
    Raises:
        UserError: for a missing author, or values that are not scalars of one type.
    """
    encoded = encode_authors(authors)
    codes = encoded.indices.to_numpy()
    indices = np.argsort(codes, kind="stable").astype(np.int64)
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), indices


# --- what the trainer sees ------------------------------------------------------------------------------


class AuthorDataset(torch.utils.data.Dataset):
    """Tokenized samples, addressed by author.

    Args:
        samples: data set with a column `input_ids`, and `labels` where not all of it is to be learned.
        offsets, indices: the grouping of its rows, from `group_by_author`.
        hashes: of the authors in that order, from `author_hashes`; needed with noise bands only.
    """

    def __init__(self, samples: Dataset, offsets: np.ndarray, indices: np.ndarray, hashes: Optional[np.ndarray] = None):
        self.columns = [name for name in ("input_ids", "labels") if name in samples.column_names]
        self.samples = samples.select_columns(self.columns).with_format("arrow")
        self.offsets = offsets
        self.indices = indices
        self.hashes = hashes

    def __len__(self) -> int:
        """Number of authors."""
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return pc.max(pc.list_value_length(get_column(self.samples, "input_ids"))).as_py() or 0

    def __getitems__(self, draws: list[np.ndarray]) -> list[list[dict[str, np.ndarray]]]:
        """Fetch the samples of several authors at once.

        Args:
            draws: one array of sample indices per author.
        Returns:
            for each author the list of its samples, {"input_ids": int32 (tokens,)}, with labels of the same shape if any.
        """
        if not draws:
            return []
        fetched, rows = self.samples[np.concatenate(draws)], {}
        for name in self.columns:
            column = fetched[name].combine_chunks()
            bounds = column.offsets.to_numpy()
            rows[name] = np.split(column.values.to_numpy(), bounds[1:-1])
            rows[name][0] = rows[name][0][bounds[0] :]
        samples = [dict(zip(rows, values)) for values in zip(*rows.values())]
        ends = np.cumsum([len(draw) for draw in draws])
        return [samples[end - len(draw) : end] for draw, end in zip(draws, ends)]


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad samples on the right to the longest of them: causal attention then needs no mask.

    Returns:
        input_ids and labels, int64 (samples, tokens); labels are the sample's own, or its input_ids where it has none, and -100
        at the padding, so it counts in no loss.
    """
    rows = [np.asarray(sample["input_ids"]) for sample in samples]
    present = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]  # (samples, tokens)
    input_ids, labels = np.zeros(present.shape, np.int64), np.full(present.shape, IGNORE_INDEX)
    input_ids[present] = np.concatenate(rows)
    labels[present] = np.concatenate([np.asarray(sample.get("labels", row)) for sample, row in zip(samples, rows)])
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
