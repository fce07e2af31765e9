"""Show the progress of what takes longer than five seconds: as a bar, or as log lines where bars are disabled.

Bars show percentages and no counts: how many microbatches a step has discloses how many authors it has. Like the log, the
console is private all the same, as durations disclose that too (docs/threat-model.md, "Side channels").

Example:

    >>> with Progress("Evaluate", len(loader)) as progress:
    ...     for batch in loader:
    ...         progress.update()
"""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import pyarrow as pa
from tqdm import tqdm
from transformers.utils import logging

from author_dp.distributed import is_main_process
from author_dp.logs import get_logger

logger = get_logger(__name__)

DELAY = 5.0  # seconds before anything is shown; log lines come after 5, 10, 20, ... seconds, at most LONGEST_WAIT apart
LONGEST_WAIT = 300.0
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Progress:
    """Progress of one task; on the main process only.

    Args:
        name: what is done, a verb and its object.
        total: number of updates, more than which change nothing; None if unknown: log lines then say how many there were.
        bars: whether a bar is allowed; log lines are written otherwise.
    """

    def __init__(self, name: str, total: Optional[int], bars: bool = True):
        self.name, self.total, self.done = name, total, 0
        self.is_shown = is_main_process() and total != 0
        self.has_bar = bars and logging.is_progress_bar_enabled() and total is not None
        self.bar: Optional[tqdm] = None
        self.started = time.monotonic()
        self.next_line = self.started + DELAY

    def __enter__(self) -> "Progress":
        return self

    def update(self, done: int = 1) -> None:
        """Count `done` more."""
        self.done = self.done + done if self.total is None else min(self.done + done, self.total)
        now = time.monotonic()
        if not self.is_shown or now < self.started + DELAY:
            return
        if not self.has_bar:
            if now >= self.next_line:
                share = f"{self.done:,}" if self.total is None else f"{100 * self.done // self.total} %"
                logger.info(f"{self.name}: {share} after {now - self.started:.0f} s")
                self.next_line = now + min(now - self.started, LONGEST_WAIT)
        elif self.bar is None and self.done != self.total:
            options: Any = {"leave": False, "bar_format": BAR_FORMAT, "dynamic_ncols": True, "smoothing": 0}
            self.bar = tqdm(total=self.total, initial=self.done, desc=self.name, **options)
            self.bar.initial, self.bar.start_t = 0, self.bar.start_t - (now - self.started)  # of which the remaining time is made
            self.bar.refresh()
        elif self.bar is not None:
            self.bar.update(self.done - self.bar.n)

    def count(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches, and count their rows."""
        for batch in batches:
            yield batch
            self.update(batch.num_rows)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *_: Any) -> None:
        self.close()


def track(items: Collection[Any], name: str, bars: bool = True) -> Iterator[Any]:
    """Yield the items; show progress."""
    with Progress(name, len(items), bars) as progress:
        for item in items:
            yield item
            progress.update()


@contextmanager
def track_calls(model: Any, name: str, expected: int) -> Iterator[None]:
    """Show progress by the calls of a model.

    Args:
        expected: about how many calls there will be.
    """
    with Progress(name, expected) as progress:
        hook = model.register_forward_hook(lambda *_: progress.update())
        try:
            yield
        finally:
            hook.remove()
