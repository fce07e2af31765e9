"""Read JSON [1] as Python's json module does, with numbers as written: 7.0 stays "7.0".

References:
    [1] RFC 8259
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from author_dp.data.columns import (
    ColumnRow,
    ColumnSpec,
    author_column_error,
    check_columns,
    format_place,
    format_text_columns,
    text_column_error,
    unreadable_error,
)
from author_dp.errors import UserError

SPACE = re.compile(r"[ \t\r\n]*")  # JSON's white space


class JsonIntLiteral(str):
    """An integer as written."""


class JsonFloatLiteral(str):
    """A number with a point or an exponent, as written."""


AUTHOR_TYPES = {
    str: "a string",
    JsonIntLiteral: "an integer",
    JsonFloatLiteral: "a number with a point or an exponent",
    bool: "a Boolean",
}
BOOL_LITERALS = {True: "true", False: "false"}


def read_json(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[ColumnRow]:
    """Yield the samples of a file: one object a line, or those of one array.

    An author that is a number is the text of that number.
    """
    wanted = {columns.author, *columns.text_columns}
    seen: set[str] = set()  # of the wanted columns
    first_names: list[str] = []  # columns of the first row
    for number, (line, value) in enumerate(json_objects(lines, name, columns), 1):
        if len(seen) < len(wanted):
            first_names = first_names or list(value)
            seen |= value.keys() & wanted
            if columns.author not in seen:
                check_columns(columns, list(value), name)
        author, text = value.get(columns.author), value.get(columns.text)
        row = ColumnRow(author, text, AUTHOR_TYPES.get(type(author), ""), line, number)
        if author is not None and not row.author_type:
            raise author_column_error(name, row.place, author, columns)
        if columns.as_text is not None:
            values = [value.get(column) for column in columns.text_columns]
            row = row._replace(text=format_text_columns(name, row.place, values, columns))
        elif text is not None and type(text) is not str:
            raise text_column_error(name, row.place, text, columns)
        yield row if type(author) is not bool else row._replace(author=BOOL_LITERALS[author])
    if first_names:
        check_columns(columns, [*first_names, *(seen - set(first_names))], name)


def json_objects(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each object, and the line it begins on (0 in an array, where rows are counted).

    Raises:
        UserError: for a value that is no object, or cannot be read.
    """
    for number, (line, value) in enumerate(json_values(lines, name, columns), 1):
        if type(value) is not dict:
            place = format_place(line, number)
            raise unreadable_error(name, columns, f"{place} is no object with columns, like {{...}}. Fix the row")
        yield line, value


def json_values(lines: Iterator[str], name: str, columns: ColumnSpec) -> Iterator[tuple[int, Any]]:
    """Yield each value, and the line it begins on (0 in an array)."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):  # the last value would win
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{repeated!r} is twice in one object")
        return result

    decoder = json.JSONDecoder(
        object_pairs_hook=to_dict, parse_int=JsonIntLiteral, parse_float=JsonFloatLiteral, parse_constant=lambda _: None
    )
    number, is_first = 0, True
    try:
        for number, line in enumerate(lines, 1):
            if is_first and line.lstrip().startswith("["):
                yield from ((0, value) for value in json_array_values("".join([line, *lines]), decoder))
            elif line := line.strip(" \t\r\n"):
                value, end = decoder.raw_decode(line)
                if end < len(line):
                    raise json.JSONDecodeError("text after the object", line, end)
                yield number, value
                is_first = False
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        line_number, reason = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", str(error))
        raise unreadable_error(name, columns, f"line {line_number}: {reason}. Fix the line") from error


def json_array_values(text: str, decoder: json.JSONDecoder) -> Iterator[Any]:
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
        raise json.JSONDecodeError("the array does not end, or text follows it", text, min(position, len(text) - 1))


def skip_space(text: str, position: int) -> int:
    """Return the first position at or after `position` that is no white space."""
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()
