"""Word messages: numbers, also with their nouns, lists of names, and options as a command line or Python has them."""

import math
import re
from typing import Optional

# A launcher's options stay: "accelerate launch --mixed_precision".
LEADING = re.compile(r"^--(\w+) (\S+): ")
WITH_VALUE = re.compile(r"(?<!launch )--([a-z]\w*) (True|False|-?\d[\d.e-]*\b)")
OPTION = re.compile(r"(?<!launch )(?<![\w-])--([a-z]\w*)")
RENAMED = {"--fsdp full_shard": "full_shard=True", "--fsdp": "full_shard"}  # of DPTrainer


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: "1 step", "1,200 steps", "2 processes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def format_names(names: list[str], most: int) -> str:
    """Return the first `most` names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def to_python_names(message: str) -> str:
    """Return a message with its options as Python's arguments.

    Example:

        >>> to_python_names("--target_epsilon 0.0: out of range. Give --disable_dp True, or leave out --bf16")
        'target_epsilon=0.0: out of range. Give disable_dp=True, or leave out bf16'
    """
    for option, argument in RENAMED.items():
        message = re.sub(rf"{option}\b(?!_)", argument, message)
    message = LEADING.sub(r"\1=\2: ", message)
    return OPTION.sub(r"\1", WITH_VALUE.sub(r"\1=\2", message))


def format_number(value: Optional[float]) -> str:
    """Return a number with six significant digits; "none" for None."""
    return "none" if value is None else f"{value:,.6g}"


def format_percent_up(share: float) -> str:
    """Return a share in percent, rounded up to one decimal; to two below 1 %."""
    decimals = 1 if share >= 0.01 else 2
    percent = math.ceil(round(share * 100 * 10**decimals, 6)) / 10**decimals
    return f"{percent:g} %"
