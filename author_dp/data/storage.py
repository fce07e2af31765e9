"""Texts of a run on disk, for their owner's eyes only, and deleted when the program ends."""

import atexit
import os
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


def filter_rows(samples: Dataset, mask: np.ndarray, folder: Optional[Path] = None) -> Dataset:
    """Return the samples at which `mask`, bool (samples,), is true; written anew, as a selection by index is slow and large."""
    batches = samples.with_format("arrow").iter(2**16)
    places = range(0, len(samples), 2**16)
    return write_arrow(
        (batch.filter(mask[i : i + 2**16]) for i, batch in zip(places, batches)), samples.features.arrow_schema, folder
    )


def write_arrow(tables: Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema, folder: Optional[Path]) -> Dataset:
    """Write rows to a file of `folder`, and return them as a data set that lies there and not in memory."""
    file, path = tempfile.mkstemp(suffix=".arrow", dir=folder or make_private_temp_dir())
    os.close(file)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write(table)
    return Dataset.from_file(path)


temp_dirs: list[Path] = []  # with texts of this run, for their owner's eyes only


@atexit.register
def cleanup_temp_dirs() -> None:
    """Leave no text behind; only a program that is killed outright does, in the system's temporary folder."""
    while temp_dirs:
        shutil.rmtree(temp_dirs.pop(), ignore_errors=True)


def make_private_temp_dir() -> Path:
    """Return a new folder for texts of this run (TMPDIR says where)."""
    temp_dirs.append(Path(tempfile.mkdtemp(prefix="author-texts-")))
    return temp_dirs[-1]


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within, let SIGTERM end the program in the usual way, so that it deletes what it wrote."""
    earlier = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
