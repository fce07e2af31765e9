"""Read authors and texts from files, exactly as written.

Guarantees: an author is the text in the file, from the first byte to the last. Nothing is guessed, trimmed or converted ("007",
"NA", "2024-01-01" and a JSON number stay as written). What cannot be read exactly is an error that names the file, the line (or
the row, in Parquet) and the fix. Authors of several types in one or several files (1 and "1") are an error too: one author could
count as two.

All formats may be compressed, .gz or .zst. Memory is that of a batch, whatever the size of the file; for a .json file that holds
one array, that of its text.

Example:

    >>> for batch in read_files(["comments.jsonl.gz"], ColumnSpec("--train_file", text="body", author="user")):
    ...     batch.column("user"), batch.column("body")  # both large_string
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pyarrow as pa

from author_dp.data.columns import (
    ColumnRow,
    ColumnSpec,
    check_author_column_type,
    check_unique,
    encoding_error,
    missing_author_column_error,
    split_suffix,
    unreadable_error,
)
from author_dp.data.csv_reader import csv_records, read_csv
from author_dp.data.json_reader import json_objects, read_json
from author_dp.data.parquet_reader import decompressed_parquet, read_open_parquet, read_parquet_rows
from author_dp.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
BATCH_ROWS, BATCH_CHARACTERS = 2**16, 2**24  # a record batch ends where either is reached
BYTE_ORDER_MARK = "\ufeff"


def read_files(
    files: Iterable[str], columns: ColumnSpec, author_types: Optional[dict[str, str]] = None
) -> Iterator[pa.RecordBatch]:
    """Read the author and the text column of several files, in order.

    Args:
        author_types: type of the authors in files read before, and where the first one was; this call adds to it.
    Yields:
        record batches of two columns, named as in `columns`: authors as large_string, texts as large_string or EXAMPLE_TYPE. A
        missing text is "", a missing example is null.
    Raises:
        UserError: with file, line or row, and fix.
    """
    author_types = {} if author_types is None else author_types
    for name in files:
        suffix, compression = split_suffix(name)
        with unreadable_as_user_error(name, columns):
            if suffix == ".parquet":
                with decompressed_parquet(name, compression) as source:
                    yield from read_open_parquet(source, name, columns, author_types)
            else:
                read = read_csv if suffix == ".csv" else read_json
                rows = read(decoded_lines(name, compression, columns), name, columns)
                yield from to_record_batches(rows, name, columns, author_types)


def read_rows(name: str, option: str = "--prompts") -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with all columns; numbers of JSON and CSV are as written.

    Raises:
        UserError: with file, line or row, and fix.
    """
    suffix, compression = split_suffix(name)
    columns = ColumnSpec(option, "", "")
    if suffix not in FORMATS:
        raise UserError(f"{option} {name}: unknown format. Give a {', '.join(FORMATS)} file (or these with .gz or .zst)")
    with unreadable_as_user_error(name, columns):
        if not Path(name).is_file():
            raise UserError(f"{option} {name}: no such file. Check the path")
        if suffix == ".parquet":
            yield from read_parquet_rows(name, compression, columns)
        elif suffix == ".csv":
            records = csv_records(decoded_lines(name, compression, columns), name, columns)
            _, header = next(records, (0, []))
            check_unique(header, name, option)
            yield from (dict(zip(header, values)) for _, values in records)
        else:
            yield from (value for _, value in json_objects(decoded_lines(name, compression, columns), name, columns))


@contextmanager
def unreadable_as_user_error(name: str, columns: ColumnSpec) -> Iterator[None]:
    """Turn errors of the file system and of Arrow into a UserError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise unreadable_error(name, columns, error) from error


def decoded_lines(name: str, compression: Optional[str], columns: ColumnSpec) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without its byte order mark. Only \\n ends a line."""
    with io.BufferedReader(pa.input_stream(name, compression=compression), 2**20) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise encoding_error(name, f"line {number}", columns) from error
            yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def to_record_batches(
    rows: Iterable[ColumnRow], name: str, columns: ColumnSpec, author_types: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    """Check the authors of rows, and collect the rows into record batches."""
    batch: list[ColumnRow] = []
    characters = 0
    for row in rows:
        if row.author is None or not row.author.strip():
            raise missing_author_column_error(name, row.place, columns)
        if row.author_type not in author_types:
            check_author_column_type(row.author_type, f"{name}, {row.place}", author_types, columns)
        batch.append(row)
        characters += len(characters_of(row))
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield to_record_batch(batch, name, columns)
            batch, characters = [], 0
    if batch:
        yield to_record_batch(batch, name, columns)


def to_record_batch(rows: list[ColumnRow], name: str, columns: ColumnSpec) -> pa.RecordBatch:
    """Return rows as a record batch of author and text."""
    missing = "" if columns.as_text is None else None
    try:
        arrays = [
            pa.array([row.author for row in rows], pa.large_string()),
            pa.array([row.text or missing for row in rows], columns.text_type),
        ]
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape but no text can hold
        place = next(row.place for row in rows if not is_encodable(f"{row.author}{characters_of(row)}"))
        raise UserError(f"{columns.option} {name}: {place} holds half of a character (a lone surrogate). Fix the line") from error
    return pa.record_batch(arrays, names=[columns.author, columns.text])


def characters_of(row: ColumnRow) -> str:
    """Return the characters of a row's text or example."""
    return (row.text["text"] if isinstance(row.text, dict) else row.text) or ""


def is_encodable(value: str) -> bool:
    """Return whether UTF-8 can hold a text."""
    return value.encode(errors="ignore").decode() == value
