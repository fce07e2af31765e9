"""Samples and their authors: load, split by author, tokenize, group, collate.

Promise: a row never silently changes who its author is. Author values are compared exactly (" alice"
and "alice" are two authors), a missing author is an error and no author is on both sides of the split.
This module knows nothing of privacy; `dp_utils.py` consumes what it returns.

Example:

    >>> samples = load_files("--train_file", ["comments.jsonl"], text_column="body", author_column="user")
    >>> train, evaluation = split_by_author(samples, "user", eval_fraction=0.02, seed=42)
    >>> train = tokenize(train, tokenizer, text_column="body", sequence_len=128)
    >>> dataset = AuthorDataset(train, *group_by_author(column_of(train, "user")))
    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])["labels"]
    tensor([[   5,    6,    7],
            [   8,    9, -100]])
"""

import csv
import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.utils import logging as datasets_logging
from huggingface_hub import constants, get_session
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from author_dp.errors import UserError
from author_dp.mechanism import IGNORED

# A child of transformers' own logger, so that its handler and --log_level hold here too.
logger = logging.get_logger(f"transformers.{__name__}")

DEFAULT_DATASET = "webis/tldr-17"
DEFAULT_DATASET_SAMPLES = 500_000
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        default=None, metadata={"help": "Own data: .jsonl, .json, .csv or .parquet; several files or a glob."}
    )
    validation_file: Optional[list[str]] = field(
        default=None, metadata={"help": "Evaluation data of the same form. Default: held-out authors of the training data."}
    )
    text_column: str = field(default="content", metadata={"help": "Column of the text."})
    author_column: str = field(default="author", metadata={"help": "Column of the author, the privacy unit."})
    sequence_len: int = field(default=128, metadata={"help": "Tokens per sample; longer samples are cut."})
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
    max_train_samples: Optional[int] = field(default=None, metadata={"help": "Train on the first so many samples only."})
    max_eval_samples: Optional[int] = field(default=None, metadata={"help": "Evaluate on the first so many samples only."})
    preprocessing_num_workers: Optional[int] = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise UserError("--dataset_name and --train_file exclude each other: give one of them")
        if self.sequence_len < 2:
            raise UserError(f"--sequence_len {self.sequence_len}: a sample needs at least 2 tokens to predict one")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction} must be at least 0 and below 1")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.text_column == self.author_column:
            raise UserError(f"--text_column and --author_column both name {self.text_column!r}: they must differ")


# --- load ---------------------------------------------------------------------------------------------


def load_samples(args: DataArguments, seed: int) -> tuple[Dataset, Optional[Dataset]]:
    """Load, check and split the data named by `args`.

    Returns:
        (train, evaluation), both with the text and the author column; evaluation is None where
        --eval_fraction is 0 and no --validation_file is given.
    Raises:
        UserError: for a file or column that cannot be used.
    """
    columns = {"text_column": args.text_column, "author_column": args.author_column}
    if args.train_file is not None:
        train = load_files("--train_file", args.train_file, **columns)
    else:
        limit = DEFAULT_DATASET_SAMPLES if args.dataset_name is None else None
        name = args.dataset_name or DEFAULT_DATASET
        train = load_hub(name, args.dataset_config_name, args.dataset_revision, limit=limit, **columns)
    if args.validation_file is not None:
        evaluation = load_files("--validation_file", args.validation_file, **columns)
    elif args.eval_fraction > 0:
        train, evaluation = split_by_author(train, args.author_column, args.eval_fraction, seed)
    else:
        evaluation = None
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
    if evaluation is not None and args.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(args.max_eval_samples, len(evaluation))))
    return train, evaluation


