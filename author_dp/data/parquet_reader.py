"""Read Parquet files column by column, with exact author values and verified checksums."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from author_dp.data.columns import (
    ColumnSpec,
    author_column_error,
    check_author_column_type,
    check_columns,
    check_unique,
    encoding_error,
    format_text_columns,
    missing_author_column_error,
    text_column_error,
    unreadable_error,
)

BATCH_ROWS = 2**12


def read_parquet_rows(name: str, compression: Optional[str], columns: ColumnSpec) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with all columns, as Python values."""
    with decompressed_parquet(name, compression) as source:
        file = open_parquet(source, name, columns)
        check_unique(file.schema_arrow.names, name, columns.option)
        for batch in file.iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


@contextmanager
def decompressed_parquet(name: str, compression: Optional[str]) -> Iterator[Any]:
    """Give the path of a file, or a decompressed copy in the system's temporary directory."""
    if not compression:
        yield name
        return
    with tempfile.TemporaryFile() as copy:
        with pa.input_stream(name, compression=compression) as file:
            shutil.copyfileobj(file, copy)
        yield pa.PythonFile(copy)


def open_parquet(source: Any, name: str, columns: ColumnSpec) -> pq.ParquetFile:
    """Open a path or an open file object as one Parquet file."""
    file = pq.ParquetFile(source, page_checksum_verification=True)
    check_parquet_not_concatenated(source, file.metadata, name, columns)
    return file


def read_open_parquet(source: Any, name: str, columns: ColumnSpec, author_types: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield authors and texts of a file, as `readers.read_files` does.

    Args:
        source: path or open file object.
    """
    file = open_parquet(source, name, columns)
    check_columns(columns, file.schema_arrow.names, name)
    wanted = [columns.author, *columns.text_columns]
    author, *texts = (file.schema_arrow.field(column).type for column in wanted)
    if (author_type := describe_parquet_author_type(author)) is None:
        raise author_column_error(name, "column", author, columns)
    if columns.as_text is None and not (pa.types.is_null(texts[0]) or describe_parquet_author_type(texts[0]) == "a string"):
        raise text_column_error(name, "column", texts[0], columns)
    has_dots = any("." in column for column in wanted)  # a dot would name a field inside a column: then read all columns
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=None if has_dots else wanted):
        authors = parquet_to_strings(batch.column(columns.author), columns.author, name, start, columns)
        blank = pc.or_kleene(pc.is_null(authors), pc.equal(pc.utf8_trim_whitespace(pc.fill_null(authors, "")), ""))
        if (row := pc.index(blank, True).as_py()) >= 0:
            raise missing_author_column_error(name, f"row {start + row + 1}", columns)
        if author_type not in author_types and len(batch):
            check_author_column_type(author_type, f"{name}, row {start + 1}", author_types, columns)
        texts = read_parquet_texts(batch, name, start, columns)
        start += len(batch)
        yield pa.record_batch([authors, texts], names=[columns.author, columns.text])


def read_parquet_texts(batch: pa.RecordBatch, name: str, start: int, columns: ColumnSpec) -> pa.Array:
    """Return the texts or examples of a batch whose first row is `start`, counted from 0."""
    if columns.as_text is None:
        return pc.fill_null(parquet_to_strings(batch.column(columns.text), columns.text, name, start, columns), "")
    try:
        rows = list(zip(*(batch.column(column).to_pylist() for column in columns.text_columns)))
    except UnicodeDecodeError as error:
        raise encoding_error(name, f"column {columns.text!r}", columns) from error
    texts = [format_text_columns(name, f"row {number}", list(row), columns) for number, row in enumerate(rows, start + 1)]
    return pa.array(texts, columns.text_type)


def check_parquet_not_concatenated(source: Any, metadata: pq.FileMetaData, name: str, columns: ColumnSpec) -> None:
    """Raise UserError for several Parquet files in one.

    The last footer would be read with the first file's rows.
    """
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    starts = (min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset) for chunk in chunks)
    end = max((start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)), default=4)
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        file.seek(end)
        if b"PAR1PAR1" in file.read():  # end of one file, start of the next; otherwise only indexes follow the rows
            raise unreadable_error(name, columns, "it is several Parquet files in one. Give them separately")


def describe_parquet_author_type(type_: pa.DataType) -> Optional[str]:
    """Return the type of a column's authors in words; None where their text would not be exact."""
    if pa.types.is_dictionary(type_):
        return describe_parquet_author_type(type_.value_type)
    if pa.types.is_null(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "a string"
    if pa.types.is_integer(type_):
        return "an integer"
    if pa.types.is_boolean(type_):
        return "a Boolean"
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_) or pa.types.is_decimal(type_):
        return f"a value of type {type_}"
    return None


def parquet_to_strings(values: pa.Array, column: str, name: str, start: int, columns: ColumnSpec) -> pa.Array:
    """Return a column of a batch as large_string, each value as Arrow writes it; nulls stay."""
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    values = values.cast(pa.large_string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        rows = enumerate(values.cast(pa.large_binary()).to_pylist(), start + 1)
        row = next(row for row, value in rows if value is not None and value.decode(errors="ignore").encode() != value)
        raise encoding_error(name, f"column {column!r}, row {row}", columns) from error
    return values
