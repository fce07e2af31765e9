"""Load samples of text and author from local files or hub data sets, onto disk."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from author_dp.data.authors import get_column
from author_dp.data.columns import ColumnSpec, check_distinct_files, split_suffix
from author_dp.data.hub import read_hub
from author_dp.data.readers import FORMATS, read_files
from author_dp.data.storage import write_arrow
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.progress import Progress

logger = get_logger(__name__)


def load_files(
    patterns: list[str], columns: ColumnSpec, folder: Optional[Path] = None, author_types: Optional[dict[str, str]] = None
) -> Dataset:
    """Load local files of one format, given by name or glob, with exact values.

    Args:
        folder: where the texts are kept; by default `make_private_temp_dir()`.
        author_types: of files loaded before; see `read_files`.
    Returns:
        samples with the text and the author column, both strings.
    Raises:
        UserError: with the option, and the file, line or column at fault.
    """
    files = expand_files(columns.option, patterns)
    suffixes = {split_suffix(name)[0] for name in files}
    if len(suffixes) > 1 or not suffixes <= set(FORMATS):
        raise UserError(
            f"{columns.option}: files of type {', '.join(sorted(suffixes))}. Give files of one type of {', '.join(FORMATS)} (or "
            "these with .gz or .zst)"
        )
    return write_arrow_dataset(read_files(files, columns, author_types), columns, " ".join(patterns), folder)


def load_hub(
    name: str,
    config: str,
    revision: str,
    columns: ColumnSpec,
    limit: Optional[int] = None,
    folder: Optional[Path] = None,
    author_types: Optional[dict[str, str]] = None,
) -> Dataset:
    """Load the first `limit` samples (None: all) of a hub data set.

    Args:
        name: on the hub, or a local folder with the same layout.
        folder, author_types: as for `load_files`.
    Returns:
        samples, as `load_files`.
    Raises:
        UserError: where the hub or the data set cannot be reached, or a column is missing.
    """
    batches = read_hub(name, config, revision, columns, limit, {} if author_types is None else author_types)
    return write_arrow_dataset(batches, columns, name, folder)


def write_arrow_dataset(batches: Iterable[pa.RecordBatch], columns: ColumnSpec, source: str, folder: Optional[Path]) -> Dataset:
    """Write the samples of a source to `folder`, and return them as a data set on disk.

    A row without a text, or with a blank one, is no sample, whatever is added to texts later. Their number is logged.
    """
    names = [columns.text, columns.author]
    schema = pa.schema([(name, pa.large_string()) for name in names])
    blank_authors: list[pa.Array] = []  # of the rows that are dropped

    def drop_blank(batch: pa.RecordBatch) -> pa.RecordBatch:
        is_blank = pc.equal(pc.utf8_trim_whitespace(batch.column(columns.text)), "")
        blank_authors.append(batch.column(columns.author).filter(is_blank))
        return batch.filter(pc.invert(is_blank)).select(names)

    with Progress(f"Read rows of {columns.option}", total=None) as progress:
        samples = write_arrow(map(drop_blank, progress.count(batches)), schema, folder)
    dropped = pa.chunked_array(blank_authors, pa.large_string())
    if not len(samples):
        reason = f"all {len(dropped):,} texts in {columns.text!r} are missing or blank" if len(dropped) else "it holds no rows"
        raise UserError(f"{columns.option} {source}: {reason}. Give data with one sample a row")
    if len(dropped):
        authors = pc.unique(dropped)
        lost = pc.sum(pc.invert(pc.is_in(authors, value_set=pc.unique(get_column(samples, columns.author))))).as_py()
        logger.warning(
            f"{columns.text_option} {columns.text!r} of {columns.option}: dropped {len(dropped):,} of "
            f"{len(dropped) + len(samples):,} rows, whose text is missing or blank. Authors without another text, who do not "
            f"count: {lost:,}"
        )
    return samples


def expand_files(option: str, patterns: list[str]) -> list[str]:
    """Expand globs, except names of existing files.

    Raises:
        UserError: for a file that is missing, empty or named twice.
    """
    files = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{option} {pattern}: no such file. Check the path")
        files += matches
    for name in files:
        if not os.path.isfile(name):
            raise UserError(f"{option} {name}: it is a folder. Name its files, for example '{os.path.join(name, '*.jsonl')}'")
        if os.path.getsize(name) == 0:
            raise UserError(f"{option} {name}: it is empty. Restore it, or leave it out")
    check_distinct_files(option, files)
    return files
