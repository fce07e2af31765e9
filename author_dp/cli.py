"""Run a program of the project: errors of the user end it with exit status 2 and one line, without a traceback."""

import sys
from collections.abc import Callable

from author_dp.errors import UserError


def run_program(name: str, main: Callable[[list[str]], None], interrupted: str = "nothing more is written") -> None:
    """Call `main` with the arguments of the command line, and exit as its errors want it.

    Args:
        name: of the program, for its messages.
        interrupted: what a Ctrl-C means for what is written.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
