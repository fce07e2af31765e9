"""Read authors and texts from files, exactly as they are written.

Promise: an author is the text that stands in the file, from the first byte to the last: nothing is guessed, trimmed or
converted ("007", "NA", "2024-01-01" and a JSON number stay as they are written). What cannot be read exactly is an error that
names the file, the line (or the row, in Parquet) and the remedy; above all a quote that never closes, which would hand other
authors' texts to one. Where one or several files hold authors of several kinds (1 and "1"), that is an error too, as one author
could count as two.

CSV is what Python's csv module reads in its strict mode [1], JSON what its json module reads [2]; all may be compressed, .gz or
.zst. Memory is that of a batch, whatever the size of the file (for a .json file that holds one array, that of its text).

Example:

    >>> for batch in read_files(["comments.jsonl.gz"], Columns("--train_file", text="body", author="user")):
    ...     batch.column("user"), batch.column("body")  # both large_string

References:
    [1] RFC 4180, section 2
    [2] RFC 8259
"""

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from author_dp.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BATCH_ROWS, BATCH_CHARACTERS = 2**16, 2**24  # of a record batch: it ends where either is reached
BYTE_ORDER_MARK = "\ufeff"
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON


class ColumnSpec(NamedTuple):
    """What to read, and how to call it in messages."""

    option: str  # that named the files
    text: str
    author: str
    prompt: Optional[str] = None  # of what comes before the text, if `as_text` takes it
    as_text: Optional[Callable[..., str]] = None  # makes a text of the values of prompt, if any, and text; or ValueError
    text_option: str = "--text_column"
    prompt_option: str = "--prompt_column"

    @property
    def parts(self) -> list[str]:
        """What a text is made of, in order."""
        return [self.text] if self.prompt is None else [self.prompt, self.text]

    @property
    def by_option(self) -> list[tuple[str, str]]:
        prompt = [] if self.prompt is None else [(self.prompt_option, self.prompt)]
        return [(self.text_option, self.text), *prompt, ("--author_column", self.author)]


class Row(NamedTuple):
    """One sample as it stands in a file."""

    author: Optional[str]
    text: Optional[str]
    kind: str  # of author value
    line: int  # on which the row begins
    number: int  # of the row, from 1

    @property
    def place(self) -> str:
        return f"line {self.line} (row {self.number})" if self.line else f"row {self.number}"


def split_suffix(name: str) -> tuple[str, Optional[str]]:
    """Return format and compression of a file by its name: "a.csv.gz" gives (".csv", "gzip")."""
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def read_files(files: Iterable[str], columns: ColumnSpec, kinds: Optional[dict[str, str]] = None) -> Iterator[pa.RecordBatch]:
    """Read the two columns of several files, in order.

    Args:
        kinds: of author values, and where the first one stood: of files read before, whose authors must be of the same kind.
    Yields:
        record batches of two columns, named as in `columns`, both large_string; a missing text is "".
    Raises:
        UserError: with file, line or row, and remedy.
    """
    kinds = {} if kinds is None else kinds
    for name in files:
        suffix, compression = split_suffix(name)
        try:
            if suffix == ".parquet":
                yield from read_parquet(name, compression, columns, kinds)
            else:
                read = read_csv if suffix == ".csv" else read_json
                yield from to_record_batches(read(iterate_lines(name, compression, columns), name, columns), name, columns, kinds)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise unreadable_error(name, columns, str(error).strip() or type(error).__name__) from error


