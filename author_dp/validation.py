"""Declare options in argument classes, and validate their values.

Errors read `--option value: problem. Fix.`

Example:

    >>> @dataclass
    ... class Arguments:
    ...     eval_fraction: float = option(0.02, "Fraction of the authors to hold out.")
    >>> check_range("--eval_fraction", 1.5, "[0, 1)")
    Traceback (most recent call last):
    author_dp.errors.UserError: --eval_fraction 1.5: out of range. Give a value at least 0 and below 1
"""

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import field, fields
from typing import Any, Optional

from author_dp.errors import UserError

INTERVAL = re.compile(r"([\[(])(.+), (.+)([\])])")


def option(default: Any, help_text: str, choices: Optional[Collection[str]] = None, alias: str = "") -> Any:
    """Return a dataclass field that HfArgumentParser turns into a command-line option.

    Args:
        alias: another name of the option on the command line, as another library has it.
    """
    metadata: dict[str, Any] = {"help": help_text}
    if choices:
        metadata["choices"] = list(choices)
    if alias:
        metadata["aliases"] = sorted({f"--{alias}", f"--{alias.replace('_', '-')}"})
    return field(default=default, metadata=metadata)


def option_aliases(group: Any) -> dict[str, str]:
    """Return the options of a dataclass by their other names, without dashes."""
    return {
        alias.removeprefix("--").replace("-", "_"): one.name for one in fields(group) for alias in one.metadata.get("aliases", [])
    }


def check_range(option: str, value: Optional[float], interval: str, hint: str = "") -> None:
    """Raise UserError unless the value lies in an interval, such as "(0, 1]" or "[1, inf)".

    None, an option that is not given, passes. NaN never does.

    Args:
        hint: a sentence about usual values, for the error.
    """
    match = INTERVAL.fullmatch(interval)
    assert match is not None, interval
    opening, low, high, closing = match.groups()
    if value is None or (
        (float(low) < value or (opening == "[" and float(low) == value))
        and (value < float(high) or (closing == "]" and value == float(high)))
    ):
        return
    bounds = [f"{'at least' if opening == '[' else 'above'} {low}"] if low != "-inf" else []
    bounds += [f"{'at most' if closing == ']' else 'below'} {high}"] if high != "inf" else []
    raise UserError(
        f"{option} {value}: out of range. Give a value {' and '.join(bounds) or 'that is finite'}{hint and '. ' + hint}"
    )


def check_choice(option: str, value: Any, choices: Collection[Any]) -> None:
    """Raise UserError unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{option} {value}: no such choice. Give one of {', '.join(map(str, choices))}")


def check_exclusive(arguments: Any, *names: str) -> None:
    """Raise UserError where more than one of the named attributes is given, that is, not None."""
    given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise UserError(f"{', '.join(given)}: they exclude each other. Give one of them")


def check_usage(arguments: Sequence[str], usage: str, numbers: range) -> None:
    """Raise UserError for another number of arguments, or for an option: a program of this usage has none.

    Args:
        usage: the program and its arguments.
        numbers: of arguments that are allowed.
    """
    usage = f"usage: python -m {usage}"
    if {"-h", "--help"} & set(arguments):
        print(usage)
        sys.exit()
    if unknown := [word for word in arguments if word.startswith("--")]:
        raise UserError(f"unknown option {unknown[0]}: there are none; {usage}")
    if len(arguments) not in numbers or any(word.startswith("-") for word in arguments):
        raise UserError(usage)
