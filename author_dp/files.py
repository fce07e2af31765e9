"""Write files atomically, and keep private ones readable by their owner only."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from author_dp.errors import UserError
from author_dp.permissions import USER_UMASK


def write_json(path: Path, content: dict[str, Any], private: bool = False) -> None:
    """Replace `path` atomically: a crash leaves the old file or the new one.

    Args:
        private: make the file readable by its owner only. Otherwise it gets the user's default mode, also within `owner_only`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        if not private:
            temporary.chmod(0o666 & ~USER_UMASK)
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise UserError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it") from error
    return content


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk, so that they survive a power cut; POSIX only."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}). Restore it") from error
    return digest.hexdigest()


def to_absolute_model_path(name: str) -> str:
    """Return the absolute path of a local folder; a hub name unchanged."""
    return os.path.abspath(name) if os.path.isdir(name) else name
