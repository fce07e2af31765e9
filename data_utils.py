"""Load samples with authors, split them by author, tokenize, group and collate them.

Guarantees: no row silently changes its author. Authors are compared exactly as written in the files (" alice" and "alice" are two
authors); a missing author is an error; no author is on both sides of the split, unless --allow_shared_authors is given.

Example:

    >>> args = DataArguments(train_file=["comments.jsonl"], text_column="body", author_column="user")
    >>> train, evaluation = load_author_datasets(args, training_args, tokenizer)
    >>> dataset = AuthorDataset(train, *group_by_author(get_column(train, "user")))
    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])["labels"]
    tensor([[   5,    6,    7],
            [   8,    9, -100]])
"""

import itertools
import os
import pickle
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from author_dp.data.authors import encode_authors, suspicious_author_warnings
from author_dp.data.chat import TARGETS, ChatFormatter, missing_chat_end_warning
from author_dp.data.chat_template import set_chat_template
from author_dp.data.columns import ColumnSpec, get_column
from author_dp.data.hub import read_hub
from author_dp.data.loading import drop_blank_texts, load_files, read_local_files
from author_dp.data.splits import (
    check_author_overlap,
    data_summary,
    describe_held_out_split,
    limit_eval_split_texts,
    split_by_author,
    split_id,
    subsample_split_authors,
)
from author_dp.data.storage import exit_on_sigterm, make_private_temp_dir
from author_dp.data.tokenization import tokenize
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.types import IGNORE_INDEX
from author_dp.validation import check_choice, check_exclusive, check_range, option

logger = get_logger(__name__)

TOKEN_COLUMNS = ("input_ids", "labels")  # of tokenized samples
DEFAULT_DATASET, DEFAULT_DATASET_SAMPLES = "webis/tldr-17", 500_000


