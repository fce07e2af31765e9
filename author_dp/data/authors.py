"""Who counts as an author: values compared exactly, and warnings where a value may not be one person.

Promise: two samples have the same author if and only if their author values are equal, character by character.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from author_dp.errors import UserError

PLACEHOLDER_AUTHORS = [
    "[deleted]", "[removed]", "deleted", "removed", "anonymous", "anon", "unknown", "nobody", "none", "null", "nan", "n/a", "na",
    "guest", "undefined", "unspecified", "no author", "?", "-",
]  # fmt: skip
LARGE_SHARE = 0.03  # of all samples
BATCH_ROWS = 2**16  # that are looked at at once
HASH_WORDS = 3  # that a text needs to be told from others


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


def get_column(samples: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column without a detour over Python objects, or over the other columns."""
    return samples.select_columns([name]).with_format("arrow")[:][name]


def hash_to_unit(authors: list, prefix: str) -> np.ndarray:
    """Return for each author a number in [0, 1), float64 (authors,), that depends on the author's value and `prefix` alone."""
    return hash_authors(authors, prefix) / 2.0**64


def hash_authors(authors: list, prefix: str) -> np.ndarray:
    """Return for each author 64 bits that depend on the author's value and `prefix` alone, uint64 (authors,)."""
    found = [hashlib.blake2b(f"{prefix}{author}".encode(), digest_size=8).digest() for author in authors]
    return np.frombuffer(b"".join(found), dtype=">u8")


def holdout_scores(authors: list, seed: int) -> np.ndarray:
    """Return for each author a number in [0, 1), (authors,): those below --eval_fraction are held out."""
    return hash_to_unit(authors, f"{seed}:")


def split_id(seed: int, eval_fraction: float, author_column: str) -> str:
    """Return a name of the rule that holds authors out: with one name, who is held out is never trained on."""
    rule = f"{seed}:{eval_fraction}:{author_column}"  # other values are other authors, of the same people
    return hashlib.sha256(rule.encode()).hexdigest()[:16]


def suspicious_author_warnings(samples: Dataset, text_column: str, author_column: str) -> list[str]:
    """Return warnings of authors who stand for nobody or for many, and of texts that stand under several authors.

    The guarantee holds for them as for all, but is not what it seems: a person behind "[deleted]" is one of many in that author,
    and one whose text stands under another name too is not hidden by the removal of one of them.
    """
    values = encode_authors(get_column(samples, author_column))
    codes, counts = values.indices.to_numpy(), np.bincount(values.indices)
    names = pc.utf8_lower(pc.utf8_trim_whitespace(values.dictionary))
    warnings = []
    nobody = np.flatnonzero(pc.is_in(names, value_set=pa.array(PLACEHOLDER_AUTHORS, names.type)).to_numpy(zero_copy_only=False))
    if len(nobody):
        shown = ", ".join(repr(values.dictionary[i].as_py()) for i in nobody[:5])
        warnings.append(
            f"--author_column {author_column!r}: {shown} may stand for many people or nobody, with {counts[nobody].sum():,} of "
            f"{len(samples):,} samples: together they are protected as one author; leave them out, or tell them apart"
        )
    for i in np.flatnonzero(counts > len(samples) * max(LARGE_SHARE, LARGE_SHARE * 100 / len(counts)))[:5]:
        warnings.append(
            f"--author_column {author_column!r}: {values.dictionary[i].as_py()!r} has {counts[i] / len(samples):.0%} of all "
            "samples: is it one author?"
        )
    texts = samples.select_columns([text_column]).with_format("arrow").iter(BATCH_ROWS)
    hashes = np.concatenate([hash_texts(batch[text_column]) for batch in texts])
    order = np.lexsort((codes, hashes))
    hashes, codes = hashes[order], codes[order]
    again = (hashes[1:] == hashes[:-1]) & (codes[1:] != codes[:-1]) & (hashes[1:] != 0)
    if again.any():
        several = np.unique(hashes[1:][again])
        warnings.append(
            f"--text_column {text_column!r}: {len(several):,} texts of {HASH_WORDS} words or more stand word for word under "
            f"several authors, in {np.isin(hashes, several).sum():,} of {len(samples):,} samples: text under two names "
            "is not hidden by leaving out one of them"
        )
    return warnings


def hash_texts(texts: pa.ChunkedArray) -> np.ndarray:
    """Return int64 (texts,): equal for equal texts, 0 for those too short to be told from others."""
    return np.array([hash(text) if text.count(" ") >= HASH_WORDS - 1 else 0 for text in texts.to_pylist()], np.int64)
