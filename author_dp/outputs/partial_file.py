"""Write a file of synthetic text in batches, so that an interrupted run can resume.

Guarantees: each row is in the file once. The state file records the length and SHA-256 of all complete batches: whatever follows
them is cut off, and a file that does not match its state is refused. The text and its privacy statement appear together, the
statement first.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from author_dp.errors import UserError
from author_dp.files import fsync_folder, read_json_object, sha256_of, write_json
from author_dp.outputs.privacy_statement import statement_path


class PartialFile:
    """A file that is written in batches, and resumed after an interruption.

    Args:
        out: path of the complete file. Until then the rows are in `out`.part, and the state is in `out`.part.json.
        settings: what the rows depend on. An unfinished file with other settings is refused.
        mode: permissions of the file.
    Attributes:
        state: "rows", "ended" and "bytes" written so far, and "settings".
    Raises:
        UserError: if `out` exists, an unfinished file does not match, or the file cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], mode: int):
        try:
            exists = out.exists()
        except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
            raise UserError(f"--out {str(out)[:100]}: it cannot be a file's name ({error}). Choose another") from error
        if exists:
            raise UserError(f"--out {out} exists: choose another name, or move it away")
        self.out, self.part, self.mode = out, out.with_name(out.name + ".part"), mode
        self.state = {"settings": json.loads(json.dumps(settings)), "rows": 0, "ended": 0, "bytes": 0}
        self._state_path, self._hash = self.part.with_name(self.part.name + ".json"), hashlib.sha256()
        with self._write_errors():
            known = read_json_object(self._state_path) if self._state_path.exists() and self.part.exists() else {}
            if known.get("rows"):
                self._resume(known)
            else:
                out.parent.mkdir(parents=True, exist_ok=True)
                self.part.unlink(missing_ok=True)
                os.close(os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
                self._save_state()

    @property
    def rows(self) -> int:
        """Number of rows written so far."""
        return int(self.state["rows"])

    def _resume(self, known: dict[str, Any]) -> None:
        """Take over the state of an unfinished file, and cut off what was written after it."""
        settings = known.get("settings", {})
        if changed := [name for name, value in self.state["settings"].items() if settings.get(name) != value]:
            raise UserError(
                f"--out {self.out}: {self.part.name} was started with another {', '.join(changed)}. Give the same options to "
                f"resume it, or delete {self.part} and {self._state_path.name} to start over"
            )
        os.truncate(self.part, min(int(known["bytes"]), self.part.stat().st_size))
        self._hash.update(self.part.read_bytes())
        if self._hash.hexdigest() != known["sha256"]:
            raise UserError(f"{self.part} was changed since it was written: delete it and {self._state_path.name} to start over")
        self.state = known

    def add(self, rows: list[dict[str, Any]], ended: int) -> None:
        """Append a batch; after an interruption it is kept if this call has returned.

        Args:
            ended: number of texts of the batch that reached their end.
        """
        content = "".join(json.dumps(without_nan(row), ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        with self._write_errors():
            with open(self.part, "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._hash.update(content)
            for name, value in (("rows", len(rows)), ("ended", ended), ("bytes", len(content))):
                self.state[name] += value
            self._save_state()

    def _save_state(self) -> None:
        write_json(self._state_path, {**self.state, "sha256": self._hash.hexdigest()}, private=self.mode == 0o600)

    def finish(self, statement: dict[str, Any]) -> None:
        """Write the privacy statement, then rename the file: no text exists without its statement."""
        if sha256_of(self.part) != self._hash.hexdigest():
            raise UserError(f"{self.part} was changed by another program while it was written: delete it, and start over")
        with self._write_errors():
            write_json(statement_path(self.out), {**statement, "sha256": self._hash.hexdigest()})
            os.replace(self.part, self.out)
            fsync_folder(self.out.parent)
            self._state_path.unlink(missing_ok=True)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn an OSError into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out {self.out} cannot be written ({error.strerror}): make room or choose another place, then resume"
            ) from error


def without_nan(value: Any) -> Any:
    """Return a value with None, which JSON has, in place of floats that it has not: NaN and infinity."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
