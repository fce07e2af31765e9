"""Tokenize texts, cut them to samples, and drop samples without anything to predict.

Guarantees: a sample keeps its author, also where a text is split. Text that is spelled like a special token stays text.
"""

import functools
import secrets
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from author_dp.data.chat import ChatExample, resolve_bos_token, tokenize_chat_examples
from author_dp.data.columns import get_column
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.types import IGNORE_INDEX

logger = get_logger(__name__)


class TokenizeSpec(NamedTuple):
    """How texts become samples."""

    tokenizer: PreTrainedTokenizerBase
    text_column: str
    number_column: str  # of the result: the number of each sample's text
    start: list[int]  # token before each piece, if any
    end: list[int]  # token after each text, if any
    max_body_tokens: int  # of a piece, without `start`
    split: bool  # split long texts; otherwise truncate them
    has_loss_mask: bool  # whether texts are the fields of a `chat.ChatExample`, and samples have labels


def tokenize(
    samples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str,
    sequence_len: int,
    long_samples: str = "truncate",
    prepend_bos: bool = False,
    append_eos: bool = False,
    has_loss_mask: bool = False,
    num_proc: Optional[int] = None,
    option: str = "--text_column",
    folder: Optional[Path] = None,
) -> Dataset:
    """Replace the text column by `input_ids`, cut at `sequence_len`.

    Nothing is added but the tokenizer's start token. Longer texts are truncated, or split into samples of the same author; that
    costs no privacy where the author is the unit. Samples of fewer than two tokens have nothing to predict, and are dropped. The
    number of texts without another sample is logged. Text that is spelled like a special token (<|endoftext|>) never becomes
    that token.

    Args:
        prepend_bos: begin each text with a start token, from `resolve_bos_token`.
        append_eos: end each text with the end-of-text token, where it fits.
        has_loss_mask: whether texts are the fields of a `chat.ChatExample`. The result then has `labels` too, IGNORE_INDEX
            outside the targets. Samples without a target are dropped like those of one token.
        option: named in the error where no text can be used.
        folder: where the samples are kept; None: beside `samples`, on disk or in memory.
    Raises:
        UserError: where no sample is left, or the tokenizer lacks a token that was asked for.
    """
    start, end = resolve_tokens(tokenizer, prepend_bos, append_eos)
    number_column = "_".join([*samples.column_names, "number"])  # the name of no other column
    is_split = long_samples == "split"
    spec = TokenizeSpec(tokenizer, text_column, number_column, start, end, sequence_len - len(start), is_split, has_loss_mask)
    features = samples.features.copy()
    features.pop(text_column)
    features.update(dict.fromkeys(["input_ids", *["labels"] * has_loss_mask], List(Value("int32"))))
    fingerprint = secrets.token_hex(8)
    tokens = samples.map(
        functools.partial(tokenize_batch, spec=spec),
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=[text_column],
        features=type(features)({**features, number_column: Value("int64")}),
        desc="Tokenize",
        cache_file_name=None if folder is None else str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,  # the default hashes the whole tokenizer, for a cache that is never read
    )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.encode_special_tokens = False
    if not len(tokens):
        needed = f"a target within {sequence_len} tokens" if has_loss_mask else "two tokens or more"
        fix = "Raise --sequence_len, or name" if has_loss_mask else "Name"
        raise UserError(f"{option}: no text in {text_column!r} has {needed}. {fix} the column that holds the text")
    if num_dropped := len(samples) - pc.count_distinct(get_column(tokens, number_column)).as_py():
        reason = "no target within --sequence_len" if has_loss_mask else "fewer than two tokens"
        logger.warning(f"Dropped {num_dropped} of {len(samples)} texts: {reason} in {text_column!r}.")
    return tokens.remove_columns(number_column)


def resolve_tokens(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool, append_eos: bool) -> tuple[list[int], list[int]]:
    """Return the tokens that begin and end each text: one or none."""
    bos = resolve_bos_token(tokenizer, prepend_bos)
    if prepend_bos and bos is None:
        raise UserError("--prepend_bos: the model's tokenizer has neither a start nor an end-of-text token. Leave it out")
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append_eos: the model's tokenizer has no end-of-text token. Leave it out")
    return [] if bos is None else [bos], [tokenizer.eos_token_id] * append_eos


def tokenize_batch(batch: dict[str, list], numbers: list[int], spec: TokenizeSpec) -> dict[str, list]:
    """Return the samples of a batch of texts; a text that is blank or has no token gets none, not even the start.

    Args:
        batch: columns; the texts are strings, or with a loss mask the fields of examples; None where one is missing.
        numbers: of the texts, (texts,).
    Returns:
        columns of samples, each with the values of its text.
    """
    values = batch.pop(spec.text_column)
    if spec.has_loss_mask:
        examples = [value and ChatExample(**value) for value in values]
        ids, labels = tokenize_chat_examples(examples, spec.tokenizer, spec.start, spec.end)
    else:
        options: Any = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        texts = [text if text and not text.isspace() else "" for text in values]
        rows = spec.tokenizer(texts, **options, verbose=False)["input_ids"]
        ids = labels = [row and spec.start + row + spec.end for row in rows]
    names = [*batch, spec.number_column, "input_ids", *["labels"] * spec.has_loss_mask]
    result: dict[str, list] = {name: [] for name in names}
    first = len(spec.start)
    for *others, row, targets in zip(*batch.values(), numbers, ids, labels):
        for cut in chunk_slices(row[first:], spec):
            sample = [part[:first] + part[first:][cut] for part in (row, targets)]
            if any(target != IGNORE_INDEX for target in sample[1][1:]):  # no token predicts the first one
                for name, value in zip(names, [*others, *sample]):
                    result[name].append(value)
    return result


def chunk_slices(row: list[int], spec: TokenizeSpec) -> list[slice]:
    """Return slices of at most `max_body_tokens` that cut a row without its start: the first one, or with `split` all.

    A last piece of a single token would predict nothing, so it takes one token from the piece before. Where pieces are too short
    for that, an end token alone is left out.
    """
    if not spec.split:  # here and not by the tokenizer, which may be set to cut the beginning off
        return [slice(spec.max_body_tokens)]
    bounds = [*range(0, max(1, len(row)), spec.max_body_tokens), len(row)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        if spec.max_body_tokens > 2:
            bounds[-2] -= 1
        elif row[-1:] == spec.end:
            bounds.pop()
    return [slice(*pair) for pair in zip(bounds, bounds[1:])]
