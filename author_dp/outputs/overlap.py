"""Find word n-grams that texts share with training texts, and the authors who wrote them.

Memorization is commonly measured by n-grams of fixed length: 8 to 13 words [1], or 50 tokens [2]. Words are compared without case
and punctuation, and an n-gram lies within one text. N-grams are compared by 64-bit hashes: with ten million on each side, the
probability of any false match is about 1e-5. Memory is about 100 bytes for each word.

Example:

    >>> texts, training = hash_ngrams(hash_words(["one two three"]), 2), hash_ngrams(hash_words(["He said: TWO, three!"]), 2)
    >>> find_overlap(texts, training, authors=np.array([0])).shared
    array([False,  True])

References:
    [1] Brown et al. 2020, Language Models are Few-Shot Learners, arXiv 2005.14165, appendix C (8 to 13 words)
    [2] Carlini et al. 2023, Quantifying Memorization Across Neural Language Models, arXiv 2202.07646
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

# A word; each character of a script without spaces (kana, Chinese characters, hangul) is one.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash modulo 2^64; odd, so that no word's bits are lost


class OverlapHashes(NamedTuple):
    """Hashes of words or n-grams, in the order of the texts.

    Attributes:
        values: (words,) uint64.
        text: (words,) int32, index of the text that each belongs to.
        position: (words,) int32, index in the text of its first word.
    """

    values: np.ndarray
    text: np.ndarray
    position: np.ndarray


class Overlap(NamedTuple):
    """What n-grams have in common with those of training texts.

    Attributes:
        shared: bool (ngrams,), whether a training text holds it.
        single_author: bool (ngrams,), whether exactly one training author wrote it.
        num_authors: number of training authors who wrote any of them.
    """

    shared: np.ndarray
    single_author: np.ndarray
    num_authors: int


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def hash_words(texts: Iterable[str]) -> OverlapHashes:
    """Return the hash of each word of each text."""
    # Python's hash is keyed anew in each process: nobody can choose words that collide.
    hashes = [np.array([hash(word) for word in words_of(text)], np.int64) for text in texts]
    lengths = [len(row) for row in hashes]
    values = np.concatenate([*hashes, np.zeros(0, np.int64)]).view(np.uint64)
    text = np.repeat(np.arange(len(hashes), dtype=np.int32), lengths)
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32) if lengths else np.zeros(0, np.int32)
    return OverlapHashes(values, text, np.arange(len(values), dtype=np.int32) - starts[text])


def hash_ngrams(words: OverlapHashes, length: int) -> OverlapHashes:
    """Return the hash of each n-gram of `length` words."""
    size = max(0, len(words.values) - length + 1)
    within_text = words.text[:size] == words.text[len(words.text) - size :]
    values = np.zeros(size, np.uint64)
    for offset in range(length):
        values *= BASE
        values += words.values[offset : offset + size]
    return OverlapHashes(values[within_text], words.text[:size][within_text], words.position[:size][within_text])


def find_overlap(ngrams: OverlapHashes, training: OverlapHashes, authors: np.ndarray) -> Overlap:
    """Return which n-grams are in training texts.

    Args:
        training: n-grams of the training texts, of the same length.
        authors: (training texts,) integers, the author of each training text.
    """
    is_match = are_among(training.values, ngrams.values)
    authors = authors[training.text[is_match]]
    pairs = pd.DataFrame({"ngram": training.values[is_match], "author": authors}).drop_duplicates()
    authors_of_ngram = pairs["ngram"].value_counts()
    shared = are_among(ngrams.values, authors_of_ngram.index.to_numpy())
    single_author = are_among(ngrams.values, authors_of_ngram.index[authors_of_ngram == 1].to_numpy())
    return Overlap(shared, single_author, len(pd.unique(authors)))


def are_among(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each value whether it is among the others; by a hash table, as np.isin and np.unique take ten times longer."""
    return pd.Series(values).isin(others).to_numpy()
