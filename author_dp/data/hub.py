"""Data sets of the hub, by its Parquet conversion, or of a local folder of the same layout.

Promise: only the shards that are needed are opened; where the hub cannot be reached, that is said within seconds.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import fsspec
import pyarrow as pa
from huggingface_hub import hf_hub_download

from author_dp.data.readers import ColumnSpec, read_open_parquet
from author_dp.errors import UserError
from author_dp.hub_access import hub_error, hub_is_reachable


def cached_copy(name: str, file: str) -> Optional[Path]:
    """Return the folder of a model: itself where it is local, the cached copy of a hub model that has `file`; None otherwise."""
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(hf_hub_download(name, file, local_files_only=not hub_is_reachable())).parent
    except Exception:  # of many kinds: there is no such file or model, or the hub cannot be reached
        return None


def read_hub(
    name: str, config: str, revision: str, columns: ColumnSpec, limit: Optional[int], kinds: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    """Yield the first `limit` samples, all where it is None, as record batches of text and author.

    The files are CONFIG/train/*.parquet, or CONFIG/partial-train/*.parquet for a large set.

    Raises:
        UserError: where the hub or the data set cannot be reached, or a column is missing.
    """
    if os.path.isdir(name):
        root = os.path.join(os.path.abspath(name), config)
    elif not hub_is_reachable():
        raise hub_error("--dataset_name", name)
    else:
        root = f"hf://datasets/{name}@{revision.replace('/', '%2F')}/{config}"
    filesystem, path = fsspec.core.url_to_fs(root)
    try:
        shards = sorted(filesystem.glob(f"{path}/train/*.parquet") or filesystem.glob(f"{path}/partial-train/*.parquet"))
        if not shards:
            raise FileNotFoundError("no Parquet files")
        yield from take_rows(itertools.chain.from_iterable(read_shard(filesystem, s, columns, kinds) for s in shards), limit)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"--dataset_name {name}: no readable Parquet files at {root}/train ({str(error).splitlines()[0]}): check the name, "
            "--dataset_config_name and --dataset_revision, or download files and give them with --train_file"
        ) from error


def read_shard(filesystem: Any, shard: str, columns: ColumnSpec, kinds: dict[str, str]) -> Iterator[pa.RecordBatch]:
    with filesystem.open(shard) as file:
        yield from read_open_parquet(file, shard, columns, kinds)


def take_rows(batches: Iterable[pa.RecordBatch], limit: Optional[int]) -> Iterator[pa.RecordBatch]:
    """Yield the first `limit` rows, and open no file beyond them."""
    for batch in batches:
        yield batch[:limit]
        if limit is not None and (limit := limit - len(batch)) <= 0:
            return
