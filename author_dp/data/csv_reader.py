"""Read CSV [1] as Python's csv module does in strict mode, with errors that name the line.

A quote that never closes is an error: it would hand other authors' texts to one author.

References:
    [1] RFC 4180, section 2
"""

import csv
from collections.abc import Iterator

from author_dp.data.columns import ColumnRow, ColumnSpec, check_columns, format_text_columns, unreadable_error
from author_dp.errors import UserError

FIELD_SIZE_LIMIT = 2**29  # characters; a longer value means a quote that was not closed


def read_csv(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[ColumnRow]:
    """Yield the samples of a CSV file; every author is text."""
    records = csv_records(lines, name, columns)
    for _, header in records:
        check_columns(columns, header, name)
        author, *text_indices = (header.index(column) for column in (columns.author, *columns.text_columns))
        if columns.as_text is not None and columns.prompt is None:
            raise UserError(f"{columns.option} {name}: a .csv holds no lists of messages. Write them as .jsonl or .parquet")
        break
    for number, (line, values) in enumerate(records, 1):
        row = ColumnRow(values[author], values[text_indices[-1]], "a string", line, number)
        if columns.as_text is not None:
            row = row._replace(text=format_text_columns(name, row.place, [values[i] for i in text_indices], columns))
        yield row


def csv_records(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[tuple[int, list[str]]]:
    """Yield the header, then each record, with the line it begins on; skip blank lines.

    Raises:
        UserError: for a record that is not as long as the header, or cannot be read.
    """
    csv.field_size_limit(FIELD_SIZE_LIMIT)
    record: list[str] = []  # lines of the current record, to find where a quote opened
    reader = csv.reader(record_lines(lines, record), strict=True)
    header = None
    while True:
        record.clear()
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise broken_csv_error(error, record, line, name, columns) from error
        if values is None:
            return
        if header is None:
            header = values
        elif not values:
            continue
        elif len(values) != len(header):
            raise UserError(
                f"{columns.option} {name}: line {line} has {len(values)} values and the header {len(header)}. Fix the line, or "
                "quote values that hold a comma"
            )
        yield line, values


def record_lines(lines: Iterator[str], record: list[str]) -> Iterator[str]:
    """Yield lines, and append each to `record`."""
    for line in lines:
        record.append(line)
        yield line


def broken_csv_error(error: csv.Error, lines: list[str], start: int, name: str, columns: ColumnSpec) -> UserError:
    """Return the error for a record from line `start` on, with the line of its last quote."""
    message, text, last = str(error), "".join(lines), start + len(lines) - 1
    if any(words in message for words in ("expected after", "unexpected end of data", "field larger")):
        line = start + text.count("\n", 0, find_unclosed_quote(text))
        end = f"closes in the middle of a value, on line {last}" if "expected after" in message else "never closes"
        return UserError(
            f"{columns.option} {name}: the quote that opens on line {line} {end}. Close it, or double each quote in a value and "
            "quote the value"
        )
    reason = "unquoted \\r. End lines by \\n or \\r\\n" if "new-line character" in message else f"{message}. Fix the line"
    return unreadable_error(name, columns, f"line {last}: {reason}")


def find_unclosed_quote(text: str) -> int:
    """Return the position of the quote that spoils a record.

    It is the last one at the start of a value, with valid text before it.
    """
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
