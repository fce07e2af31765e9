"""Stop training at a signal, after the current step and with a checkpoint; after the last step, say where the result is."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from author_dp.errors import NOT_SAVED, RESUME, SignalError
from author_dp.logs import get_logger
from author_dp.training.checkpointing import latest_complete_checkpoint
from author_dp.training.resuming import load_checkpoint_state

logger = get_logger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECOND_SIGINT_DELAY = 2.0  # seconds; a launcher forwards the same signal sooner than a person sends a second one


class SignalReceiver:
    """Note the first signal of this process instead of ending it; a second Ctrl-C raises KeyboardInterrupt.

    Args:
        plan: what happens next, for the log.
        ends_at_once: whether the first signal raises KeyboardInterrupt, too.
    Attributes:
        received: the first signal; 0 if none.
    """

    def __init__(self, plan: str, ends_at_once: bool = False):
        self.plan, self.ends_at_once = plan, ends_at_once
        self.received, self.received_at = 0, 0.0
        self.previous_handlers: dict[int, Any] = {}

    def start(self) -> None:
        """Handle signals from now on; in the main thread only, where Python allows it."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            if self.ends_at_once:
                raise KeyboardInterrupt
            logger.warning(f"{signal.Signals(number).name}: {self.plan}.")
        elif number == signal.SIGINT and time.monotonic() - self.received_at > SECOND_SIGINT_DELAY:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def sync(self, device: torch.device) -> int:
        """Return a signal that one of the processes has received; 0 if none has. Collective."""
        if not dist.is_initialized():
            return self.received
        received = torch.tensor(self.received, device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return int(received)  # a signal may change self.received at any time


class StopOnSignal(SignalReceiver, TrainerCallback):
    """On SIGTERM or Ctrl-C, finish the step, save a checkpoint and stop; a second Ctrl-C stops at once.

    All processes stop after the same step, whichever of them received the signal. Transformers' --enable_jit_checkpoint supports
    neither Ctrl-C nor several processes.

    Attributes:
        synced_signal: the signal after which all processes stop; 0 if none.
    """

    follows = "steps"  # not metrics; signals come from people

    def __init__(self):
        super().__init__("finishing the step, then saving a checkpoint")
        self.synced_signal = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.synced_signal = self.sync(args.device)
        if self.synced_signal:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def check(self, trainer: Any) -> None:
        """Raise SignalError if a signal has stopped the training, or came after its last step. Collective.

        Args:
            trainer: dp_utils.DPTrainer, whose training has ended.
        """
        if self.synced_signal:
            raise SignalError(self.synced_signal, describe_interruption(trainer))
        if late := self.sync(trainer.args.device):  # such as while the last checkpoint was saved
            trainer.save_model()
            raise SignalError(late, describe_interruption(trainer, saved=True))


@contextmanager
def signals_end_with_message(trainer: Any, saved: bool) -> Iterator[None]:
    """Inside, after the last step, let a signal end the program with a message that says where the model is.

    Args:
        trainer: dp_utils.DPTrainer.
        saved: whether the model is saved in the output directory.
    Raises:
        SignalError: after a signal.
    """
    signals = SignalReceiver("", ends_at_once=True)
    signals.start()
    try:
        yield
    except KeyboardInterrupt:
        raise SignalError(signals.received or signal.SIGINT, describe_interruption(trainer, saved)) from None
    finally:
        signals.restore()


@contextmanager
def finished_training(trainer: Any) -> Iterator[None]:
    """Save the model, then run what follows. A signal ends that, and the error says where the model is.

    Args:
        trainer: dp_utils.DPTrainer, whose training has ended.
    Raises:
        SignalError: after a signal.
    """
    signals = SignalReceiver("saving the model first")
    signals.start()
    try:
        trainer.save_model()
    finally:
        signals.restore()
    if received := signals.sync(trainer.args.device):
        raise SignalError(received, describe_interruption(trainer, saved=True))
    with signals_end_with_message(trainer, saved=True):
        yield


def describe_interruption(trainer: Any, saved: bool = False) -> str:
    """Return what is saved after a signal, and how to write the rest.

    Args:
        trainer: dp_utils.DPTrainer.
        saved: whether the model is saved in the output directory.
    """
    folder = trainer.folder
    checkpoint = latest_complete_checkpoint(folder)
    resumable = checkpoint is not None and load_checkpoint_state(checkpoint).global_step >= trainer.plan.steps
    if not saved and not resumable:
        return RESUME if checkpoint else NOT_SAVED
    words = f"interrupted; training is finished, and its model is saved in {folder if saved else checkpoint}. "
    if resumable:
        return f"{words}The same command with --resume_from_checkpoint True writes the rest, and spends no privacy budget"
    return f"{words}python -m author_dp.report {folder} writes model card and report, without an evaluation"
