"""Append-only file of JSON records, each chained to the previous one by its hash.

Guarantees: `append` returns only when the record is on disk. Reading detects a record that was edited, removed, reordered or
inserted. It does not detect a missing end, or a complete chain written anew: the chain protects against accidents and
retouching, not against the owner of the directory.

Example:

    >>> HashChain(path).append({"record": "step", "step": 1})
    >>> list(HashChain(path).read())
    [{'record': 'step', 'step': 1}]
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout

from author_dp.errors import UserError
from author_dp.files import fsync_folder

LOCK_SECONDS = 10  # data loader workers of a killed run hold its lock until they notice, about five seconds later
FIRST_HASH = hashlib.sha256(b"privacy ledger").hexdigest()


class HashChain:
    """File with one JSON object per line; the key "link" holds the hash of the record and of all before it.

    Args:
        path: the file. The first record creates it.
    Attributes:
        record_hashes: FIRST_HASH, then the hash of every record.
        truncated: the bytes of a last record that a crash cut short; empty if the last record is complete.
    """

    def __init__(self, path: Path):
        self.path = path
        self.record_hashes, self.truncated = [FIRST_HASH], b""
        self._size = 0
        self._lock = FileLock(f"{path}.lock")

    def read(self) -> Iterator[dict[str, Any]]:
        """Read the file; return an iterator that verifies and yields its complete records.

        While a record is processed, `record_hashes` ends before it, so that its length is the number of the record's line.

        Raises:
            UserError: if the file cannot be read.
            ValueError, KeyError, TypeError, AttributeError: from the iterator, for a line that was changed.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}). The privacy ledger must be a readable file"
            ) from error
        *lines, self.truncated = content.split(b"\n")
        self.record_hashes, self._size = [FIRST_HASH], len(content)
        return self._verify(lines)

    def _verify(self, lines: list[bytes]) -> Iterator[dict[str, Any]]:
        for line in lines:
            record = json.loads(line)
            if (found := record.pop("link")) != record_hash(self.record_hashes[-1], record):
                raise ValueError("the hash chain is broken")
            yield record
            self.record_hashes.append(found)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and flush it to disk.

        Raises:
            UserError: if the file cannot be written, was deleted, or was written to by another program.
        """
        new_hash = record_hash(self.record_hashes[-1], record)
        line = json.dumps({**record, "link": new_hash}).encode() + b"\n"
        try:
            created = 0 if self._size else os.O_CREAT  # a deleted file must not start over
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | created, 0o644)
            try:
                if os.fstat(descriptor).st_size != self._size:
                    raise OSError(0, "another program has written to it")
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]  # after a partial write, the next one raises the reason
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if created:
                fsync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size += len(line)
        self.record_hashes.append(new_hash)

    def repair_tail(self, replacement: Optional[dict[str, Any]]) -> None:
        """Replace a truncated last record, if there is one; with None, remove it.

        Raises:
            UserError: if the file cannot be written.
        """
        if not self.truncated:
            return
        complete = self._size - len(self.truncated)
        try:
            os.truncate(self.path, complete)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size, self.truncated = complete, b""
        if replacement is not None:
            self.append(replacement)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the file's directory, which is created if missing.

        Raises:
            UserError: if another run holds the lock, or the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.2)
        except Timeout as error:
            raise UserError(
                f"--output_dir {self.path.parent}: in use by another run. Wait until it ends, or choose another --output_dir"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            self._lock.release()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({error.strerror}), so the run stopped before the next update. Make --output_dir "
            "writable, with free space, then resume with --resume_from_checkpoint True"
        )


def record_hash(previous: str, record: dict[str, Any]) -> str:
    """Return the SHA-256 that chains `record` to the hash of the record before it."""
    return hashlib.sha256(f"{previous}{json.dumps(record)}".encode()).hexdigest()
