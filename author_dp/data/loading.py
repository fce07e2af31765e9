"""Load samples of text and author from local files; drop rows without a text."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Optional

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from author_dp.data.columns import ColumnSpec, check_distinct_files, split_suffix
from author_dp.data.readers import FORMATS, read_files
from author_dp.data.storage import write_arrow
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.progress import Progress

logger = get_logger(__name__)


def load_files(
    patterns: list[str], columns: ColumnSpec, folder: Optional[Path] = None, author_types: Optional[dict[str, str]] = None
) -> Dataset:
    """Load local files as `read_local_files` does, onto disk: to `folder`, by default `make_private_temp_dir()`."""
    return write_arrow(read_local_files(patterns, columns, author_types), columns.schema, folder)


def read_local_files(
    patterns: list[str], columns: ColumnSpec, author_types: Optional[dict[str, str]] = None
) -> Iterator[pa.RecordBatch]:
    """Read local files of one format, given by name or glob, with exact values.

    Args:
        author_types: of files read before; see `read_files`.
    Yields:
        samples, as `drop_blank_texts`.
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
    yield from drop_blank_texts(read_files(files, columns, author_types), columns, " ".join(patterns))


def drop_blank_texts(batches: Iterable[pa.RecordBatch], columns: ColumnSpec, source: str) -> Iterator[pa.RecordBatch]:
    """Yield the samples of a source, by `columns.schema`.

    A row without a text, or with a blank one, is no sample, whatever is added to texts later. Their number is logged.
    """
    kept, dropped = [], []  # authors of each batch
    num_dropped = num_kept = 0
    with Progress(f"Read rows of {columns.option}", total=None) as progress:
        for batch in progress.count(batches):
            texts, authors = batch.column(columns.text), batch.column(columns.author)
            is_blank = pc.equal(pc.utf8_trim_whitespace(texts), "") if columns.as_text is None else pc.is_null(texts)
            samples = batch.filter(pc.invert(is_blank)).select(columns.schema.names)
            num_kept, num_dropped = num_kept + len(samples), num_dropped + len(batch) - len(samples)
            kept.append(pc.unique(samples.column(columns.author)))
            dropped.append(pc.unique(authors.filter(is_blank)))
            yield samples
    if not num_kept:
        reason = f"all {num_dropped:,} texts in {columns.text!r} are missing or blank" if num_dropped else "it holds no rows"
        raise UserError(f"{columns.option} {source}: {reason}. Give data with one sample a row")
    if num_dropped:
        with_text, without = (pc.unique(pa.chunked_array(parts)) for parts in (kept, dropped))
        lost = pc.sum(pc.invert(pc.is_in(without, value_set=with_text))).as_py()
        logger.warning(
            f"{columns.text_option} {columns.text!r} of {columns.option}: dropped {num_dropped:,} of {num_dropped + num_kept:,} "
            f"rows, whose text is missing or blank. Authors without another text, who do not count: {lost:,}"
        )


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
