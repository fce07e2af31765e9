"""A file of synthetic text while it is written, which an interruption leaves to be gone on with.

Promise: a row is in the file once. What counts is what the state beside it says, by length and SHA-256: what was written after it
is cut off, and a file that is not what its state says is not gone on with. File and sidecar appear together, the sidecar first.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from author_dp.errors import UserError
from author_dp.files import fsync_folder, write_json
from author_dp.outputs import privacy_statement as sidecar

STATE_SUFFIX = ".json"  # of what an unfinished file was begun with


class PartialFile:
    """A file that is being written, a batch at a time, and may be gone on with.

    Args:
        out: where it is to be when it is whole; until then it has the suffix .part, and its state .part.json.
        settings: what the rows depend on. An unfinished file of others is not gone on with.
        mode: of the file.
    Attributes:
        rows: that are written.
    Raises:
        UserError: where `out` is there already, or an unfinished file does not fit.
    """

    def __init__(self, out: Path, settings: dict[str, Any], mode: int):
        if out.exists():
            raise UserError(f"--out {out} is there already: choose another name, or take it away")
        self.out, self.part, self.mode = out, out.with_name(out.name + ".part"), mode
        self.state = {"settings": json.loads(json.dumps(settings)), "rows": 0, "ended": 0, "bytes": 0}
        self._path, self._hash = self.part.with_name(self.part.name + STATE_SUFFIX), hashlib.sha256()
        try:
            if self._path.exists() and self.part.exists():
                self._resume()
            else:
                out.parent.mkdir(parents=True, exist_ok=True)
                self.part.unlink(missing_ok=True)
                os.close(os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
                self._save_state()
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def rows(self) -> int:
        return int(self.state["rows"])

    def _resume(self) -> None:
        """Take up the state of an unfinished file, and cut off what was written after it."""
        known = sidecar.read_json(self._path)
        asked = self.state["settings"]
        if odd := [name for name, value in asked.items() if known.get("settings", {}).get(name) != value]:
            raise UserError(
                f"--out {self.out}: {self.part.name} was begun with another {', '.join(odd)}: give the same options to go on "
                f"with it, or delete {self.part} and {self._path.name} to begin anew"
            )
        os.truncate(self.part, min(int(known["bytes"]), self.part.stat().st_size))
        self._hash.update(self.part.read_bytes())
        if self._hash.hexdigest() != known["sha256"]:
            raise UserError(f"{self.part} was changed since it was written: delete it and {self._path.name} to begin anew")
        self.state = known

    def add(self, rows: list[dict[str, Any]], ended: int) -> None:
        """Write a batch; it counts when this returns.

        Args:
            ended: how many of its texts came to their end.
        """
        content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        try:
            with open(self.part, "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._hash.update(content)
            for name, value in (("rows", len(rows)), ("ended", ended), ("bytes", len(content))):
                self.state[name] += value
            self._save_state()
        except OSError as error:
            raise self._unwritable(error) from error

    def _save_state(self) -> None:
        write_json(self._path, {**self.state, "sha256": self._hash.hexdigest()}, private=self.mode == 0o600)

    def finish(self, content: dict[str, Any]) -> None:
        """Write the sidecar, then give the file its name: a text without a sidecar is never there."""
        if sidecar.sha256_of(self.part) != self._hash.hexdigest():
            raise UserError(f"{self.part} was changed by another program while it was written: delete it, and begin anew")
        try:
            write_json(sidecar.statement_path(self.out), {**content, "sha256": self._hash.hexdigest()})
            os.replace(self.part, self.out)
            fsync_folder(self.out.parent)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--out {self.out} cannot be written ({error.strerror}): make room or choose another place, then go on")
