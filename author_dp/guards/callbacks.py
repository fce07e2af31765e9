"""Callbacks that people give to DPTrainer: they may watch; what they change must not follow losses that have no noise.

Guarantees: a callback that changes when training stops or saves, an option, the learning rate, the optimizer, its hooks or its
state, the scheduler, the other callbacks, the model's weights, hooks or settings (dropout's `p`, LoRA's `scaling`) has declared
by what, or the run ends before the change takes effect. A class declares it by an attribute, which its subclasses do not inherit:

    follows = "steps"       step numbers, time or signals alone; such a callback is not looked at
    follows = "evaluation"  metrics of held-out authors: the ledger's header says so, as of --load_best_model_at_end

A scheduler that is given as an object declares the same, on the object or in its class, or is refused. Nothing may follow
training losses. Not noticed are weights written through `.data` or `.detach().numpy()`, which torch does not count, signals that
a callback sends, and files that it deletes or saves on its own.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Optional

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from author_dp.errors import UserError

STEPS, EVALUATION = "steps", "evaluation"
OF_TRANSFORMERS = {  # its other callbacks may only watch
    "DefaultFlowCallback": STEPS,
    "JITCheckpointCallback": STEPS,
    "EarlyStoppingCallback": EVALUATION,
    "PrinterCallback": STEPS,  # this and the next ones change nothing, and need not be looked at
    "ProgressCallback": STEPS,
    "NotebookProgressCallback": STEPS,
}
EVENTS = {name for name in vars(TrainerCallback) if name.startswith("on_")}
FOLLOWS_BY_MODULE = (
    "_parameters",
    "_buffers",
    "_forward_pre_hooks",
    "_forward_hooks",
    "forward",
    "scaling",
)  # the last is LoRA's
SCALARS = {bool, int, float, str, type(None)}


def follows(callback: TrainerCallback) -> Optional[str]:
    """Return by what a callback changes the training: STEPS, EVALUATION, or None where it has not said so."""
    kind = type(callback)
    if EVENTS & vars(callback).keys():  # set on the object: its class declares nothing about these
        return None
    if kind.__module__.startswith("transformers."):
        return OF_TRANSFORMERS.get(kind.__qualname__)
    return vars(kind).get("follows")


def metric_driven_callback(callbacks: Iterable[TrainerCallback]) -> Optional[str]:
    """Return the name of a callback by which evaluation metrics steer the training; None where there is none."""
    return next((f"callback {type(callback).__name__}" for callback in callbacks if follows(callback) == EVALUATION), None)


def metric_driven_scheduler(trainer: Any) -> Optional[str]:
    """Return the name of a given scheduler by which evaluation metrics steer the training; None where there is none.

    Raises:
        UserError: with privacy, for one that has not declared what it follows: it may read training losses.
    """
    scheduler = trainer.lr_scheduler
    if scheduler is None or getattr(trainer, "_created_lr_scheduler", False):
        return None
    kind, name = vars(scheduler).get("follows", vars(type(scheduler)).get("follows")), type(scheduler).__name__
    if kind not in (STEPS, EVALUATION) and not trainer.privacy.disable_dp:
        raise UserError(
            f"optimizers: the scheduler {name} did not declare what it follows. Nothing may follow training losses, which have "
            f'no noise. If it follows step numbers alone, set scheduler.follows = "{STEPS}"; if metrics of held-out authors, '
            f'"{EVALUATION}".'
        )
    return None if kind == STEPS else f"optimizers: {name}"


def scalar_contents(thing: Any) -> list[Any]:
    """Return what an object holds: numbers and words by value, tensors by how often they were written, all else by identity."""
    return [(name, to_comparable(value)) for name, value in vars(thing).items()]


def written_attributes(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written, which torch does not count for those of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def to_comparable(value: Any) -> Any:
    """Return what equals its like while a value stays the same; it keeps the value, or another could get its id."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        return id(value), written_attributes(value), (value,)
    if isinstance(value, (list, tuple)):
        return [to_comparable(item) for item in value]
    if isinstance(value, dict):
        return [(id(key), to_comparable(item)) for key, item in value.items()]
    if isinstance(value, Optimizer):
        return id(value), scalar_contents(value)
    return id(value), repr(value) if isinstance(value, partial) else "", (value,)


