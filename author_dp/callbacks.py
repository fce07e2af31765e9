"""Callbacks that people give to DPTrainer: they may watch; what they change must not follow losses that have no noise.

Guarantees: a callback that changes when training stops or saves, the learning rate, the optimizer's state or trained weights has
declared by what, or the run ends before the change takes effect. A class declares it by an attribute, which its subclasses do not
inherit:

    follows = "steps"       step numbers, time or signals alone; such a callback is not looked at
    follows = "evaluation"  metrics of held-out authors: the ledger's header says so, as of --load_best_model_at_end

Nothing may follow training losses. Not noticed are weights written through `.data`, which torch does not count, and models that a
callback saves on its own.
"""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from author_dp.errors import UserError
from author_dp.guards import by_metrics

STEPS, EVALUATION = "steps", "evaluation"
OF_TRANSFORMERS = {  # its other callbacks may only watch
    "DefaultFlowCallback": STEPS,
    "JITCheckpointCallback": STEPS,
    "EarlyStoppingCallback": EVALUATION,
    "PrinterCallback": STEPS,  # this and the next ones change nothing, and need not be looked at
    "ProgressCallback": STEPS,
    "NotebookProgressCallback": STEPS,
}


def follows(callback: TrainerCallback) -> Optional[str]:
    """Return by what a callback changes the training: STEPS, EVALUATION, or None where it has not said so."""
    kind = type(callback)
    if kind.__module__.startswith("transformers."):
        return OF_TRANSFORMERS.get(kind.__qualname__)
    return vars(kind).get("follows")


def by_callback(callbacks: Iterable[TrainerCallback]) -> Optional[str]:
    """Return the name of a callback by which evaluation metrics steer the training; None where there is none."""
    return next((f"callback {type(callback).__name__}" for callback in callbacks if follows(callback) == EVALUATION), None)


def by_scheduler(trainer: Any) -> Optional[str]:
    """Return the name of a scheduler that was given as an object, which may follow anything; None where there is none."""
    scheduler = trainer.lr_scheduler
    given = scheduler is not None and not getattr(trainer, "_created_lr_scheduler", False)
    return f"optimizers: {type(scheduler).__name__}" if given else None


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
        return getattr(type(callback), event) is not getattr(TrainerCallback, event)

    def snapshot(self, control: TrainerControl) -> dict[str, Any]:
        """Return by name whatever decides which weights come out; of tensors how often they were written."""
        trainer = self.trainer
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        found = {
            f"control.{name}": getattr(control, name) for name in ("should_training_stop", "should_epoch_stop", "should_save")
        }
        decided = ("global_step", "max_steps", "save_steps", "best_model_checkpoint", "best_global_step")
        found |= {f"state.{name}": getattr(trainer.state, name) for name in decided}
        found["args"] = by_metrics(trainer.args)
        found["the learning rate, or another option of the optimizer"] = [id(optimizer)] + [
            [(name, repr(value)) for name, value in group.items() if name != "params"]
            for group in getattr(optimizer, "param_groups", [])
        ]
        found["the optimizer's state"] = [
            (id(value), value._version) if isinstance(value, torch.Tensor) else value
            for of_weight in getattr(optimizer, "state", {}).values()
            for value in of_weight.values()
        ]
        found["the scheduler"] = id(scheduler), repr(scheduler.state_dict() if scheduler is not None else None)
        found["trained weights"] = [(id(weight), weight._version) for weight in weights]
        return found


def check_no_trial(trial: Any) -> None:
    """Raise UserError for a hyperparameter search, which spends in every trial and chooses by losses."""
    if trial is not None:
        raise UserError(
            "hyperparameter_search does not work here: each trial spends on its own, and the choice by losses more. Train with "
            "options that were chosen before."
        )
