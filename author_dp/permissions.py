"""Make files that a run writes readable by their owner only.

Within `owner_only` the umask is 0o077: new files get mode 0600 and directories 0700, also from libraries and child processes,
unless they call chmod. The umask holds for all threads of the process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER_UMASK = os.umask(0o077)  # the umask that the user set, for files that others may read
os.umask(USER_UMASK)


@contextmanager
def owner_only() -> Iterator[None]:
    """Make new files and directories readable by their owner only."""
    earlier = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(earlier)


def make_private(path: Path) -> None:
    """Set mode 0600 on `path`, which is created if missing, so that the mode marks it as private."""
    path.touch(mode=0o600)  # with the default mode, others could open a new file before chmod
    path.chmod(0o600)
