"""Errors that a user can fix, and how other faults are reported.

A `UserError` names the option, file or column and the remedy. A program prints its message and exits with status 2. A
`MechanismError` cannot be fixed by a user, and ends a run with status 3. Every other exception is a bug, and keeps its traceback.
"""

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch.distributed as dist

from author_dp.wording import to_python_names

WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# Write errors of torch and safetensors, which have no errno.
WRITE_ERROR_MESSAGES = ("PytorchStreamWriter", "iostream error", "unexpected pos", "file write failed", "I/O error")
PEER_LOST_MESSAGES = ("Connection closed by peer", "Connection reset by peer")
LITTLE = 2**16  # bytes; a file system with less free is full
RESUME = "interrupted; resume with --resume_from_checkpoint True"
NOT_SAVED = "interrupted; no checkpoint was saved just now, and every step taken stays recorded"
RESUME_REMEDY = "No recorded step is lost: resume with --resume_from_checkpoint True"

MEMORY_REMEDY = (
    "--per_device_train_batch_size: the memory is not enough ({text}). Lower it, and raise --gradient_accumulation_steps by the "
    "same factor; or lower --sequence_len or --samples_per_author, or add --activation_checkpointing. {resume}"
)
KNOWN_FAULTS = {  # part of an error's message, or of its type's name: what the user can do
    "DataLoader worker": "--dataloader_num_workers: a worker ended, perhaps for lack of memory. Lower the number. {resume}",
    **dict.fromkeys(("OutOfMemoryError", "MemoryError", "DefaultCPUAllocator"), MEMORY_REMEDY),
    "to be installed. Run `pip": "--report_to: {text}",
    "`metric_for_best_model` training argument": "--metric_for_best_model: no such metric. Leave it out for eval_loss",
    "No usable temporary directory": "TMPDIR: {text}. Make one of them writable, with free space, or set TMPDIR to another",
    "ConnectError": "--push_to_hub: the Hugging Face hub cannot be reached. Leave it out, and later upload what "
    "`python -m author_dp.publish OUTPUT_DIR OUT` copies, never --output_dir itself",
}


class UserError(ValueError):
    """An error that the user can fix. The message, one line, names the option, file or column, and the remedy.

    Attributes:
        on_command_line: whether options are named as a command line has them, --target_epsilon. A program sets it. For others who
            call the library they are named as Python's arguments, target_epsilon.
    """

    on_command_line = False

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        super().__init__(line if self.on_command_line else to_python_names(line))


class PeerLostError(UserError):
    """Another process of the run has ended. Every remaining process reports it."""


class MechanismError(Exception):
    """The run's mechanism is not what its ledger says: what it has released has no known guarantee.

    Attributes:
        not_voided: files that may still claim a guarantee, as they could be neither rewritten nor removed, each with the reason.
    """

    not_voided: Sequence[str] = ()


class SignalError(Exception):
    """A signal ended the program after a complete step, or after the training; what the message names is saved.

    Args:
        number: of the signal. The exit status is 128 + number.
        message: what is saved, and how to continue.
    """

    def __init__(self, number: int, message: str = RESUME):
        super().__init__(message)
        self.number = number


def to_user_error(error: Exception) -> Optional[UserError]:
    """Convert a fault of the environment into a UserError; return None for a bug."""
    text = str(error)
    if isinstance(error, dist.DistBackendError) or any(message in text for message in PEER_LOST_MESSAGES):
        return PeerLostError(f"another process of this run has ended. Check what it wrote, or what killed it. {RESUME_REMEDY}")
    for words, message in KNOWN_FAULTS.items():
        if words in text or words in type(error).__name__:
            return UserError(message.format(text=first_line(error), resume=RESUME_REMEDY))
    if getattr(error, "errno", None) in WRITE_ERRNOS or any(message in text for message in WRITE_ERROR_MESSAGES):
        reason = getattr(error, "strerror", None) or "the write failed"
        if (place := temp_dir_at_fault(error)) is not None:
            return UserError(f"TMPDIR: the temporary folder {place} cannot be written ({reason}). Make room there, or set TMPDIR")
        return UserError(f"--output_dir cannot be written ({reason}). Make it writable, with free space. {RESUME_REMEDY}")
    return None


def temp_dir_at_fault(error: Exception) -> Optional[Path]:
    """Return the system's temporary folder if it is where a write failed: it has no room, or the error names a file in it."""
    place = Path(tempfile.gettempdir())
    name = getattr(error, "filename", None)
    is_inside = isinstance(name, str) and name.startswith(str(place / "author-texts-"))
    return place if is_inside or shutil.disk_usage(place).free < LITTLE else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def as_user_error(option: str) -> Iterator[None]:
    """Prefix an error of the Trainer with the option that it concerns, as a UserError."""
    try:
        yield
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError(f"{option}: {error}") from error
