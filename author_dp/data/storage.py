"""Keep the texts of a run on disk: readable by their owner only, and deleted when the program ends."""

import atexit
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np
import pyarrow as pa
from datasets import Dataset

from author_dp.errors import UserError

BATCH_ROWS = 2**16
temp_dirs: list[Path] = []  # of this run, each with mode 0o700


def filter_rows(samples: Dataset, mask: np.ndarray, folder: Optional[Path] = None) -> Dataset:
    """Copy the samples where `mask`, bool (samples,), is true.

    datasets' selection by index would be slower, and larger.
    """
    batches = samples.with_format("arrow").iter(BATCH_ROWS)
    starts = range(0, len(samples), BATCH_ROWS)
    selected = (batch.filter(mask[start : start + BATCH_ROWS]) for start, batch in zip(starts, batches))
    return write_arrow(selected, samples.features.arrow_schema, folder)


def write_arrow(tables: Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema, folder: Optional[Path]) -> Dataset:
    """Write rows to a new file in `folder`; return them as a data set on disk."""
    with new_arrow_file(schema, folder) as (path, writer):
        for table in tables:
            writer.write(table)
    return Dataset.from_file(path)


@contextmanager
def new_arrow_file(schema: pa.Schema, folder: Optional[Path]) -> Iterator[tuple[str, pa.RecordBatchStreamWriter]]:
    """Give the path of a new file in `folder`, and what writes rows to it."""
    file, path = tempfile.mkstemp(suffix=".arrow", dir=folder or make_private_temp_dir())
    with open(file, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield path, writer


@atexit.register
def cleanup_temp_dirs() -> None:
    """Delete all texts. They stay, in the system's temporary directory, only if the program is killed outright."""
    while temp_dirs:
        shutil.rmtree(temp_dirs.pop(), ignore_errors=True)


def make_private_temp_dir(name: Optional[str] = None) -> Path:
    """Create a directory for texts of this run, in TMPDIR.

    Args:
        name: of the directory, where other processes must find it; a new one by default.
    Raises:
        UserError: if TMPDIR, or else TEMP or TMP, cannot be used: Python would leave the texts elsewhere, without a word.
    """
    used = tempfile.gettempdir()
    name_of, wanted = next(((n, os.environ[n]) for n in ("TMPDIR", "TEMP", "TMP") if os.environ.get(n)), ("", used))
    if not os.path.isdir(wanted) or not os.path.samefile(wanted, used):
        problem = "it cannot be written" if os.path.isdir(wanted) else "no such folder"
        raise UserError(f"{name_of} {wanted}: {problem}. Create it, with free space, or unset {name_of}")
    folder = Path(used) / (name or f"author-texts-{secrets.token_hex(8)}")
    folder.mkdir(mode=0o700)
    temp_dirs.append(folder)
    return folder


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, let SIGTERM exit the program normally, so that it deletes its files."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
