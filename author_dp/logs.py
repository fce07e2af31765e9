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

# Log lines of transformers that do not help. Padding is on the right, where causal attention ignores it. GPT-2's class name,
# which is not set in a config, selects the default loss.
NOISY_LOG_PREFIXES = (
    "We strongly recommend passing in an `attention_mask`", "`loss_type=None` was set in the config",
    "loading configuration file", "Model config ", "Generate config ",  # pages at each save
    "Configuration saved in", "Model weights saved in", "tokenizer config file saved in", "Special tokens file saved in",
    "chat template saved in", "Saving model checkpoint to", "max_steps is given, it will override",
)  # fmt: skip
NOISY_LOGGERS = ("modeling_utils", "configuration_utils", "generation.configuration_utils", "tokenization_utils_base", "trainer")


class LogFormatter(logging.Formatter):
    """Begin each record with the library that it comes from."""

    def format(self, record: logging.LogRecord) -> str:
        library = PROJECT if record.name.startswith(ROOT) else "transformers"
        return f"[{library}] {super().format(record)}"


class LogHandler(logging.StreamHandler):
    """Write each record on lines of its own: progress bars are cleared before, and drawn again after."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def get_logger(name: str) -> Any:
    """Return the logger of a module of this project, with the methods that transformers adds (warning_once)."""
    return transformers_logging.get_logger(f"{ROOT}.{name.removeprefix(f'{PROJECT}.')}")


@contextmanager
def without_log_lines(logger: str, beginnings: tuple[str, ...]) -> Iterator[None]:
    """Inside, drop the log lines of a logger of transformers, such as "trainer", that begin with one of `beginnings`."""

    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginnings)

    filtered: Any = transformers_logging.get_logger(f"transformers.{logger}")
    filtered.addFilter(is_kept)
    try:
        yield
    finally:
        filtered.removeFilter(is_kept)


def replace_log_handler() -> None:
    """Replace transformers' console handler, if it is still as transformers has made it."""
    root = transformers_logging.get_logger("transformers")  # creates the handler
    for handler in list(root.handlers):
        is_default = getattr(handler.formatter, "_fmt", None) == TRANSFORMERS_FORMAT
        if is_default and isinstance(handler, logging.StreamHandler) and not isinstance(handler, LogHandler):
            console = LogHandler(handler.stream)
            console.setFormatter(LogFormatter())
            root.removeHandler(handler)
            root.addHandler(console)
            transformers_logging._default_handler = console  # so that `disable_default_handler` removes it


def is_useful_log(record: Any) -> bool:
    """Return whether a log record starts with none of NOISY_LOG_PREFIXES."""
    return not record.getMessage().startswith(NOISY_LOG_PREFIXES)


def configure_logging(args: Any) -> None:
    """Show progress bars on rank 0, unless disabled, and drop log lines with NOISY_LOG_PREFIXES.

    Args:
        args: transformers.TrainingArguments. Like datasets, it is not imported above, or `author_dp.ledger` would start slowly.
    """
    import datasets

    if args.disable_tqdm or args.process_index > 0:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    for name in NOISY_LOGGERS:
        transformers_logging.get_logger(f"transformers.{name}").addFilter(is_useful_log)  # type: ignore[arg-type]


replace_log_handler()