@dataclass
class DataArguments:
    """What to train on. Without a data option: the first 500,000 samples of webis/tldr-17 (Reddit)."""

    dataset_name: Optional[str] = option(None, f"Hub data set, or local folder with its layout. Default: {DEFAULT_DATASET}.")
    dataset_config_name: str = option("default", "Configuration of the hub data set.")
    dataset_revision: str = option("refs/convert/parquet", "Revision with Parquet files. Default: the hub's own conversion.")
    train_file: Optional[list[str]] = option(None, "Local .jsonl, .json, .csv or .parquet files, or globs; also .gz or .zst.")
    validation_file: Optional[list[str]] = option(None, "The same for evaluation. Default: training authors who are held out.")
    text_column: str = option("content", "Column of the text.")
    author_column: str = option("author", "Column of the author, the privacy unit.")
    prompt_column: Optional[str] = option(None, "Column of the prompt before the text: context that is not learned.")
    messages_column: Optional[str] = option(None, "Column of conversations, lists of {role, content}, instead of --text_column.")
    targets: str = option("assistant", "Learn completions and the assistant's turns only, or all of a sample.", TARGETS)
    chat_template: Optional[str] = option(None, "File with a chat template, for a tokenizer that has none; saved with the model.")
    sequence_len: int = option(128, "Tokens per sample; see --long_samples for longer texts.", alias="max_length")
    prepend_bos: bool = option(
        False, "Begin each text with a start (or end-of-text) token if the tokenizer does not; a generator then learns to begin."
    )
    append_eos: bool = option(False, "End each text with the end-of-text token, so that a generator learns to stop.")
    long_samples: str = option(
        "truncate", "Truncate longer texts, or split them into samples of the same author.", ["truncate", "split"]
    )
    eval_fraction: float = option(0.02, "Fraction of the authors to hold out for evaluation if there is no --validation_file.")
    train_fraction: float = option(1.0, "Fraction of the training authors to train on, chosen by a hash of each.")
    allow_shared_authors: bool = option(False, "Allow texts of training authors in --validation_file.")
    max_train_samples: Optional[int] = option(None, "Train on the first N rows; the guarantee covers only these.")
    max_eval_samples: Optional[int] = option(
        None, "Evaluate on about N texts, of complete authors chosen by a hash (on N authors, with --release_eval_epsilon)."
    )
    preprocessing_num_workers: Optional[int] = option(None, "Number of processes that tokenize.")

    def __post_init__(self):
        check_exclusive(self, "dataset_name", "train_file")
        check_exclusive(self, "messages_column", "prompt_column")
        check_range("--sequence_len", self.sequence_len, "[2, inf)")  # one token to predict another
        check_range("--eval_fraction", self.eval_fraction, "[0, 1)")
        check_range("--train_fraction", self.train_fraction, "(0, 1]")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            check_range(f"--{name}", getattr(self, name), "[1, inf)")
        check_choice("--targets", self.targets, TARGETS)
        if self.targets != "assistant" and not self.has_loss_mask:
            raise UserError(
                f"--targets {self.targets}: plain texts are learned completely. Leave it out, or add --messages_column or "
                "--prompt_column"
            )
        if self.author_column in TOKEN_COLUMNS:
            raise UserError(f"--author_column {self.author_column}: this name is reserved for tokens. Rename the column")
        names = ["text_column" if self.messages_column is None else "messages_column", "prompt_column", "author_column"]
        for name, other in itertools.combinations(names, 2):
            if (column := getattr(self, name)) == getattr(self, other):
                raise UserError(f"--{name}, --{other}: both name {column!r}. Name two columns")
        if self.messages_column is not None:
            self.text_column = self.messages_column

    @property
    def has_loss_mask(self) -> bool:
        """Return whether samples have labels of their own: prompts and conversations do, plain texts do not."""
        return self.messages_column is not None or self.prompt_column is not None

    @property
    def has_evaluation(self) -> bool:
        return self.validation_file is not None or self.eval_fraction > 0

    @property
    def row_limit(self) -> Optional[int]:
        """Return the number of rows that are used, whoever wrote them; None: all.

        Without one author, other authors' rows would move up into the limit: the guarantee covers the selected rows only.
        """
        default = DEFAULT_DATASET_SAMPLES if self.train_file is None and self.dataset_name is None else None
        return min((limit for limit in (default, self.max_train_samples) if limit is not None), default=None)

    def column_spec(self, option: str, tokenizer: Optional[PreTrainedTokenizerBase]) -> ColumnSpec:
        """Return the columns of `option`'s files; prompts and conversations become fields of `chat.ChatExample`."""
        columns = ColumnSpec(option, self.text_column, self.author_column)
        if not self.has_loss_mask:
            return columns
        formatter = ChatFormatter(tokenizer, self.targets)
        if self.messages_column is not None:
            return columns._replace(as_text=formatter.format_messages, text_option="--messages_column")
        return columns._replace(as_text=formatter.format_completion, prompt=self.prompt_column)

    def split_id(self, seed: int) -> Optional[str]:
        """Return the ID of the rule that holds authors out, None with a file; see `splits.split_id`."""
        return None if self.validation_file is not None else split_id(seed, self.eval_fraction, self.author_column)

    def summary(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return how samples were made, for privacy.json; see `splits.data_summary`."""
        names = ["row_limit", "train_fraction", "sequence_len", "prepend_bos", "append_eos"]
        names += ["text_column", "messages_column", "author_column"]
        return data_summary(
            tokenizer,
            dataset=(self.dataset_name or DEFAULT_DATASET) if self.train_file is None else None,
            targets=self.targets if self.has_loss_mask else None,
            **{name: getattr(self, name) for name in names},
        )


# --- load and split -------------------------------------------------------------------------------------


def load_author_datasets(
    args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, eval_is_public: bool = False
) -> tuple[Dataset, Optional[Dataset]]:
    """Load and tokenize the data once per machine; all its processes read the result.

    Args:
        eval_is_public: whether the loss on held-out authors will be published.
    Returns:
        (train, evaluation), with the author column and input_ids; evaluation is None where there is none.
    """
    set_chat_template(tokenizer, args.chat_template)
    if args.has_loss_mask and not tokenizer.is_fast:
        raise UserError(
            "--messages_column, --prompt_column: they need a fast tokenizer, which knows the positions of its tokens. Choose a "
            "model with a tokenizer.json"
        )
    folder = Path(tempfile.gettempdir()) / f"author-texts-{broadcast(secrets.token_hex(8))}-{os.environ.get('GROUP_RANK', 0)}"
    with training_args.main_process_first(desc="load and tokenize"):
        if training_args.local_process_index == 0:
            make_private_temp_dir(folder.name)
            with exit_on_sigterm():
                tokens = load_tokens(args, training_args.seed, tokenizer, folder, eval_is_public)
                (folder / "tokens").write_bytes(pickle.dumps(tokens))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data loader workers may be forked from here on
    if not (folder / "tokens").exists():
        raise UserError("--train_file: another process could not load the data. See its error")
    return pickle.loads((folder / "tokens").read_bytes())  # not the tokens themselves: they stay in their files


def load_tokens(
    args: DataArguments, seed: int, tokenizer: PreTrainedTokenizerBase, folder: Path, eval_is_public: bool
) -> tuple[Dataset, Optional[Dataset]]:
    """Load and tokenize the data, in `folder`; delete the texts. Returns and arguments as for `load_author_datasets`."""
    names = ("text_column", "sequence_len", "long_samples", "prepend_bos", "append_eos", "has_loss_mask")
    options: Any = {name: getattr(args, name) for name in names}
    options |= {"num_proc": args.preprocessing_num_workers, "folder": folder}
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as texts:
        train, evaluation = load_train_and_eval(args, seed, Path(texts), eval_is_public, tokenizer)
        if args.has_loss_mask and not args.append_eos:
            form = ChatFormatter(tokenizer, args.targets)
            if warning := missing_chat_end_warning(form, train[0][args.text_column]["is_templated"]):  # a `chat.ChatExample`
                logger.warning(warning)
        train = tokenize(train, tokenizer, **options)
        if evaluation is not None:
            source = "--validation_file" if args.validation_file else "--eval_fraction: of the held-out authors"
            evaluation = tokenize(evaluation, tokenizer, **options, option=source)
    if evaluation is not None:
        sides = get_column(evaluation, args.author_column), get_column(train, args.author_column)
        logger.log(*describe_held_out_split(*sides, bool(args.validation_file), args.eval_fraction, args.max_eval_samples))
    return train, evaluation


def load_train_and_eval(
    args: DataArguments,
    seed: int,
    folder: Optional[Path] = None,
    eval_is_public: bool = False,
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
) -> tuple[Dataset, Optional[Dataset]]:
    """Load, check and split the data that `args` names.

    Args:
        folder: where texts are kept while they are used, by default `make_private_temp_dir()`.
        eval_is_public: whether the loss on held-out authors will be published. Then no author is held out against the rule, and
            --max_eval_samples is a number of authors, not of texts.
        tokenizer: its chat template renders conversations.
    Returns:
        (train, evaluation), both with the text and the author column; evaluation is None where --eval_fraction is 0 and there is
        no --validation_file.
    Raises:
        UserError: for a file or column that cannot be used.
    """
    author_types: dict[str, str] = {}  # shared, so that 7 in one file and "7" in another are not taken for two authors
    if args.train_file is not None:
        columns = args.column_spec("--train_file", tokenizer)
        samples = read_local_files(args.train_file, columns, author_types)
    else:
        name, columns = args.dataset_name or DEFAULT_DATASET, args.column_spec("--dataset_name", tokenizer)
        limit = None if args.dataset_name else DEFAULT_DATASET_SAMPLES
        batches = read_hub(name, args.dataset_config_name, args.dataset_revision, columns, limit, author_types)
        samples = drop_blank_texts(batches, columns, name)
    eval_fraction = args.eval_fraction if args.validation_file is None else 0.0
    train, evaluation = split_by_author(
        samples, columns.schema, args.author_column, eval_fraction, seed, args.train_fraction, folder, not eval_is_public
    )
    if args.validation_file is not None:
        evaluation = load_files(args.validation_file, args.column_spec("--validation_file", tokenizer), folder, author_types)
        if not args.allow_shared_authors:
            check_author_overlap(get_column(train, args.author_column), get_column(evaluation, args.author_column))
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
        if pc.count_distinct(get_column(train, args.author_column)).as_py() < 2:
            raise UserError(f"--max_train_samples {args.max_train_samples}: it leaves rows of one author only. Raise it")
    if evaluation is not None and args.max_eval_samples is not None:
        cut = subsample_split_authors if eval_is_public else limit_eval_split_texts
        evaluation = cut(evaluation, args.author_column, args.max_eval_samples, seed, folder)
    for warning in suspicious_author_warnings(train, args.text_column, args.author_column, columns.text_option):
        logger.warning(warning)
    return train, evaluation


def group_by_author(authors: Sequence | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Group sample indices by author (compressed sparse rows).

    Args:
        authors: author of each sample, (samples,): scalars of one type (strings, integers, ...).
    Returns:
        (offsets, indices), int64 of shapes (authors + 1,) and (samples,): the samples of the a-th author, in order of first
        appearance, are indices[offsets[a]:offsets[a + 1]], in their original order.
    Raises:
        UserError: for a missing author, or values that are not scalars of one type.
    """
    encoded = encode_authors(authors)
    codes = encoded.indices.to_numpy()
    indices = np.argsort(codes, kind="stable").astype(np.int64)
    sizes = np.bincount(codes, minlength=len(encoded.dictionary))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), indices


