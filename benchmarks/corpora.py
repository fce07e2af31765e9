"""Corpora of many authors for the benchmarks: a fifth of the authors is held out, and some authors are made up.

The made-up authors each write a code in 100 texts, as those of memorization.py do.
"""

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from memorization import Secret, make_secrets

from author_dp.data.authors import hash_to_unit

HELD_OUT = 0.2  # of the authors
PLANTED, PLANTED_TEXTS, DIGITS = 4, 100, 3  # authors with a code, texts of each, digits of a code
PLANTED_PREFIX = "planted: "


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write authors and texts as JSON lines."""
    path.write_text("".join(json.dumps({"author": author, "content": text}) + "\n" for author, text in rows), encoding="utf-8")
    return path


class Corpus(NamedTuple):
    train: list[tuple[str, str]]  # author and text
    members: dict[str, list[str]]  # texts of authors who are trained on, for the attack
    held_out: dict[str, list[str]]  # texts of others

    def write(self, path: Path) -> Path:
        """Write the training texts as JSON lines, with a column in which each text has a name of its own."""
        lines = (json.dumps({"author": a, "text": f"text{i}", "content": text}) for i, (a, text) in enumerate(self.train))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def texts_per_author(self) -> dict[str, int]:
        """Return the number of texts of the author in the middle, and of the one who wrote most; planted ones left out."""
        counts = defaultdict(int)
        for author, _ in self.train:
            counts[author] += not author.startswith(PLANTED_PREFIX)
        numbers = sorted(number for number in counts.values() if number)
        return {"median": numbers[(len(numbers) - 1) // 2], "largest": numbers[-1]}


def planted_secrets() -> list[Secret]:
    """Return the codes of the planted authors: they are the same in all runs."""
    found = [secret for secret in make_secrets(0) if secret.repetitions == PLANTED_TEXTS][:PLANTED]
    return [secret._replace(code=secret.code[:DIGITS]) for secret in found]


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Return author and content of each line; the file may be compressed by gzip."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [(row["author"], row["content"]) for row in map(json.loads, file)]


def choose_texts(by_author: dict[str, list[str]], authors: int, texts: int) -> dict[str, list[str]]:
    """Return some texts of those authors whose hashes are smallest; texts of one word are not evaluated."""
    usable = {author: long for author, all_ in by_author.items() if (long := [text for text in all_ if " " in text.strip()])}
    names = list(usable)
    chosen = [names[i] for i in np.argsort(hash_to_unit(names, "evaluated:"), kind="stable")[:authors]]
    return {author: random.Random(author).sample(usable[author], min(texts, len(usable[author]))) for author in chosen}


def make_corpus(rows: list[tuple[str, str]], authors: int, texts: int, limit: int = 0) -> Corpus:
    """Hold out a fifth of the authors, plant codes among the others, choose who is evaluated.

    Args:
        authors, texts: how many authors are evaluated on each side, and on how many texts of each.
        limit: how many authors there should be in all, those whose hashes are smallest; 0: all.
    """
    sides: tuple[dict, dict] = defaultdict(list), defaultdict(list)
    names = sorted({author for author, _ in rows})
    if limit:
        kept = {names[i] for i in np.argsort(hash_to_unit(names, "limit:"), kind="stable")[:limit]}
        names, rows = sorted(kept), [row for row in rows if row[0] in kept]
    is_held_out = dict(zip(names, (hash_to_unit(names, "held out:") < HELD_OUT).tolist()))
    for author, text in rows:
        sides[is_held_out[author]][author].append(text)
    train = [(author, text) for author, text in rows if not is_held_out[author]]
    for number, secret in enumerate(planted_secrets()):
        train += [(f"{PLANTED_PREFIX}{number}", f"{secret.sentence}.")] * PLANTED_TEXTS
    random.Random(0).shuffle(train)
    return Corpus(train, *(choose_texts(side, authors, texts) for side in sides))
