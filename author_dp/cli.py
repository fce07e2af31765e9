"""Parse command lines and YAML files of options, and report errors as one line and an exit status.

Exit statuses: 0 for success, 2 for an error that the user can fix (`UserError`), 3 where the run's mechanism is not what its
ledger says (`MechanismError`), 128 + n after signal n. Other exceptions are bugs and keep their traceback.

Example:

    >>> model_args, training_args = parse_options([ModelArguments, TrainingArguments])
    >>> if __name__ == "__main__":
    ...     run(main, "fine-tune-dp.py", cleanup_temp_dirs)
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch.distributed as dist
import yaml
from transformers import HfArgumentParser

from author_dp.errors import NOT_SAVED, MechanismError, PeerLostError, SignalError, UserError, first_line, to_user_error
from author_dp.option_names import suggest_option

OTHER_RANKS_WAIT = 10  # seconds; meanwhile rank 0 prints the same error, and its exit ends the other ranks

SECRET_NAME = re.compile("token$|secret|password|key$")  # of options whose values no report shows
HIDDEN = "HIDDEN"

warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated")  # raised by peft's calls


# --- options ------------------------------------------------------------------------------------------


class OptionParser(argparse.ArgumentParser):
    """Raise UserError where argparse would print pages of usage and exit. --help still prints them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. --help lists all options")

    def parse_args(self, args=None, namespace=None) -> Any:
        """Parse all words; raise UserError for an unknown option, with the one that is likely meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            suggestion = suggest_option(unknown[0], option_strings(self))
            raise UserError(f"unknown option {' '.join(unknown)}{suggestion}. --help lists all options")
        return parsed


class ArgumentParser(OptionParser, HfArgumentParser):
    """Parser of dataclasses, from Hugging Face, that raises `UserError`."""


def parse_options(groups: Sequence[Any], arguments: Optional[Sequence[str]] = None) -> tuple:
    """Return one instance of each of `groups`, dataclasses of options.

    Args:
        arguments: words of the command line; default: `sys.argv[1:]`. `--config FILE` stands for the options in a YAML file.
            Options on the command line override those in the file.
    Raises:
        UserError: for unknown options, invalid values, and given options that have no effect, by a group's `check_given`.
    """
    words = load_config_args(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(groups)
    parser.parse_args(words)
    try:
        # Not the options of PROGRAM.args beside the program, which no check of the command line sees.
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, OverflowError, OSError) as error:  # raised by Hugging Face's own checks
        raise UserError(name_offending_options(first_line(error), words)) from error
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(parser.parse_args(words)))
    for group in parsed:
        if hasattr(group, "check_given"):
            group.check_given(given)
    return parsed


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a parser's options, without dashes."""
    return [name.removeprefix("--") for action in parser._actions for name in action.option_strings if name.startswith("--")]


def load_config_args(arguments: Sequence[str]) -> list[str]:
    """Replace `--config FILE` in a command line by the options in that YAML file, which come first."""
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parsed, rest = parser.parse_known_args(list(arguments))
    if parsed.config is None:
        return list(arguments)
    try:
        options = yaml.compose(parsed.config.read_text(encoding="utf-8"))
        check_config_keys(options)
        words = [word for name, value in options.value for word in to_cli_args(name.value, value)] if options else []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = f"{error}. It must hold one option per line, like 'target_epsilon: 8'"
        raise UserError(f"--config {parsed.config}: it cannot be read: {reason}") from error
    return words + rest


def check_config_keys(node: Optional[yaml.Node]) -> None:
    """Raise ValueError where a YAML mapping has a key twice: only the last one would count."""
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if duplicates := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{duplicates[0]} is in it {keys.count(duplicates[0])} times")
        children = [value for _, value in node.value]
    for child in children:
        check_config_keys(child)


def to_cli_args(name: str, value: yaml.Node) -> list[str]:
    """Return the words of one option, with its value as written ("no", "042"); no words for null."""
    if isinstance(value, yaml.MappingNode):  # Hugging Face expects JSON, with numbers
        return [f"--{name}", json.dumps(yaml.safe_load(yaml.serialize(value)), default=str)]
    if isinstance(value, yaml.SequenceNode):
        return [f"--{name}", *(str(item.value) for item in value.value)]
    return [] if value.tag == "tag:yaml.org,2002:null" else [f"--{name}", value.value]


