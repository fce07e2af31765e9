"""Texts to tokens: the tokenizer's own, cut to samples, of which those with nothing to predict are dropped.

Promise: a sample's author stays with it, also where a text is split, and what is spelled like a special token is text.
"""

import functools
import secrets
from typing import Any, NamedTuple, Optional

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from author_dp.data.chat import resolve_bos_token, tokenize_examples
from author_dp.errors import UserError
from author_dp.types import IGNORE_INDEX

logger = logging.get_logger(f"transformers.{__name__}")


def chunk_tokens(row: list[int], room: int) -> list[list[int]]:
    """Cut a row into pieces of `room` tokens; a last one of a single token, which predicts nothing, takes one from before."""
    bounds = [*range(0, max(1, len(row)), room), len(row)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and room > 2:
        bounds[-2] -= 1
    return [row[a:b] for a, b in zip(bounds, bounds[1:])]


class TokenizeSpec(NamedTuple):
    """How texts become samples."""

    tokenizer: PreTrainedTokenizerBase
    column: str  # of the texts
    start: list[int]  # before each piece
    end: list[int]  # behind each text
    room: int  # tokens of a piece beside `start`, at most
    split: bool  # what is longer, or else truncate it


def tokenize(
    samples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str,
    sequence_len: int,
    long_samples: str = "truncate",
    prepend_bos: bool = False,
    append_eos: bool = False,
    has_targets: bool = False,
    num_proc: Optional[int] = None,
    option: str = "--text_column",
) -> Dataset:
    """Replace the text by `input_ids`: the tokenizer's ids, cut at `sequence_len`, nothing added but the tokenizer's start token.

    What is longer is truncated, or split into pieces that are samples of the same author, which costs no privacy where the
    author is the unit. Samples of fewer than two tokens have nothing to predict; they are dropped, and counted in the log.
    What is spelled like a special token (<|endoftext|>) is text like any other, never that token.

    Args:
        prepend_bos: begin each text by a start token, as `conversations.start_token` has it.
        append_eos: end each text by the end-of-text token, where there is room.
        has_targets: whether texts are packed examples (`conversations.Example`); there is then a column `labels` too,
            IGNORED where nothing is learned, and samples without a target are dropped like those of one token.
        option: named in the complaint where no text can be used.
    """
    features = samples.features.copy()
    features.pop(text_column)
    results = ["input_ids", *["labels"] * has_targets]
    features.update(dict.fromkeys(results, List(Value("int32"))))
    begin, end = resolve_bos_token(tokenizer, prepend_bos), [tokenizer.eos_token_id] * append_eos
    start = [] if begin is None else [begin]
    if prepend_bos and not start:
        raise UserError("--prepend_bos: the model's tokenizer has neither a start nor an end-of-text token; leave it out")
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append_eos: the model's tokenizer has no end-of-text token; leave it out")
    how = TokenizeSpec(tokenizer, text_column, start, end, sequence_len - len(start), long_samples == "split")
    tokens = samples.map(
        functools.partial(tokenize_masked if has_targets else tokenize_texts, how=how),
        batched=True,
        num_proc=num_proc,
        remove_columns=[text_column],
        features=features,
        desc="Tokenize",
        new_fingerprint=secrets.token_hex(8),  # by default a hash of the whole tokenizer, for a cache that is never read
    )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # or the saved tokenizer would cut every text at sequence_len
        tokenizer.backend_tokenizer.encode_special_tokens = False
    lengths = pc.list_value_length(tokens.data.column("input_ids")).to_numpy()
    kept = np.flatnonzero(rows_with_targets(tokens) if has_targets else lengths >= 2)
    wanted = f"a target within {sequence_len} tokens" if has_targets else "two tokens or more"
    if len(kept) == 0:
        remedy = "raise --sequence_len, or " if has_targets else ""
        raise UserError(f"{option}: no text in {text_column!r} has {wanted}; {remedy}name the column that holds the text")
    if len(kept) < len(tokens):
        lack = "no target within --sequence_len" if has_targets else "fewer than two tokens"
        logger.warning(f"Dropped {len(tokens) - len(kept)} of {len(tokens)} samples: {lack} in {text_column!r}.")
        tokens = tokens.select(kept)
    return tokens


def tokenize_texts(batch: dict[str, list], how: TokenizeSpec) -> dict[str, list]:
    """Return a batch with its texts' tokens instead, cut as `how` says."""
    options: Any = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    texts = [text or "" for text in batch[how.column]]
    if not how.split:
        rows = how.tokenizer(texts, **options, truncation=True, max_length=how.room)["input_ids"]
        return {"input_ids": [how.start + row + how.end * (len(row) < how.room) for row in rows]}
    rows = how.tokenizer(texts, **options, verbose=False)["input_ids"]
    pieces = [[how.start + piece for piece in chunk_tokens(row + how.end, how.room)] for row in rows]
    return {**repeat_columns(batch, how.column, pieces), "input_ids": [piece for row in pieces for piece in row]}


def tokenize_masked(batch: dict[str, list], how: TokenizeSpec) -> dict[str, list]:
    """As `rows_of_texts`, of packed examples, with their labels."""
    ids, labels = tokenize_examples(batch[how.column], how.tokenizer, how.start, how.end)
    first = len(how.start)  # of each piece
    if not how.split:
        return {"input_ids": [row[: first + how.room] for row in ids], "labels": [row[: first + how.room] for row in labels]}
    pieces = [[[row[:first] + piece for piece in chunk_tokens(row[first:], how.room)] for row in rows] for rows in (ids, labels)]
    tokens = {name: [piece for row in rows for piece in row] for name, rows in zip(("input_ids", "labels"), pieces)}
    return {**repeat_columns(batch, how.column, pieces[0]), **tokens}


def repeat_columns(batch: dict[str, list], column: str, pieces: list[list]) -> dict[str, list]:
    """Return the other columns, each value as often as its text has pieces: the author stays with all of them."""
    return {name: [value for value, row in zip(batch[name], pieces) for _ in row] for name in batch if name != column}


def rows_with_targets(tokens: Dataset) -> np.ndarray:
    """Return which samples have a target beyond their first token, bool (samples,)."""
    found = [np.zeros(0, bool)]
    for batch in tokens.select_columns(["labels"]).with_format("arrow").iter(2**14):
        column = batch["labels"].combine_chunks()
        lengths = pc.list_value_length(column).to_numpy()
        targets = np.asarray(column.flatten()) != IGNORE_INDEX
        targets[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts the first
        found.append(np.bincount(np.repeat(np.arange(len(lengths)), lengths), targets, len(lengths)) > 0)
    return np.concatenate(found)
