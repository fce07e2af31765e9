"""Let nobody but the owner read what a run writes, unless it is meant for others.

Guarantee: a file that is made within `owner_only` has mode 0600, a folder 0700, also where another library or a process that it
starts makes it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

USUAL_MASK = os.umask(0o077)  # the user's own, for files that others may read
os.umask(USUAL_MASK)


@contextmanager
def owner_only() -> Iterator[None]:
    """Make new files and folders readable for the owner only."""
    earlier = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(earlier)
