"""Identify authors by exact values, hash them, and warn where a value may not be one person.

Guarantees: two samples have the same author if and only if their author values are equal, character by character.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from author_dp.data.columns import get_column
from author_dp.errors import UserError

PLACEHOLDER_AUTHORS = [
    "[deleted]", "[removed]", "deleted", "removed", "anonymous", "anon", "unknown", "nobody", "none", "null", "nan", "n/a", "na",
    "guest", "undefined", "unspecified", "no author", "?", "-",
]  # fmt: skip
PLACEHOLDER_TEXTS = ["[deleted]", "[removed]"]  # by Reddit, for a text that is gone
LARGE_SHARE = 0.03  # of all samples
BATCH_ROWS = 2**16
SAME_TYPES: dict[type, tuple[type, ...]] = {  # bool before int, as Python's is a kind of it
    bool: (bool, np.bool_), int: (int, np.integer), float: (float, np.floating), str: (str,), bytes: (bytes,),
    datetime: (datetime,),
}  # fmt: skip
MIN_WORDS = 3  # of a text that is compared with others; shorter ones coincide by chance


def encode_authors(authors: Sequence | pa.ChunkedArray) -> pa.DictionaryArray:
    """Number the authors in order of first appearance.

    Raises:
        UserError: for a missing author, or values that are not scalars of one type.
    """
    try:
        if isinstance(authors, pa.ChunkedArray):
            values = authors.combine_chunks()
        else:
            check_author_types(authors)
            values = pa.array(authors)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:  # also surrogates, and large integers
        raise UserError(f"authors: they must be scalars of one type ({error}). Write all of them as strings") from error
    if values.null_count or (pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py()):
        raise UserError("authors: one is missing. Remove such samples, or give each an author")
    if pa.types.is_nested(values.type):
        raise UserError(f"authors: they must be scalars of one type, not {values.type}. Write all of them as strings")
    return values.dictionary_encode()


def check_author_types(authors: Iterable) -> None:
    """Raise TypeError for values of several types: Arrow would make some equal, such as days and times, or text and bytes."""
    found = {
        next((kind.__name__ for kind, others in SAME_TYPES.items() if issubclass(one, others)), one.__name__)
        for one in {type(author) for author in authors}
    }
    if "datetime" in found:
        zones = {getattr(author, "tzinfo", None) is None for author in authors if author is not None}
        found |= {"datetime with a time zone"} if False in zones else set()
        found -= set() if True in zones else {"datetime"}
    if len(found - {"NoneType"}) > 1:
        raise TypeError(f"not of {', '.join(sorted(found))}")


def hash_authors(authors: list, prefix: str) -> np.ndarray:
    """Return 64 bits for each author, uint64 (authors,), from the author's value and `prefix` only."""
    digests = [hashlib.blake2b(f"{prefix}{author}".encode(), digest_size=8).digest() for author in authors]
    return np.frombuffer(b"".join(digests), dtype=">u8")


def hash_to_unit(authors: list, prefix: str) -> np.ndarray:
    """Return `hash_authors` as numbers in [0, 1), float64 (authors,)."""
    return hash_authors(authors, prefix) / 2.0**64


def suspicious_author_warnings(
    samples: Dataset, text_column: str, author_column: str, text_option: str = "--text_column"
) -> list[str]:
    """Return warnings about placeholder authors and texts, very large authors, repeated texts, and texts of several authors.

    The guarantee holds for them, but protects less than it seems to. A person behind "[deleted]" is one of many in that author.
    A person whose text is also under another name is not hidden by removing one of the names.

    Args:
        text_option: the option that names `text_column`.
    """
    values = encode_authors(get_column(samples, author_column))
    codes, counts = values.indices.to_numpy(), np.bincount(values.indices)
    names = pc.utf8_lower(pc.utf8_trim_whitespace(values.dictionary))
    warnings = []
    is_placeholder = pc.is_in(names, value_set=pa.array(PLACEHOLDER_AUTHORS, names.type))
    placeholders = np.flatnonzero(is_placeholder.to_numpy(zero_copy_only=False))
    if len(placeholders):
        shown = ", ".join(repr(values.dictionary[i].as_py()) for i in placeholders[:5])
        warnings.append(
            f"--author_column {author_column!r}: {shown} may stand for many people or nobody, with "
            f"{counts[placeholders].sum():,} of {len(samples):,} samples. Together they are protected as one author. Leave them "
            "out, or give each person a name"
        )
    for i in np.flatnonzero(counts > len(samples) * max(LARGE_SHARE, LARGE_SHARE * 100 / len(counts)))[:5]:
        warnings.append(
            f"--author_column {author_column!r}: {values.dictionary[i].as_py()!r} has {counts[i] / len(samples):.0%} of all "
            "samples. Check that it is one author"
        )
    texts = samples.select_columns([text_column]).with_format("arrow").iter(BATCH_ROWS)
    hashes, is_long = (np.concatenate(parts) for parts in zip(*(hash_texts(batch[text_column]) for batch in texts)))
    order = np.lexsort((codes, hashes))  # equal texts side by side, and in them those of one author
    hashes, codes, is_long = hashes[order], codes[order], is_long[order]
    same_text, same_author = hashes[1:] == hashes[:-1], codes[1:] == codes[:-1]
    # A placeholder may be many people, whose texts may be equal by chance.
    if repeated := int((same_text & same_author & ~np.isin(codes[1:], placeholders)).sum()):
        warnings.append(
            f"{text_option} {text_column!r}: {repeated:,} of {len(samples):,} samples repeat a text of the same author, and "
            "count again. If the author wrote so twice, all is well; if a file was joined twice, remove the copies"
        )
    if num_gone := np.isin(hashes, [hash(text) for text in PLACEHOLDER_TEXTS]).sum():
        warnings.append(
            f"{text_option} {text_column!r}: {num_gone:,} of {len(samples):,} samples are {' or '.join(PLACEHOLDER_TEXTS)}, in "
            "place of a text that is gone. Remove them, or the model learns to write so"
        )
    if len(shared := np.unique(hashes[1:][same_text & ~same_author & is_long[1:]])):
        warnings.append(
            f"{text_option} {text_column!r}: texts of {MIN_WORDS} words or more that have several authors each: {len(shared):,}, "
            f"in {np.isin(hashes, shared).sum():,} of {len(samples):,} samples. Leaving out one of these authors does not hide "
            "the text"
        )
    return warnings


def hash_texts(texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes, int64 (texts,), equal for equal texts, and whether each text has MIN_WORDS words or more, bool (texts,).

    Args:
        texts: texts, or examples that hold them (columns.EXAMPLE_TYPE).
    """
    values = (pc.struct_field(texts, "text") if pa.types.is_struct(texts.type) else texts).to_pylist()
    is_long = [text.count(" ") >= MIN_WORDS - 1 for text in values]
    return np.array([hash(text) for text in values], np.int64), np.array(is_long, bool)
