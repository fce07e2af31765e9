"""Write files atomically, and private ones for the owner only."""

import json
import os
from pathlib import Path
from typing import Any

from author_dp.permissions import USER_UMASK


def write_json(path: Path, content: dict[str, Any], private: bool = False) -> None:
    """Replace `path` atomically: a crash leaves the old file or the new one.

    Args:
        private: for its owner's eyes only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        if private:
            make_private(temporary)
        else:  # also within owner_only
            temporary.chmod(0o666 & ~USER_UMASK)
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def write_private_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file for its owner's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)


def make_private(path: Path) -> None:
    """Let nobody but the owner read a file, there or not yet, so that what is private can be told by its mode."""
    path.touch(mode=0o600)  # or it would be everybody's for a moment
    path.chmod(0o600)


def fsync_folder(folder: Path) -> None:
    """Let the names in `folder` survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