class WatchedCallbacks(CallbackHandler):
    """The Trainer's callbacks, those that may not change anything compared before and after each event.

    Args:
        trainer: dp_utils.DPTrainer, whose callbacks are taken over.
    """

    def __init__(self, trainer: Any):
        vars(self).update(vars(trainer.callback_handler))
        self.trainer = trainer

    def call_event(self, event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        for callback in list(self.callbacks):
            one = CallbackHandler.__new__(CallbackHandler)  # adds and removals are those of the handler of all
            vars(one).update({**vars(self), "callbacks": [callback]})
            if not self.is_watched(callback, event):
                control = one.call_event(event, args, state, control, **kwargs)
                continue
            before = self.snapshot(control)
            control = one.call_event(event, args, state, control, **kwargs)
            after = self.snapshot(control)
            changed = next((name for name, value in before.items() if value != after[name]), None)
            if changed is not None:
                raise UserError(
                    f"callback {type(callback).__name__}: it changed {changed}, and did not declare by what before the training. "
                    "Nothing may follow training losses, which have no noise. If it follows step numbers, time or signals, set "
                    f'follows = "{STEPS}" in its class; if metrics of held-out authors, follows = "{EVALUATION}".'
                )
        return control

    def is_watched(self, callback: TrainerCallback, event: str) -> bool:
        """Return whether a callback may not change anything at this event."""
        kind = follows(callback)
        if kind == STEPS or (kind == EVALUATION and self.trainer.budget.by_metrics is not None):
            return False
        return getattr(getattr(callback, event), "__func__", None) is not getattr(TrainerCallback, event)

    def snapshot(self, control: TrainerControl) -> dict[str, Any]:
        """Return by name whatever decides which weights come out; of tensors how often they were written."""
        trainer = self.trainer
        found = {
            f"control.{name}": getattr(control, name) for name in ("should_training_stop", "should_epoch_stop", "should_save")
        }
        decided = ("global_step", "max_steps", "save_steps", "best_model_checkpoint", "best_global_step")
        found |= {f"state.{name}": getattr(trainer.state, name) for name in decided}
        found["args"] = repr([item for item in vars(trainer.args).items() if item[0] != "run_name"])  # which loggers set
        found["the callbacks"] = [id(trainer.callback_handler), *((id(other), follows(other)) for other in self.callbacks)]
        found["a function of the trainer"] = [to_comparable(value) for value in vars(trainer).values() if is_function(value)]
        found["the model's weights, hooks or settings"] = [follows_of_module(module) for module in trainer.model.modules()]
        found["the optimizer: its learning rate, another option, its state or its hooks"] = [
            to_comparable(trainer.optimizer),
            to_comparable(torch_optimizer._global_optimizer_pre_hooks),
            to_comparable(torch_optimizer._global_optimizer_post_hooks),
        ]
        if (scheduler := trainer.lr_scheduler) is not None:
            held = [value for value in vars(scheduler).values() if not isinstance(value, Optimizer)]
            found["the scheduler"] = id(scheduler), repr(scheduler.state_dict()), to_comparable(held)
        return found


def is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, torch.nn.Module)


def follows_of_module(module: torch.nn.Module) -> list[Any]:
    """Return what decides a module's output; not whether it is in training mode, which each step sets anew."""
    held = vars(module)
    return [
        id(module),
        [(name, value) for name, value in held.items() if type(value) in SCALARS and name != "training"],
        *[(name, to_comparable(held[name])) for name in FOLLOWS_BY_MODULE if held.get(name)],
    ]


def check_no_trial(trial: Any) -> None:
    """Raise UserError for a hyperparameter search, which spends in every trial and chooses by losses."""
    if trial is not None:
        raise UserError(
            "hyperparameter_search is not supported: every trial spends privacy budget, and so does choosing by its losses. Call "
            "train() with fixed options."
        )