def iterate_lines(name: str, compression: Optional[str], columns: ColumnSpec) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, without a byte order mark; \\n alone ends one."""
    with io.BufferedReader(pa.input_stream(name, compression=compression), 2**20) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{columns.option} {name}, line {number} is not UTF-8: save the file as UTF-8") from error
            yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


# --- what every row must be -----------------------------------------------------------------------------


def to_record_batches(rows: Iterable[Row], name: str, columns: ColumnSpec, kinds: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Check rows, and collect them into record batches."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        if row.author is None or not row.author.strip():
            raise missing_author_error(name, row.place, columns)
        if row.kind not in kinds:
            check_author_type(row.kind, f"{name}, {row.place}", kinds, columns)
        batch.append(row)
        characters += len(row.text or "")
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield to_arrow_schema(batch, name, columns)
            batch, characters = [], 0
    if batch:
        yield to_arrow_schema(batch, name, columns)


def to_arrow_schema(rows: list[Row], name: str, columns: ColumnSpec) -> pa.RecordBatch:
    try:
        arrays = [
            pa.array([row.author for row in rows], pa.large_string()),
            pa.array([r.text or "" for r in rows], pa.large_string()),
        ]
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape but no text can hold
        place = next(row.place for row in rows if not is_text(f"{row.author}{row.text}"))
        raise UserError(
            f"{columns.option} {name}, {place} holds half of a character (a lone surrogate): mend the line"
        ) from error
    return pa.record_batch(arrays, names=[columns.author, columns.text])


def is_text(value: str) -> bool:
    return value.encode(errors="ignore").decode() == value


def check_author_type(kind: str, place: str, kinds: dict[str, str], columns: ColumnSpec) -> None:
    """Note where the first author of a kind stands; raise UserError for a second kind."""
    for other, where in kinds.items():
        raise UserError(
            f"--author_column {columns.author!r} of {columns.option} holds {kind} in {place}, and {other} in {where}: write all "
            "authors alike, best as strings, as one author could count as two"
        )
    kinds[kind] = place


def check_columns(columns: ColumnSpec, names: list[str], file: str) -> None:
    """Raise UserError unless both columns are there, once each."""
    for option, column in columns.by_option:
        if column not in names:
            found, remedy = f"its columns are {', '.join(map(str, names))}", "name one"
            if len(names) == 1 and any(separator in str(names[0]) for separator in ";\t|"):
                found, remedy = f"its only column is {names[0]!r}", "separate columns by commas"
            raise UserError(f"{option} {column!r} is not in {columns.option} {file}: {found}; {remedy}")
        if names.count(column) > 1:
            raise UserError(f"{option} {column!r} is in {columns.option} {file} {names.count(column)} times: rename all but one")


def missing_author_error(name: str, place: str, columns: ColumnSpec) -> UserError:
    return UserError(
        f"--author_column {columns.author!r} of {columns.option} {name} is empty in {place}: remove such rows or give them an "
        "author each"
    )


def missing_value_error(name: str, place: str, value: Any, columns: ColumnSpec) -> UserError:
    return UserError(
        f"--author_column {columns.author!r} of {columns.option} {name} holds {str(value)[:40]!r} in {place}, neither text nor a "
        "number: write the authors as strings"
    )


def missing_text_error(name: str, place: str, value: Any, columns: ColumnSpec) -> UserError:
    return UserError(
        f"{columns.text_option} {columns.text!r} of {columns.option} {name} holds {str(value)[:40]!r} in {place}, not text: "
        "name another column, or mend the row"
    )


def format_text(name: str, place: str, values: list[Any], columns: ColumnSpec) -> str:
    """Return the text that `columns.as_text` makes of a row's values; UserError, with the place, where it cannot."""
    assert columns.as_text is not None
    try:
        return columns.as_text(*values)
    except ValueError as error:
        raise UserError(f"{columns.text_option} {columns.text!r} of {columns.option} {name}, {place} {error}") from error


def unreadable_error(name: str, columns: ColumnSpec, reason: str) -> UserError:
    return UserError(f"{columns.option} {name} cannot be read as {split_suffix(name)[0]}: {reason.splitlines()[0]}")


# --- CSV ------------------------------------------------------------------------------------------------