def load_files(option: str, patterns: list[str], *, text_column: str, author_column: str) -> Dataset:
    """Load local files, given by name or glob, all of one format.

    Raises:
        UserError: naming `option` and the file or column at fault.
    """
    files = expand_files(option, patterns)
    suffixes = {os.path.splitext(name)[1] for name in files}
    if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
        raise UserError(f"{option}: files must all be of one kind of {', '.join(FORMATS)}, not {', '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    columns = [text_column, author_column]
    options: dict[str, Any] = {}
    if suffix == ".csv":
        for name in files:
            check_columns(f"{option} {name}", read_csv_header(option, name), text_column, author_column)
            check_csv_rows(option, name)
        # As written: an author "007" is not 7, and one called "NA" is not a missing value.
        options = {"usecols": columns, "keep_default_na": False, "na_filter": False}
        options["features"] = Features({name: Value("string") for name in read_csv_header(option, files[0]) if name in columns})
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # what goes wrong is said below, once
    try:
        samples = load_dataset(FORMATS[suffix], data_files=files, split="train", **options)
    except Exception as error:  # pandas, pyarrow and datasets each raise their own for a file that is not what it says
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = "it holds no rows" if "corresponds to no data" in reason else reason
        raise UserError(f"{option} {' '.join(patterns)} cannot be read as {suffix}: {reason}") from error
    finally:
        datasets_logging.set_verbosity(verbosity)
    check_columns(f"{option} {' '.join(patterns)}", samples.column_names, text_column, author_column)
    return check_samples(option, samples.select_columns(columns), text_column, author_column)


def expand_files(option: str, patterns: list[str]) -> list[str]:
    """Expand globs and check that every file is there."""
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
    return files


def read_csv_header(option: str, name: str) -> list[str]:
    """Return the column names of a CSV file as they are written, duplicates included."""
    try:
        header = pd.read_csv(name, header=None, nrows=1, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors and UnicodeDecodeError
        raise UserError(f"{option} {name} cannot be read as .csv: {str(error).splitlines()[0]}") from error
    return list(header.iloc[0])


def check_csv_rows(option: str, name: str) -> None:
    """Raise UserError for a row of another length than the header: its values would stand in other columns, unnoticed."""
    csv.field_size_limit(2**31 - 1)
    with open(name, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            columns = len(next(rows))
            for row in rows:
                if row and len(row) != columns:
                    raise UserError(
                        f"{option} {name}, line {rows.line_num} has {len(row)} values and the header {columns}: quote "
                        "values that hold a comma, or mend the line"
                    )
        except csv.Error as error:
            raise UserError(f"{option} {name} cannot be read as .csv, line {rows.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            with open(name, "rb") as lines:
                line = next(number for number, text in enumerate(lines, 1) if not is_utf8(text))
            raise UserError(f"{option} {name}, line {line} is not UTF-8: save the file as UTF-8") from error


def check_columns(source: str, names: list[str], text_column: str, author_column: str) -> None:
    """Raise UserError unless both columns are there, once each."""
    for option, column in (("--text_column", text_column), ("--author_column", author_column)):
        if column not in names:
            columns, remedy = f"its columns are {', '.join(map(str, names))}", "name one"
            if len(names) == 1 and any(separator in str(names[0]) for separator in ";\t|"):
                columns, remedy = f"its only column is {names[0]!r}", "separate columns by commas"
            raise UserError(f"{option} {column!r} is not in {source}: {columns}; {remedy}")
        if names.count(column) > 1:
            raise UserError(f"{option} {column!r} is in {source} {names.count(column)} times: rename all but one")


def check_samples(source: str, samples: Dataset, text_column: str, author_column: str) -> Dataset:
    """Check the types of both columns and that every row has an author; `source` is for the message."""
    if len(samples) == 0:
        raise UserError(f"{source} holds no rows")
    text, author = (samples.features.arrow_schema.field(name).type for name in (text_column, author_column))
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise UserError(
            f"--text_column {text_column!r} of {source} holds {find_odd_value(samples, text_column)}, not text: name another "
            "column, or mend the row"
        )
    scalar = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_temporal)
    if not any(is_type(author) for is_type in scalar) or isinstance(samples.features[author_column], dict | list):
        raise UserError(
            f"--author_column {author_column!r} of {source} holds {find_odd_value(samples, author_column)}, not strings or whole "
            "numbers throughout: write the authors as strings"
        )
    for name in (text_column, author_column):
        check_utf8(source, name, column_of(samples, name))
    values = column_of(samples, author_column)
    missing = pc.is_null(values)
    if pa.types.is_string(author) or pa.types.is_large_string(author):
        missing = pc.or_(missing, pc.equal(pc.fill_null(pc.utf8_trim_whitespace(values), ""), ""))
    rows = np.flatnonzero(missing.to_numpy())
    if len(rows):
        raise UserError(
            f"--author_column {author_column!r} of {source} is empty in {len(rows)} of {len(samples)} rows, first in row "
            f"{rows[0] + 1}: remove these rows or give them an author each"
        )
    return samples


def find_odd_value(samples: Dataset, column: str) -> str:
    """Return the first value that is not text, and its row; what is a mixture is read as strings but for that."""
    for row, value in enumerate(samples[column], 1):
        if value is not None and not isinstance(value, str):
            return f"{str(value)[:40]!r} in row {row}"
    return str(samples.features[column])


def check_utf8(source: str, column: str, values: pa.ChunkedArray) -> None:
    """Raise UserError for text that is not UTF-8, which Arrow reads without a word."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        for row, value in enumerate(values.cast(pa.large_binary()).to_pylist(), 1):
            if value is not None and not is_utf8(value):
                raise UserError(f"{source}: column {column!r}, row {row} is not UTF-8: save the file as UTF-8") from error
        raise


def is_utf8(text: bytes) -> bool:
    return text.decode(errors="ignore").encode() == text


def column_of(samples: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column without a detour over Python objects."""
    return samples.with_format("arrow")[name][:]


def hub_is_reachable() -> bool:
    """Ask the hub once, without the minute of retries that the libraries spend where there is no network."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library, its proxy, or offline mode raises: it is not to be had
        return False
    return True


def hub_error(option: str, name: str) -> UserError:
    return UserError(
        f"{option} {name} is not a local path and the Hugging Face hub cannot be reached: give local files with --train_file "
        "and a local folder with --model_name, or run the demo (README.md)"
    )


def load_hub(name: str, config: str, revision: str, *, text_column: str, author_column: str, limit: Optional[int]) -> Dataset:
    """Load a data set from the hub's Parquet conversion, or from a local folder of the same layout.

    The files are CONFIG/train/*.parquet, or CONFIG/partial-train/*.parquet for a large set; only the shards
    that the first `limit` samples need are read (all where it is None).

    Raises:
        UserError: where the hub or the data set cannot be reached, or a column is missing.
    """
    if os.path.isdir(name):
        root = os.path.join(os.path.abspath(name), config)
    elif not hub_is_reachable():
        raise hub_error("--dataset_name", name)
    else:
        root = f"hf://datasets/{name}@{revision.replace('/', '%2F')}/{config}"
    filesystem, path = fsspec.core.url_to_fs(root)
    try:
        shards = sorted(filesystem.glob(f"{path}/train/*.parquet") or filesystem.glob(f"{path}/partial-train/*.parquet"))
        needed, rows = [], 0
        for shard in shards:
            if limit is None or rows < limit:
                with filesystem.open(shard) as file:
                    footer = pq.ParquetFile(file)
                    check_columns(f"--dataset_name {name}", footer.schema_arrow.names, text_column, author_column)
                    rows += footer.metadata.num_rows
                needed.append(filesystem.unstrip_protocol(shard))
        if not needed:
            raise FileNotFoundError("no Parquet files")
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"--dataset_name {name}: no readable Parquet files at {root}/train ({str(error).splitlines()[0]}): check the name, "
            "--dataset_config_name and --dataset_revision, or download files and give them with --train_file"
        ) from error
    samples = load_dataset("parquet", data_files=needed, split="train", columns=[text_column, author_column])
    samples = samples.select(range(min(limit or len(samples), len(samples))))
    return check_samples(f"--dataset_name {name}", samples, text_column, author_column)


# --- authors ------------------------------------------------------------------------------------------


def split_by_author(samples: Dataset, author_column: str, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out about `eval_fraction` of the authors, each with all samples.

    An author's side depends on the author's value and `seed` only, not on who else is there: adding or
    removing one author moves nobody else between the sides, so neighbouring data sets stay neighbours.
    """
    values = encode_authors(column_of(samples, author_column))
    codes, authors = values.indices.to_numpy(), values.dictionary.to_pylist()
    if len(authors) < 2:
        raise UserError(f"--author_column {author_column!r}: there is one author only, whom no noise can hide; give data of many")
    digests = [hashlib.blake2b(f"{seed}:{author}".encode(), digest_size=8).digest() for author in authors]
    draws = np.frombuffer(b"".join(digests), dtype=">u8") / 2.0**64  # uniform in [0, 1)
    held_out = draws < eval_fraction
    if not held_out.any() and len(authors) > 1:
        held_out[np.argmin(draws)] = True
    if held_out.all():
        raise UserError(
            f"--eval_fraction {eval_fraction} of {len(authors)} authors leaves none to train on: lower it, or give more authors"
        )
    in_evaluation = held_out[codes]
    return samples.select(np.flatnonzero(~in_evaluation)), samples.select(np.flatnonzero(in_evaluation))


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


def encode_authors(authors: Sequence | pa.ChunkedArray) -> pa.DictionaryArray:
    """Number the authors in order of first appearance."""
    try:
        values = authors.combine_chunks() if isinstance(authors, pa.ChunkedArray) else pa.array(authors)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"authors must be scalars of one type: {error}") from error
    if values.null_count or (pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py()):
        raise UserError("an author is missing: remove these samples or give them an author each")
    if pa.types.is_nested(values.type):
        raise UserError(f"authors must be scalars of one type, not {values.type}")
    return values.dictionary_encode()


# --- tokens -------------------------------------------------------------------------------------------


def tokenize(
    samples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str,
    sequence_len: int,
    long_samples: str = "truncate",
    num_proc: Optional[int] = None,
) -> Dataset:
    """Replace the text by `input_ids`: the tokenizer's ids, cut at `sequence_len`, nothing added.

    What is longer is truncated, or split into pieces that are samples of the same author, which costs no privacy where the
    author is the unit. Samples of fewer than two tokens have nothing to predict; they are dropped, and counted in the log.
    """
    features = samples.features.copy()
    features.pop(text_column)
    features["input_ids"] = List(Value("int32"))

    def tokenize_batch(batch):
        texts = [text or "" for text in batch[text_column]]
        if long_samples == "truncate":
            encoded = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=sequence_len)
            return {"input_ids": encoded["input_ids"]}
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [[row[i : i + sequence_len] for i in range(0, max(1, len(row)), sequence_len)] for row in rows]
        others = {name: [v for v, p in zip(batch[name], pieces) for _ in p] for name in batch if name != text_column}
        return {**others, "input_ids": [piece for row in pieces for piece in row]}

    tokens = samples.map(
        tokenize_batch,
        batched=True,
        num_proc=num_proc,
        remove_columns=[text_column],
        features=features,
        desc="Tokenize",
    )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # or the saved tokenizer would cut every text at sequence_len
    lengths = pc.list_value_length(tokens.data.column("input_ids")).to_numpy()
    kept = np.flatnonzero(lengths >= 2)
    if len(kept) == 0:
        raise UserError(f"--text_column {text_column!r}: no text has two tokens or more; name the column that holds the text")
    if len(kept) < len(tokens):
        logger.warning(f"Dropped {len(tokens) - len(kept)} of {len(tokens)} samples: fewer than two tokens in {text_column!r}.")
        tokens = tokens.select(kept)
    return tokens


class AuthorDataset(torch.utils.data.Dataset):
    """Tokenized samples, addressed by author.

    Args:
        samples: data set with a column `input_ids`.
        offsets, indices: the grouping of its rows, from `group_by_author`.
    """

    def __init__(self, samples: Dataset, offsets: np.ndarray, indices: np.ndarray):
        self.samples = samples.select_columns(["input_ids"]).with_format("arrow")
        self.offsets = offsets
        self.indices = indices

    def __len__(self) -> int:
        """Number of authors."""
        return len(self.offsets) - 1

    def __getitems__(self, draws: list[np.ndarray]) -> list[list[dict[str, np.ndarray]]]:
        """Fetch the samples of several authors at once.

        Args:
            draws: one array of sample indices per author.
        Returns:
            for each author the list of its samples, {"input_ids": int32 (tokens,)}.
        """
        if not draws:
            return []
        column = self.samples[np.concatenate(draws)]["input_ids"].combine_chunks()
        bounds = column.offsets.to_numpy()
        rows = np.split(column.values.to_numpy(), bounds[1:-1])
        rows[0] = rows[0][bounds[0] :]
        ends = np.cumsum([len(draw) for draw in draws])
        return [[{"input_ids": row} for row in rows[end - len(draw) : end]] for draw, end in zip(draws, ends)]


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad samples on the right to the longest of them: causal attention then needs no mask.

    Returns:
        input_ids and labels, int64 (samples, tokens); labels are -100 at the padding, so it counts in no loss.
    """
    rows = [np.asarray(sample["input_ids"]) for sample in samples]
    present = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]  # (samples, tokens)
    input_ids, labels = np.zeros(present.shape, np.int64), np.full(present.shape, IGNORED)
    input_ids[present] = labels[present] = np.concatenate(rows)
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
