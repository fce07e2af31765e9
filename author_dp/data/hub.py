"""Read data sets of the Hugging Face Hub from their Parquet files, or a local folder with the same layout.

Only the shards that are needed are opened. An unreachable hub is an error within seconds.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import fsspec
import pyarrow as pa
from huggingface_hub import hf_hub_download

from author_dp.data.columns import ColumnSpec, check_distinct_files
from author_dp.data.parquet_reader import read_open_parquet
from author_dp.errors import UserError, first_line
from author_dp.hub_access import hub_error, hub_is_reachable


def cached_copy(name: str, file: str) -> Optional[Path]:
    """Return the folder of a model, None where there is none.

    That is a local folder itself, or the cached copy of a hub model that has `file`.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(hf_hub_download(name, file, local_files_only=not hub_is_reachable())).parent
    except Exception:  # many types: no such file or model, or no connection
        return None


def read_hub(
    name: str, config: str, revision: str, columns: ColumnSpec, limit: Optional[int], author_types: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    """Yield the first `limit` samples (None: all) as record batches of text and author.

    The files are CONFIG/train/*.parquet, or CONFIG/partial-train/*.parquet for a large data set.

    Args:
        author_types: as for `read_files`.
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
        if os.path.isdir(name):
            check_distinct_files("--dataset_name", shards)
        for shard in shards:
            with filesystem.open(shard) as file:
                for batch in read_open_parquet(file, shard, columns, author_types):
                    yield batch[:limit]
                    if limit is not None and (limit := limit - len(batch)) <= 0:
                        return  # and open no file beyond the limit
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"--dataset_name {name}: no readable Parquet files at {root}/train ({first_line(error)}). Check the name, "
            "--dataset_config_name and --dataset_revision, or download files and give them with --train_file"
        ) from error
