"""Refuse callbacks that steer the training by losses that have no noise; schedulers: metric_driven.py.

Guarantees: a callback that changes the training has declared what it follows, or the run ends before the change takes effect.
Changes are noticed to when training stops or saves, options, the learning rate, the optimizer with its hooks and state, the
scheduler, the other callbacks, and the model's weights, hooks and settings (dropout's `p`, LoRA's `scaling`). A class declares it
by an attribute, which subclasses do not inherit:

    follows = "steps"       step numbers, time or signals alone; such a callback is not watched
    follows = "evaluation"  metrics of held-out authors: the ledger's header records it, as it does --load_best_model_at_end

A scheduler that is given as an object declares the same, on the object or in its class, or is refused. Nothing may follow
training losses.

Not noticed are weights written through `.data` or `.detach().numpy()`, which torch does not count, signals that a callback sends,
and files that it deletes or saves itself.
"""

from functools import partial
from typing import Any, Optional

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from author_dp.errors import UserError
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise
from author_dp.mechanism.optimizer import GradBuffer

STEPS, EVALUATION = "steps", "evaluation"
TRANSFORMERS_CALLBACKS = {  # all others of transformers may only watch
    "DefaultFlowCallback": STEPS,
    "JITCheckpointCallback": STEPS,
    "EarlyStoppingCallback": EVALUATION,
    "PrinterCallback": STEPS,  # this one and the next two change nothing, and need not be watched
    "ProgressCallback": STEPS,
    "NotebookProgressCallback": STEPS,
}
EVENTS = {name for name in vars(TrainerCallback) if name.startswith("on_")}
MODULE_STATE = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks", "forward", "scaling")  # scaling: LoRA's
TRAINER_STATE = ("global_step", "max_steps", "save_steps", "best_model_checkpoint", "best_global_step")
CONTROL = ("should_training_stop", "should_epoch_stop", "should_save")
PARTS_OF_A_STEP = (Optimizer, GradBuffer, GaussianNoise, BandMFNoise)  # compared attribute by attribute
SCALARS = {bool, int, float, str, type(None)}


# --- what callbacks follow -----------------------------------------------------------------------------


def get_declaration(callback: TrainerCallback) -> Optional[str]:
    """Return what a callback declares to follow: STEPS, EVALUATION, or None where it declares nothing."""
    callback_class = type(callback)
    if EVENTS & vars(callback).keys():  # methods set on the object, for which its class declares nothing
        return None
    if callback_class.__module__.startswith("transformers."):
        return TRANSFORMERS_CALLBACKS.get(callback_class.__qualname__)
    return vars(callback_class).get("follows")


# --- what callbacks change ------------------------------------------------------------------------------


class WatchedCallbacks(CallbackHandler):
    """The Trainer's callbacks; those that may not change anything are compared before and after each event.

    Args:
        trainer: dp_utils.DPTrainer, whose callbacks are taken over.
    """

    def __init__(self, trainer: Any):
        vars(self).update(vars(trainer.callback_handler))
        self.trainer = trainer

    def call_event(self, event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Call each callback's method for the event.

        Raises:
            UserError: where a watched callback has changed the training.
        """
        for callback in list(self.callbacks):
            single = CallbackHandler.__new__(CallbackHandler)  # so that adding and removing callbacks goes to self
            vars(single).update({**vars(self), "callbacks": [callback]})
            before = self.snapshot(control) if self.is_watched(callback, event) else {}
            control = single.call_event(event, args, state, control, **kwargs)
            after = self.snapshot(control) if before else {}
            changed = next((name for name, value in before.items() if value != after[name]), None)
            if changed is not None:
                raise UserError(
                    f"callback {type(callback).__name__}: it changed {changed}, and did not declare before the training what it "
                    "follows. Nothing may follow training losses, which have no noise. If it follows step numbers, time or "
                    f'signals, set follows = "{STEPS}" in its class; if metrics of held-out authors, follows = "{EVALUATION}"'
                )
        return control

    def is_watched(self, callback: TrainerCallback, event: str) -> bool:
        """Return whether a callback has code for this event, and may not change anything."""
        declared = get_declaration(callback)
        if declared == STEPS or (declared == EVALUATION and self.trainer.budget.by_metrics is not None):
            return False
        return getattr(getattr(callback, event), "__func__", None) is not getattr(TrainerCallback, event)

    def snapshot(self, control: TrainerControl) -> dict[str, Any]:
        """Return, by name, all that decides which weights come out; for tensors, how often they were written."""
        trainer = self.trainer
        state = {f"control.{name}": getattr(control, name) for name in CONTROL}
        state |= {f"state.{name}": getattr(trainer.state, name) for name in TRAINER_STATE}
        state["args"] = repr([item for item in vars(trainer.args).items() if item[0] != "run_name"])  # loggers set run_name
        state["the callbacks"] = [
            id(trainer.callback_handler),
            *((id(other), get_declaration(other)) for other in self.callbacks),
        ]
        functions = [value for value in vars(trainer).values() if callable(value) and not isinstance(value, torch.nn.Module)]
        state["a function of the trainer"] = [to_comparable_callback_value(value) for value in functions]
        state["the model's weights, hooks or settings"] = [snapshot_callback_module(module) for module in trainer.model.modules()]
        state["the optimizer: its learning rate, another option, its state or its hooks"] = [
            to_comparable_callback_value(trainer.optimizer),
            to_comparable_callback_value(torch_optimizer._global_optimizer_pre_hooks),
            to_comparable_callback_value(torch_optimizer._global_optimizer_post_hooks),
        ]
        if (scheduler := trainer.lr_scheduler) is not None:
            held = [value for value in vars(scheduler).values() if not isinstance(value, Optimizer)]
            state["the scheduler"] = id(scheduler), repr(scheduler.state_dict()), to_comparable_callback_value(held)
        return state


def snapshot_callback_module(module: torch.nn.Module) -> list[Any]:
    """Return what decides a module's output, except its training mode, which each step sets again."""
    held = vars(module)
    return [
        id(module),
        [(name, value) for name, value in held.items() if type(value) in SCALARS and name != "training"],
        *[(name, to_comparable_callback_value(held[name])) for name in MODULE_STATE if held.get(name)],
    ]


def snapshot_callback_attributes(thing: Any) -> list[Any]:
    """Return an object's attributes: scalars by value, tensors by how often they were written, others by identity."""
    return [(name, to_comparable_callback_value(value)) for name, value in vars(thing).items()]


def to_comparable_callback_value(value: Any) -> Any:
    """Return a snapshot of a value; equal snapshots mean that it did not change.

    The snapshot holds the value itself, as another object could otherwise get its id.
    """
    if type(value) in SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        return id(value), count_callback_writes(value), value.requires_grad, (value,)
    if isinstance(value, (list, tuple)):
        return [to_comparable_callback_value(item) for item in value]
    if isinstance(value, dict):
        return [(id(key), to_comparable_callback_value(item)) for key, item in value.items()]
    if isinstance(value, PARTS_OF_A_STEP):
        return id(value), snapshot_callback_attributes(value)
    return id(value), repr(value) if isinstance(value, partial) else "", (value,)


def count_callback_writes(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written; 0 for one of inference mode, for which torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