def read_csv(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[Row]:
    """Yield the rows of a CSV file; blank lines are none. Every author is text, whatever it looks like."""
    csv.field_size_limit(2**29)  # beyond it a quote was forgotten
    kept: list[str] = []  # the lines of the row at hand, to say where a quote opened
    rows = csv.reader(record_lines(lines, kept), strict=True)
    header: list[str] = []
    number = 0
    while True:
        kept.clear()
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise broken_csv_error(error, kept, line, name, columns) from error
        if row is None:
            return
        if not header:
            check_columns(columns, header := row, name)
            author, parts = header.index(columns.author), [header.index(part) for part in columns.parts]
            if columns.as_text is not None and columns.prompt is None:
                raise UserError(f"{columns.option} {name}: a .csv holds no lists of messages; write them as .jsonl or .parquet")
        elif row:
            number += 1
            if len(row) != len(header):
                raise UserError(
                    f"{columns.option} {name}, line {line} has {len(row)} values and the header {len(header)}: quote values that "
                    "hold a comma, or mend the line"
                )
            read = Row(row[author], row[parts[-1]], "text", line, number)
            if columns.as_text is not None:
                read = read._replace(text=format_text(name, read.place, [row[part] for part in parts], columns))
            yield read


def record_lines(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line


def broken_csv_error(error: csv.Error, lines: list[str], first: int, name: str, columns: ColumnSpec) -> UserError:
    """Say what is wrong in a row that begins on line `first`, and where its last quote opened."""
    text = "".join(lines)
    if any(words in str(error) for words in ("expected after", "unexpected end of data", "field larger")):
        line = first + text.count("\n", 0, find_unclosed_quote(text))
        end = (
            "never closes"
            if "expected after" not in str(error)
            else f"closes in the middle of a value, on line {first + len(lines) - 1}"
        )
        return UserError(
            f"{columns.option} {name}: the quote that opens on line {line} {end}: close it, or write each quote in a value "
            "twice and quote the value"
        )
    reason = "end lines by \\n or \\r\\n" if "new-line character" in str(error) else error
    return UserError(f"{columns.option} {name} cannot be read as .csv, line {first + len(lines) - 1}: {reason}")


def find_unclosed_quote(text: str) -> int:
    """Return where the quote opens that spoils this row: the last one at the start of a value, up to which all is well."""
    opening, position, in_quotes, at_start = 0, 0, False, True
    while position < len(text):
        character = text[position]
        if in_quotes:
            if character == '"':
                if text[position + 1 : position + 2] == '"':
                    position += 1
                elif text[position + 1 : position + 2] not in (",", "\r", "\n", ""):
                    return opening
                else:
                    in_quotes = False
        elif character == '"' and at_start:
            opening, in_quotes = position, True
        at_start = not in_quotes and character in ",\n"
        position += 1
    return opening


# --- JSON -----------------------------------------------------------------------------------------------


class IntLiteral(str):
    """A whole number as it is written."""


class FloatLiteral(str):
    """A number with a point or an exponent as it is written."""


AUTHOR_TYPES = {
    str: "text",
    IntLiteral: "a whole number",
    FloatLiteral: "a number with a point or an exponent",
    bool: "true or false",
}
MESSAGE = ("role", "content")  # names within a column of messages
JSON_NAMES = {True: "true", False: "false"}


def read_json(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[Row]:
    """Yield the objects of a file: one a line, or those of one array. An author that is a number is the text of the number."""
    seen: set[str] = set()
    first: list[str] = []
    for number, (line, value) in enumerate(json_values(lines, name, columns), 1):
        if type(value) is not dict:
            place = Row(None, None, "", line, number).place
            raise unreadable_error(name, columns, f"{place} is no object with columns, like {{...}}")
        if len(seen) <= len(columns.parts):  # columns that no row has had so far
            first = first or list(value)
            seen |= value.keys() & {columns.author, *columns.parts}
            if columns.author not in seen:
                check_columns(columns, list(value), name)
        author, text = value.get(columns.author), value.get(columns.text)
        row = Row(author, text, AUTHOR_TYPES.get(type(author), ""), line, number)
        if author is not None and not row.kind:
            raise missing_value_error(name, row.place, author, columns)
        if columns.as_text is not None:
            row = row._replace(text=format_text(name, row.place, [value.get(part) for part in columns.parts], columns))
        elif text is not None and type(text) is not str:
            raise missing_text_error(name, row.place, text, columns)
        yield row if type(author) is not bool else row._replace(author=JSON_NAMES[author])
    if first:
        check_columns(columns, [*first, *(seen - set(first))], name)


def json_values(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[tuple[int, Any]]:
    """Yield each value, and the line on which it begins (0 in an array, where rows are counted)."""

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            if any(keys.count(column) > 1 for column in (columns.author, *columns.parts, *MESSAGE)):
                raise ValueError("a column stands twice in one object")
        return found

    decoder = json.JSONDecoder(
        object_pairs_hook=as_object, parse_int=IntLiteral, parse_float=FloatLiteral, parse_constant=lambda _: None
    )
    number, is_first = 0, True
    try:
        for number, line in enumerate(lines, 1):
            if is_first and line.lstrip().startswith("["):
                yield from ((0, value) for value in array_values("".join([line, *lines]), decoder))
            elif line := line.strip(" \t\r\n"):
                value, end = decoder.raw_decode(line)
                if end < len(line):
                    raise json.JSONDecodeError("something follows the object", line, end)
                yield number, value
                is_first = False
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        place, reason = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", str(error))
        raise unreadable_error(name, columns, f"line {place}: {reason}; mend the line") from error


def array_values(text: str, decoder: json.JSONDecoder) -> Iterator[Any]:
    """Yield the values of a JSON array one by one."""
    position = skip_space(text, text.index("[") + 1)
    if text[position : position + 1] != "]":
        while True:
            value, position = decoder.raw_decode(text, position)
            yield value
            position = skip_space(text, position)
            if text[position : position + 1] != ",":
                break
            position = skip_space(text, position + 1)
    if text[position : position + 1] != "]" or skip_space(text, position + 1) < len(text):
        raise json.JSONDecodeError("the array does not end, or something follows it", text, min(position, len(text) - 1))


def skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


# --- Parquet --------------------------------------------------------------------------------------------


def read_parquet(name: str, compression: Optional[str], columns: ColumnSpec, kinds: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield both columns as text. Of a compressed file a copy is made, in the system's temporary folder."""
    with tempfile.TemporaryFile() as copy:
        if compression:
            with pa.input_stream(name, compression=compression) as file:
                shutil.copyfileobj(file, copy)
        yield from read_open_parquet(pa.PythonFile(copy) if compression else name, name, columns, kinds)


def read_open_parquet(source: Any, name: str, columns: ColumnSpec, kinds: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """The same for a path, or a file object that is open."""
    file = pq.ParquetFile(source, page_checksum_verification=True)
    check_not_concatenated(source, file.metadata, name, columns)
    names = file.schema_arrow.names
    check_columns(columns, names, name)
    author, *parts = (file.schema_arrow.field(column).type for column in (columns.author, *columns.parts))
    if (kind := author_type(author)) is None:
        raise missing_value_error(name, "column", author, columns)
    if columns.as_text is None and not (pa.types.is_null(parts[0]) or author_type(parts[0]) == "text"):
        raise missing_text_error(name, "column", parts[0], columns)
    wanted = None if any("." in column for column in (columns.author, *columns.parts)) else [columns.author, *columns.parts]
    start = 0
    for batch in file.iter_batches(BATCH_ROWS // 16, columns=wanted):  # a dot would name a field inside a column
        authors = as_text(batch.column(columns.author), columns.author, name, start, columns)
        texts = column_as_text(batch, name, start, columns)
        blank = pc.or_kleene(pc.is_null(authors), pc.equal(pc.utf8_trim_whitespace(pc.fill_null(authors, "")), ""))
        if (row := pc.index(blank, True).as_py()) >= 0:
            raise missing_author_error(name, f"row {start + row + 1}", columns)
        if kind not in kinds and len(batch):
            check_author_type(kind, f"{name}, row {start + 1}", kinds, columns)
        start += len(batch)
        yield pa.record_batch([authors, pc.fill_null(texts, "")], names=[columns.author, columns.text])


def column_as_text(batch: pa.RecordBatch, name: str, start: int, columns: ColumnSpec) -> pa.Array:
    """Return the texts of a batch whose first row is `start`, counted from 0; nulls stay."""
    if columns.as_text is None:
        return as_text(batch.column(columns.text), columns.text, name, start, columns)
    try:
        rows = list(zip(*(batch.column(part).to_pylist() for part in columns.parts)))
    except UnicodeDecodeError as error:
        raise UserError(f"{columns.option} {name}: column {columns.text!r} is not UTF-8: save the file as UTF-8") from error
    made = [format_text(name, f"row {number}", list(row), columns) for number, row in enumerate(rows, start + 1)]
    return pa.array(made, pa.large_string())


def check_not_concatenated(source: Any, metadata: pq.FileMetaData, name: str, columns: ColumnSpec) -> None:
    """Raise UserError for several Parquet files in one: the last one's footer would be read with the first one's rows."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    starts = (min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset) for chunk in chunks)
    end = max((start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)), default=4)
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        file.seek(end)
        if b"PAR1PAR1" in file.read():  # the end of one, the start of the next; beyond the rows there are indexes alone
            raise unreadable_error(name, columns, "it is several Parquet files in one; give them apart")


def author_type(type_: pa.DataType) -> Optional[str]:
    """Return the kind of author that values of a column's type are; None where their text would not be exact."""
    if pa.types.is_dictionary(type_):
        return author_type(type_.value_type)
    if pa.types.is_null(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "text"
    if pa.types.is_integer(type_):
        return "a whole number"
    if pa.types.is_boolean(type_):
        return "true or false"
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_) or pa.types.is_decimal(type_):
        return f"a value of type {type_}"
    return None


def as_text(values: pa.Array, column: str, name: str, start: int, columns: ColumnSpec) -> pa.Array:
    """Return a column of a batch as large_string, each value as Arrow writes it; nulls stay."""
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    values = values.cast(pa.large_string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        rows = enumerate(values.cast(pa.large_binary()).to_pylist(), start + 1)
        row = next(row for row, value in rows if value is not None and value.decode(errors="ignore").encode() != value)
        raise UserError(f"{columns.option} {name}: column {column!r}, row {row} is not UTF-8: save the file as UTF-8") from error
    return values
