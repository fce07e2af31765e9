"""What a user can mend.

Promise: whoever raises a `UserError` has named the option, file or column and the remedy, so that a program can say the message
as it is and exit with status 2. `MechanismError` is what no user can mend, and ends a run with status 3. Every other exception
is an error of ours, and deserves its traceback.
"""

import errno
from typing import Optional

import torch.distributed as dist


class UserError(ValueError):
    """Something that the user can mend. The message, one line, names the option, file or column, and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class PeerLostError(UserError):
    """Another process of the run is gone: every process that is left says so."""


class MechanismError(Exception):
    """The run found that its own mechanism is not what its ledger says: what it has released has no known guarantee."""


WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


PEER_LOST_MESSAGES = ("Connection closed by peer", "Connection reset by peer")


KNOWN_FAULTS = {  # words of an error, or its name: what the user can do
    "DataLoader worker": "--dataloader_num_workers: a worker ended, perhaps for want of memory; lower it, and {go_on}",
    "to be installed. Run `pip": "--report_to: {text}",
    "`metric_for_best_model` training argument": "--metric_for_best_model: there is no such metric; leave it out for eval_loss",
    "ConnectError": "--push_to_hub: the Hugging Face hub cannot be reached. Leave it out, and later upload what "
    "`python -m author_dp.publish OUTPUT_DIR OUT` copies, never --output_dir itself",
}


# In errors of torch and safetensors, which have no errno.
WRITE_ERROR_MESSAGES = ("PytorchStreamWriter", "iostream error", "unexpected pos", "file write failed", "I/O error")


class SignalError(Exception):
    """A signal ended the training after a whole step; its checkpoint is saved.

    Args:
        number: of the signal. The exit status is 128 + number.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def to_user_error(error: Exception) -> Optional[UserError]:
    """Return what the user can do about a fault around the run; None for an error of ours."""
    text, go_on = str(error), "nothing that was counted is lost: go on with --resume_from_checkpoint True"
    if isinstance(error, dist.DistBackendError) or any(words in text for words in PEER_LOST_MESSAGES):
        return PeerLostError(f"another process of this run has ended, see what it said or what killed it; {go_on}")
    for words, message in KNOWN_FAULTS.items():
        if words in text or words in type(error).__name__:
            return UserError(message.format(text=text.strip().splitlines()[0], go_on=go_on))
    if getattr(error, "errno", None) in WRITE_ERRNOS or any(word in text for word in WRITE_ERROR_MESSAGES):
        reason = getattr(error, "strerror", None) or "the write failed"
        return UserError(f"--output_dir cannot be written ({reason}): make it writable, with free space; {go_on}")
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