def name_offending_options(message: str, words: Sequence[str]) -> str:
    """Prefix an error that names no option with the given ones whose names or values it quotes, or else with all."""
    given = [(option, value) for option, value in zip(words, [*words[1:], ""]) if option.startswith("--")]
    if any(option in message for option, _ in given):
        return message
    quoted = [option for option, _ in given if re.search(rf"\b{re.escape(option[2:])}\b", message)]
    quoted = quoted or [option for option, value in given if value and (value in message or value.startswith("{"))]
    return f"{', '.join(quoted or [option for option, _ in given])}: {message}"


def command_line() -> str:
    """Return the command of this program as one would type it, without the values of options that may be secret."""
    shown: list[str] = []
    for word in (os.fsencode(word).decode(errors="replace") for word in sys.argv):  # a path need not be UTF-8
        option, equals, _ = word.partition("=")
        if shown and is_secret_option(shown[-1]) and not word.startswith("--"):
            word = HIDDEN
        elif equals and is_secret_option(option):
            word = option + equals + HIDDEN
        shown.append(word)
    return f"python {shlex.join(shown)}"


def is_secret_option(option: str) -> bool:
    """Return whether a word of the command line is an option, perhaps abbreviated, whose value is secret."""
    name = option.removeprefix("--").replace("-", "_")
    return option.startswith("--") and bool(name) and ("hub_token".startswith(name) or SECRET_NAME.search(name) is not None)


# --- exit statuses ------------------------------------------------------------------------------------


def run(main: Callable[[], None], name: str, cleanup: Callable[[], None]) -> None:
    """Call a training script's `main`, and exit with the status that belongs to its error.

    Args:
        name: of the program, for its messages.
        cleanup: called before the exit. With several processes, the exit skips Python's exit handlers.
    """
    UserError.on_command_line = True
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
        if dist.is_initialized():  # otherwise gloo's threads may abort the process at its end
            dist.barrier()
            dist.destroy_process_group()
    except SignalError as error:
        if rank == 0:
            print(f"{name}: {error}", file=sys.stderr)
        exit_process(128 + error.number, cleanup)
    except KeyboardInterrupt:
        print(f"{name}: {NOT_SAVED}", file=sys.stderr)
        exit_process(130, cleanup)
    except MechanismError as error:
        exit_mechanism_error(error, name, rank, cleanup)
    except Exception as error:
        if hasattr(signal, "SIGCHLD"):  # torch's handler would raise here for a dead data loader worker
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        user_error = error if isinstance(error, UserError) else to_user_error(error)
        if user_error is None:
            raise
        exit_user_error(user_error, name, rank, cleanup)


def run_program(name: str, main: Callable[[list[str]], None], interrupted: str = "nothing more is written") -> None:
    """Call the `main` of a single-process program with the words of the command line.

    The exit status is 2 after a UserError, and 130 after Ctrl-C.

    Args:
        interrupted: how Ctrl-C affects the output, for the message.
    """
    UserError.on_command_line = True
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)


def exit_user_error(error: UserError, name: str, rank: int, cleanup: Callable[[], None]) -> NoReturn:
    """Print a user's error, on one process only, and exit with status 2."""
    if rank > 0 and not isinstance(error, PeerLostError):
        time.sleep(OTHER_RANKS_WAIT)
    print(f"{name}: error: {error}", file=sys.stderr)
    exit_process(2, cleanup)


def exit_mechanism_error(error: MechanismError, name: str, rank: int, cleanup: Callable[[], None]) -> NoReturn:
    """Print that the guarantee is void, on one process only, and exit with status 3."""
    if rank > 0:
        time.sleep(OTHER_RANKS_WAIT)
    kept = f". Delete these files, and the weights beside them; they may still claim one: {', '.join(error.not_voided)}"
    print(
        f"{name}: the mechanism is not what the ledger says: {error}. Nothing more was saved. What this run saved before has no "
        f"guarantee, and its privacy.json files now say so: do not publish it{kept if error.not_voided else ''}",
        file=sys.stderr,
    )
    exit_process(3, cleanup)


def exit_process(status: int, cleanup: Callable[[], None]) -> NoReturn:
    """Exit; with several processes at once, as gloo's threads may abort a process that ends normally."""
    sys.stdout.flush()
    sys.stderr.flush()
    cleanup()
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)
