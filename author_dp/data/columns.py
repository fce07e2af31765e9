"""Columns to read from files, the rows they give, and the errors that name file, place and fix."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pyarrow as pa
from datasets import Dataset

from author_dp.errors import UserError, first_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXAMPLE_TYPE = pa.struct({"text": pa.large_string(), "targets": pa.list_(pa.list_(pa.int32())), "is_templated": pa.bool_()})
ZSTD_WINDOW_MESSAGE = "Frame requires too much memory"  # of zstd's library, for `zstd --long`


class ColumnSpec(NamedTuple):
    """Columns to read, and the options that errors name."""

    option: str  # that names the files
    text: str
    author: str
    prompt: Optional[str] = None  # precedes the text, as the first argument of `as_text`
    as_text: Optional[Callable[..., Any]] = None  # makes a `chat.ChatExample` of the values in `text_columns`; raises ValueError
    text_option: str = "--text_column"
    prompt_option: str = "--prompt_column"

    @property
    def text_columns(self) -> list[str]:
        """Return the columns that make a text, in order."""
        return [self.text] if self.prompt is None else [self.prompt, self.text]

    @property
    def text_type(self) -> pa.DataType:
        """Return the type of the texts that are read."""
        return pa.large_string() if self.as_text is None else EXAMPLE_TYPE

    @property
    def schema(self) -> pa.Schema:
        """Return the columns of samples."""
        return pa.schema({self.text: self.text_type, self.author: pa.large_string()})

    @property
    def by_option(self) -> list[tuple[str, str]]:
        """Return pairs of option and column."""
        prompt = [] if self.prompt is None else [(self.prompt_option, self.prompt)]
        return [(self.text_option, self.text), *prompt, ("--author_column", self.author)]

    def author_of(self, name: str) -> str:
        """Return the beginning of an error about the authors of a file."""
        return f"--author_column {self.author!r} of {self.option} {name}"

    def text_of(self, name: str) -> str:
        """Return the beginning of an error about the texts of a file."""
        return f"{self.text_option} {self.text!r} of {self.option} {name}"


class ColumnRow(NamedTuple):
    """One sample as written in a file."""

    author: Optional[str]
    text: Any  # a text, or the fields of a `chat.ChatExample`; None where it is missing
    author_type: str  # in words, for errors
    line: int  # where the row begins; 0 where only rows are counted
    number: int  # of the row, from 1

    @property
    def place(self) -> str:
        return format_place(self.line, self.number)


def format_place(line: int, number: int) -> str:
    """Return where a row is, for errors; `line` is 0 where only rows are counted."""
    return f"line {line} (row {number})" if line else f"row {number}"


def split_suffix(name: str) -> tuple[str, Optional[str]]:
    """Return format and compression of a file by its name: "a.csv.gz" gives (".csv", "gzip")."""
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def format_text_columns(name: str, place: str, values: list[Any], columns: ColumnSpec) -> Optional[dict[str, Any]]:
    """Return the fields of the example that `columns.as_text` makes of a row's values; None where it is missing.

    Raises:
        UserError: with the place, where it makes none.
    """
    assert columns.as_text is not None
    try:
        return (example := columns.as_text(*values)) and example._asdict()
    except ValueError as error:
        raise UserError(f"{columns.text_of(name)}, {place}: it {error}") from error


def check_columns(columns: ColumnSpec, names: list[str], file: str) -> None:
    """Raise UserError unless a file has each column once."""
    for option, column in columns.by_option:
        if column not in names:
            found, fix = f"Its columns are {', '.join(map(str, names))}", "Name one of them"
            if len(names) == 1 and any(separator in str(names[0]) for separator in ";\t|"):
                found, fix = f"Its only column is {names[0]!r}", "Separate columns by commas"
            raise UserError(f"{option} {column!r}: no such column in {columns.option} {file}. {found}. {fix}")
        if names.count(column) > 1:
            raise UserError(
                f"{option} {column!r}: {names.count(column)} columns of {columns.option} {file} are called so. Rename all but one"
            )


def check_distinct_files(option: str, files: list[str]) -> None:
    """Raise UserError where two names mean one file: by another spelling, a symbolic or a hard link."""
    names: dict[tuple[int, int], list[str]] = {}
    for name in files:
        status = os.stat(name)
        names.setdefault((status.st_dev, status.st_ino), []).append(name)
    for name, *others in names.values():
        if others:
            also = "".join(f", as {other} too" for other in sorted({*others} - {name}))
            raise UserError(
                f"{option} {name}: it is named {len(others) + 1} times{also}, so its samples would count as often. Name it once"
            )


def check_unique(names: list[str], file: str, option: str) -> None:
    """Raise UserError where two columns have one name: the last one's values would win."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{option} {file}: {names.count(name)} columns are called {name!r}. Rename all but one")


def check_author_column_type(author_type: str, place: str, author_types: dict[str, str], columns: ColumnSpec) -> None:
    """Record where the first author of a type is; raise UserError for a second type."""
    for other, other_place in author_types.items():
        raise UserError(
            f"--author_column {columns.author!r} of {columns.option}: {place} holds {author_type}, {other_place} holds {other}. "
            "Write all authors alike, best as strings: one author could count as two"
        )
    author_types[author_type] = place


# --- errors -----------------------------------------------------------------------------------------------


def missing_author_column_error(name: str, place: str, columns: ColumnSpec) -> UserError:
    return UserError(f"{columns.author_of(name)}: it is empty in {place}. Remove such rows, or give each an author")


def author_column_error(name: str, place: str, value: Any, columns: ColumnSpec) -> UserError:
    return UserError(
        f"{columns.author_of(name)}: it holds {str(value)[:40]!r} in {place}, neither text nor a number. Write authors as strings"
    )


def text_column_error(name: str, place: str, value: Any, columns: ColumnSpec) -> UserError:
    return UserError(
        f"{columns.text_of(name)}: it holds {str(value)[:40]!r} in {place}, not text. Name another column, or fix the row"
    )


def encoding_error(name: str, place: str, columns: ColumnSpec) -> UserError:
    return UserError(f"{columns.option} {name}: {place} is not UTF-8. Save the file as UTF-8")


def unreadable_error(name: str, columns: ColumnSpec, error: BaseException | str) -> UserError:
    if ZSTD_WINDOW_MESSAGE in str(error):
        return UserError(
            f"{columns.option} {name}: its zstd window is larger than 128 MiB, as in Reddit's dumps. Decompress it with "
            f"`zstd -d --long=31 {shlex.quote(name)}`, and give the result"
        )
    reason = error if isinstance(error, str) else f"{first_line(error)}. Fix the file, or save it again"
    return UserError(f"{columns.option} {name}: it cannot be read as {split_suffix(name)[0]}: {reason}")


def get_column(samples: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column as Arrow data, without converting it to Python objects or reading other columns."""
    return samples.select_columns([name]).with_format("arrow")[:][name]
