"""Keep freed memory within the process while it trains, on CPUs.

Promise: nothing here is about privacy. By default the C library hands memory back when it is freed, and each step asks the system
for gigabytes once more, page by page: a tenth of its time and more. Pieces above 32 MB, logits for the most part, still go back:
texts differ in length, and what one step leaves would not fit the next.

References:
    [1] mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; of glibc only
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TOLD = ("trim_threshold", "mmap_threshold", "mmap_max")  # of MALLOC_..._ and glibc.malloc...
NEVER = -1
LARGEST = 2**25  # bytes, up to which glibc's own threshold grows; it takes no larger one


@contextmanager
def memory_kept(keep: bool = True) -> Iterator[None]:
    """Keep what is freed in here for what is needed next, and hand it back at the end.

    Nothing happens without glibc, or where the environment says otherwise (MALLOC_TRIM_THRESHOLD_ and its like, GLIBC_TUNABLES).

    Args:
        keep: False: do nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = any(f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}" in tunables for name in TOLD)
    library = ctypes.CDLL(None) if keep and not told and sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, LARGEST)
    library.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)  # as glibc sets it when its own threshold has grown
        library.malloc_trim(0)
