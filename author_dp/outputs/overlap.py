"""Which passages of a text stand in training texts: the longest of each text, and whether one author alone wrote it.

Promise: exact, whatever the length: no hash, no sample. Words are compared without case and punctuation. A passage lies within
one text. Time is that of a few sorts: 100,000 texts in seconds.

How: a suffix array [1] of all words of all texts, by doubling; a passage at some place has its longest match beside it in that
order, above or below. Whether one author alone wrote it shows at the nearest training texts of other authors, above and below.

Example:

    >>> found = shared_passages(["one two three four"], ["a"], ["He said: two three!"])
    >>> found.longest.tolist(), found.passage(0)
    ([2], 'two three')

References:
    [1] Manber and Myers 1993, Suffix Arrays: A New Method for On-Line String Searches
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Words; each sign of a script that writes none apart (kana, Chinese characters, hangul) is one.
SIGN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{SIGN}]|[^\W{SIGN}]+")


class Passages(NamedTuple):
    """What texts share with training texts.

    Attributes:
        longest: (texts,), words of the longest passage that stands in a training text.
        longest_of_one: (texts,), of the longest one that stands in training texts of one author alone.
        places: (words,), for each place the words of the longest passage that begins there.
        of_one: (words,), whether that one stands in training texts of one author alone.
        words: of each text.
        words_of: (texts,), how many words each text has.
    """

    longest: np.ndarray
    longest_of_one: np.ndarray
    places: np.ndarray
    of_one: np.ndarray
    words: list[list[str]]
    words_of: np.ndarray

    def passage(self, text: int, of_one: bool = False) -> str:
        """Return the longest passage of a text, in words."""
        start = int(self.words_of[:text].sum())
        lengths = (self.places * self.of_one if of_one else self.places)[start : start + self.words_of[text]]
        if not len(lengths):
            return ""
        first = int(lengths.argmax())
        return " ".join(self.words[text][first : first + int(lengths[first])])


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def longest_overlaps(training: Iterable[str], authors: Sequence, texts: Iterable[str]) -> Passages:
    """Return what `texts` share with training texts.

    Args:
        authors: of each training text.
    """
    numbers: dict[str, int] = {}
    theirs = [words_of(text) for text in texts]
    rows = itertools.chain(map(words_of, training), theirs)
    ids = [np.array([numbers.setdefault(word, len(numbers)) for word in row], np.int64) for row in rows]
    lengths = np.array([len(row) for row in ids], np.int64)
    # A text ends with a word that stands nowhere else, so that no passage goes on into the next text.
    tokens = np.concatenate([np.append(row, len(numbers) + number) for number, row in enumerate(ids)] or [np.zeros(0, np.int64)])
    owner = np.repeat(np.arange(len(ids)), lengths + 1)
    codes = np.unique(np.asarray(authors), return_inverse=True)[1] if len(authors) else np.zeros(0, np.int64)
    author_of = np.concatenate([codes, np.full(len(theirs), -1)])[owner]  # (tokens,), -1 for what is asked about

    order = suffix_array(tokens)
    above, below = neighbours(author_of[order] >= 0)
    is_end = tokens >= len(numbers)
    asked = np.flatnonzero((author_of[order] < 0) & ~is_end[order])  # places in the order
    asked = asked[np.argsort(order[asked])]  # in the order of the words
    matches = []
    for near, step in ((above, -1), (below, 1)):
        place = near[asked]
        author = np.where((place >= 0) & (place < len(order)), author_of[order[place.clip(0, len(order) - 1)]], -1)
        matches.append((common_prefix_length(tokens, order, asked, place), author, other_author(author_of[order], place, step)))
    (up, author_up, other_up), (down, author_down, other_down) = matches
    best = np.maximum(up, down)
    # One author's alone: whoever else is nearest, above and below, shares less.
    alone = (best > 0) & ~((up == down) & (author_up != author_down))
    for mine, other in ((up, other_up), (down, other_down)):
        far = common_prefix_length(tokens, order, asked, other)
        alone &= ~((mine == best) & (far == best))
    asked_lengths = lengths[len(lengths) - len(theirs) :]
    return Passages(*longest_of(best, alone, asked_lengths), best, alone, theirs, asked_lengths)


def longest_of(best: np.ndarray, alone: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maximum of each text, of all passages and of those of one author; 0 for a text without words."""
    number = np.repeat(np.arange(len(lengths)), lengths)
    found = []
    for values in (best, best * alone):
        longest = np.zeros(len(lengths), np.int64)
        np.maximum.at(longest, number, values)
        found.append(longest)
    return found[0], found[1]


def suffix_array(tokens: np.ndarray) -> np.ndarray:
    """Return the places of `tokens` in the order of what begins there, (tokens,), by doubling [1]."""
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    step, count = 1, len(tokens)
    order = np.argsort(rank, kind="stable")
    while count and rank[order[-1]] < count - 1:
        key = rank * (count + 1)
        key[:-step] += rank[step:] + 1
        order = np.argsort(key, kind="stable")
        rank = np.empty(count, np.int64)
        rank[order] = np.concatenate([[0], np.cumsum(np.diff(key[order]) > 0)])
        step *= 2
    return order


def neighbours(is_training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each place in the order the nearest training place above (-1 if none) and below (len if none)."""
    places, count = np.arange(len(is_training)), len(is_training)
    above = np.maximum.accumulate(np.where(is_training, places, -1))
    below = np.minimum.accumulate(np.where(is_training, places, count)[::-1])[::-1]
    return above, below


def other_author(authors: np.ndarray, places: np.ndarray, step: int) -> np.ndarray:
    """Return for each place the nearest training place, above (step -1) or below (1), of another author than that place's.

    Args:
        authors: (order,), -1 where there is no training text.
    """
    training = np.flatnonzero(authors >= 0)
    nothing = -1 if step < 0 else len(authors)
    if not len(training):
        return np.full(len(places), nothing)
    of = authors[training]
    starts = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))  # of runs of one author
    run = np.searchsorted(starts, np.searchsorted(training, places.clip(0, len(authors) - 1)), side="right") - 1
    if step < 0:
        other = np.where(run > 0, training[starts[run] - 1], nothing)
    else:
        following = np.append(starts, len(training))[(run + 1).clip(max=len(starts))]
        other = np.where(following < len(training), training[following.clip(max=len(training) - 1)], nothing)
    return np.where((places < 0) | (places >= len(authors)), nothing, other)


def common_prefix_length(tokens: np.ndarray, order: np.ndarray, asked: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how many tokens the suffixes at two places of the order have in common, (asked,); 0 where there is no other."""
    lengths = np.zeros(len(asked), np.int64)
    active = np.flatnonzero((others >= 0) & (others < len(order)))
    ours, theirs = order[asked[active]], order[others[active]]
    while len(active):
        # Ends stand nowhere else, so that no place goes on beyond one: nothing is read beyond the last token.
        same = tokens[ours] == tokens[theirs]
        active, ours, theirs = active[same], ours[same] + 1, theirs[same] + 1
        lengths[active] += 1
    return lengths
