"""Print log lines under the name of the library that they come from, and above progress bars.

This project's loggers are children of transformers' logger, so that --log_level and added handlers apply to them. Importing this
module replaces the console handler that transformers installs; handlers and formats of the user's own are left alone.

Example:

    >>> logger = get_logger(__name__)
    >>> logger.warning("Lower the delta.")
    [author_dp] Lower the delta.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

PROJECT = "author_dp"
ROOT = f"transformers.{PROJECT}"
TRANSFORMERS_FORMAT = "[transformers] %(message)s"


class ConsoleFormatter(logging.Formatter):
    """Begin each record with the library that it comes from."""

    def format(self, record: logging.LogRecord) -> str:
        library = PROJECT if record.name.startswith(ROOT) else "transformers"
        return f"[{library}] {super().format(record)}"


class ConsoleHandler(logging.StreamHandler):
    """Write each record on lines of its own: progress bars are cleared before, and drawn again after."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def get_logger(name: str) -> Any:
    """Return the logger of a module of this project, with the methods that transformers adds (warning_once)."""
    return transformers_logging.get_logger(f"{ROOT}.{name.removeprefix(f'{PROJECT}.')}")


@contextmanager
def without_lines(logger: str, beginnings: tuple[str, ...]) -> Iterator[None]:
    """Inside, drop the log lines of a logger of transformers, such as "trainer", that begin with one of `beginnings`."""

    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginnings)

    filtered: Any = transformers_logging.get_logger(f"transformers.{logger}")
    filtered.addFilter(is_kept)
    try:
        yield
    finally:
        filtered.removeFilter(is_kept)


def replace_console_handler() -> None:
    """Replace transformers' console handler, if it is still as transformers has made it."""
    root = transformers_logging.get_logger("transformers")  # creates the handler
    for handler in list(root.handlers):
        is_default = getattr(handler.formatter, "_fmt", None) == TRANSFORMERS_FORMAT
        if is_default and isinstance(handler, logging.StreamHandler) and not isinstance(handler, ConsoleHandler):
            console = ConsoleHandler(handler.stream)
            console.setFormatter(ConsoleFormatter())
            root.removeHandler(handler)
            root.addHandler(console)
            transformers_logging._default_handler = console  # so that `disable_default_handler` removes it


replace_console_handler()