# --- what the Trainer sees ------------------------------------------------------------------------------


class AuthorDataset(torch.utils.data.Dataset):
    """Tokenized samples, indexed by author.

    Args:
        samples: data set with a column `input_ids`, and `labels` where samples have a loss mask.
        offsets, indices: the grouping of its rows, from `group_by_author`.
        hashes: of the authors in that order, from `splits.author_hashes`; needed with noise bands or balls-in-bins sampling.
    Raises:
        UserError: for samples of fewer than two tokens, which predict nothing.
    """

    def __init__(self, samples: Dataset, offsets: np.ndarray, indices: np.ndarray, hashes: Optional[np.ndarray] = None):
        self.columns = [name for name in TOKEN_COLUMNS if name in samples.column_names]
        self.samples = samples.select_columns(self.columns).with_format("arrow")
        self.offsets, self.indices, self.hashes = offsets, indices, hashes
        if num_short := (pc.list_value_length(get_column(self.samples, "input_ids")).to_numpy() < 2).sum():
            raise UserError(
                f"AuthorDataset: {num_short:,} samples have fewer than two tokens, so nothing to predict. Drop them before you "
                "group by author, or authors without other samples would count in N"
            )

    def __len__(self) -> int:
        """Return the number of authors."""
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Return the number of tokens in the longest sample."""
        return pc.max(pc.list_value_length(get_column(self.samples, "input_ids"))).as_py() or 0

    def __getitems__(self, indices_by_author: list[np.ndarray]) -> list[list[dict[str, np.ndarray]]]:
        """Fetch samples of several authors at once; torch's DataLoader calls this.

        Args:
            indices_by_author: an array of sample indices for each author.
        Returns:
            the samples of each author: {"input_ids": int32 (tokens,)}, and "labels" of the same shape if there are any.
        """
        if not indices_by_author:
            return []
        fetched, rows = self.samples[np.concatenate(indices_by_author)], {}
        for name in self.columns:
            column = fetched[name]
            lengths = pc.list_value_length(column).to_numpy()
            rows[name] = np.split(pc.list_flatten(column).to_numpy(), np.cumsum(lengths)[:-1])
        samples = [dict(zip(rows, values)) for values in zip(*rows.values())]
        ends = np.cumsum([len(indices) for indices in indices_by_author])
        return [samples[end - len(indices) : end] for indices, end in zip(indices_by_author, ends)]


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad samples on the right, where causal attention needs no mask.

    Returns:
        input_ids and labels, int64 (samples, tokens); labels are the sample's labels, or its input_ids without any, and -100
        at the padding, which is excluded from the loss.
    """
    rows = [np.asarray(sample["input_ids"]) for sample in samples]
    present = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]  # (samples, tokens)
    input_ids, labels = np.zeros(present.shape, np.int64), np.full(present.shape, IGNORE_INDEX)
    input_ids[present] = np.concatenate(rows)
    labels[present] = np.concatenate([np.asarray(sample.get("labels", row)) for sample, row in zip(samples, rows)])
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
