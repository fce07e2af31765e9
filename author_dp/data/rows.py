"""Read rows of any format as dictionaries."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from author_dp.data.readers import FORMATS, ColumnSpec, iterate_lines, json_values, split_suffix
from author_dp.errors import UserError


def read_rows(name: str, option: str = "--prompts") -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .json, .csv or .parquet file, numbers of JSON and CSV as they are written.

    Raises:
        UserError: with the file and the remedy.
    """
    suffix, compression = split_suffix(name)
    columns = ColumnSpec(option, "", "")
    if suffix not in FORMATS:
        raise UserError(f"{option} {name}: it must be a {', '.join(FORMATS)} file (or these with .gz or .zst)")
    if not Path(name).is_file():
        raise UserError(f"{option} {name}: there is no such file")
    try:
        if suffix == ".parquet":
            for batch in pq.ParquetFile(name).iter_batches():
                yield from batch.to_pylist()
        elif suffix == ".csv":
            yield from csv.DictReader(iterate_lines(name, compression, columns), strict=True)
        else:
            for _, value in json_values(iterate_lines(name, compression, columns), name, columns):
                if type(value) is not dict:
                    raise UserError(f"{option} {name}: {str(value)[:40]!r} is no object with columns, like {{...}}")
                yield value
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{option} {name} cannot be read as {suffix}: {str(error).splitlines()[0]}") from error
