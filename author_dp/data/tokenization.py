"""Tokenize texts, cut them to samples, and drop samples without anything to predict.

Guarantees: a sample keeps its author, also where a text is split. Text that is spelled like a special token stays text.
"""

import functools
import secrets
from typing import Any, NamedTuple, Optional

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from author_dp.data.chat import resolve_bos_token, tokenize_examples
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.types import IGNORE_INDEX

logger = get_logger(__name__)


class TokenizeSpec(NamedTuple):
    """How texts become samples."""

    tokenizer: PreTrainedTokenizerBase
    text_column: str
    start: list[int]  # token before each piece, if any
    end: list[int]  # token after each text, if any
    max_body_tokens: int  # of a piece, without `start`
    split: bool  # split long texts; otherwise truncate them


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
) -> Dataset:
    """Replace the text column by `input_ids`, cut at `sequence_len`.

    Nothing is added but the tokenizer's start token. Longer texts are truncated, or split into samples of the same author; that
    costs no privacy where the author is the unit. Samples of fewer than two tokens have nothing to predict: they are dropped, and
    their number is logged. Text that is spelled like a special token (<|endoftext|>) never becomes that token.

    Args:
        prepend_bos: begin each text with a start token, from `resolve_bos_token`.
        append_eos: end each text with the end-of-text token, where it fits.
        has_loss_mask: whether texts are JSON of `chat.Example`. The result then has `labels` too, IGNORE_INDEX outside the
            targets. Samples without a target are dropped like those of one token.
        option: named in the error where no text can be used.
    Raises:
        UserError: where no sample is left, or the tokenizer lacks a token that was asked for.
    """
    spec = make_spec(tokenizer, text_column, sequence_len, long_samples == "split", prepend_bos, append_eos)
    features = samples.features.copy()
    features.pop(text_column)
    features.update(dict.fromkeys(["input_ids", *["labels"] * has_loss_mask], List(Value("int32"))))
    tokens = samples.map(
        functools.partial(tokenize_masked if has_loss_mask else tokenize_texts, spec=spec),
        batched=True,
        num_proc=num_proc,
        remove_columns=[text_column],
        features=features,
        desc="Tokenize",
        new_fingerprint=secrets.token_hex(8),  # the default hashes the whole tokenizer, for a cache that is never read
    )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.encode_special_tokens = False
    lengths = pc.list_value_length(tokens.data.column("input_ids")).to_numpy()
    kept = np.flatnonzero(rows_with_targets(tokens) if has_loss_mask else lengths >= 2)
    if len(kept) == 0:
        needed = f"a target within {sequence_len} tokens" if has_loss_mask else "two tokens or more"
        fix = "Raise --sequence_len, or name" if has_loss_mask else "Name"
        raise UserError(f"{option}: no text in {text_column!r} has {needed}. {fix} the column that holds the text")
    if len(kept) < len(tokens):
        reason = "no target within --sequence_len" if has_loss_mask else "fewer than two tokens"
        logger.warning(f"Dropped {len(tokens) - len(kept)} of {len(tokens)} samples: {reason} in {text_column!r}.")
        tokens = tokens.select(kept)
    return tokens


def make_spec(
    tokenizer: PreTrainedTokenizerBase, text_column: str, sequence_len: int, split: bool, prepend_bos: bool, append_eos: bool
) -> TokenizeSpec:
    """Resolve start and end token, and the number of tokens left for the text."""
    bos = resolve_bos_token(tokenizer, prepend_bos)
    if prepend_bos and bos is None:
        raise UserError("--prepend_bos: the model's tokenizer has neither a start nor an end-of-text token. Leave it out")
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append_eos: the model's tokenizer has no end-of-text token. Leave it out")
    start = [] if bos is None else [bos]
    return TokenizeSpec(tokenizer, text_column, start, [tokenizer.eos_token_id] * append_eos, sequence_len - len(start), split)


def chunk_slices(row: list[int], max_tokens: int, end: list[int]) -> list[slice]:
    """Return slices of at most `max_tokens` that cut a row into pieces.

    A last piece of a single token would predict nothing, so it takes one token from the piece before. Where pieces are too short
    for that, an `end` token alone is left out.
    """
    bounds = [*range(0, max(1, len(row)), max_tokens), len(row)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        if max_tokens > 2:
            bounds[-2] -= 1
        elif row[-1:] == end:
            bounds.pop()
    return [slice(*pair) for pair in zip(bounds, bounds[1:])]


def tokenize_texts(batch: dict[str, list], spec: TokenizeSpec) -> dict[str, list]:
    """Return a batch with tokens in place of its texts; a text that is blank or has no token gets none, not even the start."""
    options: Any = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    texts = [text if text and not text.isspace() else "" for text in batch[spec.text_column]]
    rows = [row and row + spec.end for row in spec.tokenizer(texts, **options)["input_ids"]]
    if not spec.split:  # here and not by the tokenizer, which may be set to cut the beginning off
        return {"input_ids": [row and spec.start + row[: spec.max_body_tokens] for row in rows]}
    pieces = [[row and spec.start + row[cut] for cut in chunk_slices(row, spec.max_body_tokens, spec.end)] for row in rows]
    return {**repeat_columns(batch, spec.text_column, pieces), "input_ids": [piece for row in pieces for piece in row]}


def tokenize_masked(batch: dict[str, list], spec: TokenizeSpec) -> dict[str, list]:
    """Return a batch with tokens and labels in place of its examples (JSON of `chat.Example`)."""
    ids, labels = tokenize_examples(batch[spec.text_column], spec.tokenizer, spec.start, spec.end)
    prefix_length = len(spec.start)
    max_tokens = prefix_length + spec.max_body_tokens
    if not spec.split:
        return {"input_ids": [row[:max_tokens] for row in ids], "labels": [row[:max_tokens] for row in labels]}
    slices = [chunk_slices(row[prefix_length:], spec.max_body_tokens, spec.end) for row in ids]
    id_pieces, label_pieces = (
        [[row[:prefix_length] + row[prefix_length:][cut] for cut in cuts] for row, cuts in zip(rows, slices)]
        for rows in (ids, labels)
    )
    return {
        **repeat_columns(batch, spec.text_column, id_pieces),
        "input_ids": [piece for row in id_pieces for piece in row],
        "labels": [piece for row in label_pieces for piece in row],
    }


def repeat_columns(batch: dict[str, list], text_column: str, pieces: list[list]) -> dict[str, list]:
    """Repeat other columns, once per piece of a text, so that each piece keeps its author."""
    names = [name for name in batch if name != text_column]
    return {name: [value for value, row in zip(batch[name], pieces) for _ in row] for name in names}


def rows_with_targets(tokens: Dataset) -> np.ndarray:
    """Return which samples have a target after their first token, bool (samples,)."""
    masks = [np.zeros(0, bool)]
    for batch in tokens.select_columns(["labels"]).with_format("arrow").iter(2**14):
        column = batch["labels"].combine_chunks()
        lengths = pc.list_value_length(column).to_numpy()
        is_target = np.asarray(column.flatten()) != IGNORE_INDEX
        is_target[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # no token predicts the first one
        masks.append(np.bincount(np.repeat(np.arange(len(lengths)), lengths), is_target, len(lengths)) > 0)
    return np.concatenate(masks)
