"""What a user can mend.

Promise: whoever raises a `UserError` has named the option, file or column and the remedy, so that a program can say the message
as it is and exit with status 2. `MechanismError` is what no user can mend, and ends a run with status 3. Every other exception
is an error of ours, and deserves its traceback.
"""


class UserError(ValueError):
    """Something that the user can mend. The message, one line, names the option, file or column, and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class LostProcessError(UserError):
    """Another process of the run is gone: every process that is left says so."""


class MechanismError(Exception):
    """The run found that its own mechanism is not what its ledger says: what it has released has no known guarantee."""
