"""Mark a model that this program trains, so that a later training cannot take it for an untouched one.

Guarantees: a model object that one run has trained in this process does not start another one, whose epsilon would leave that
out. The configuration of a trained model says that this program has trained it, wherever it is saved, and by whom.
"""

from pathlib import Path
from typing import Any, Optional

from peft import PeftModel

from author_dp.errors import UserError
from author_dp.models.weights import adapter_base_model

CONFIG_MARK = "trained_by_author_dp"  # in config.json


def marked_model(model: Any) -> Any:
    """Return what carries the marks: the model, or the base below its adapters, which stays when they are merged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def mark_as_trained(model: Any, ledger: Path) -> None:
    """Mark a model whose training begins.

    Args:
        ledger: path of the ledger that counts the training.
    """
    marked_model(model)._trained_under = ledger.resolve()
    set_training_mark(model)


def set_training_mark(model: Any) -> None:
    """Let a model's configuration say that this program has trained it."""
    setattr(marked_model(model).config, CONFIG_MARK, True)


def has_training_mark(model: Any) -> bool:
    """Return whether a model's configuration says that this program has trained it."""
    return getattr(marked_model(model).config, CONFIG_MARK, False) is True


def check_origin_is_known(model: Any, name: Optional[str], ledger: Path) -> None:
    """Raise UserError for weights from a training that the report of this one would not name.

    Args:
        model: about to be trained, not from a checkpoint.
        name: hub name or folder that it comes from.
        ledger: path of the ledger that counts its training.
    """
    if getattr(marked_model(model), "_trained_under", None) not in (None, ledger.resolve()):
        raise UserError(
            "model of DPTrainer: another run of this process has trained it, which the epsilon of this run would leave out. Load "
            "the model anew, or the result of that run from its folder"
        )
    is_trained = isinstance(model, PeftModel) and any(
        weight.any() for parameter, weight in model.named_parameters() if "lora_B" in parameter or "lora_embedding_B" in parameter
    )
    is_ours = getattr(marked_model(model), "_trained_under", None) is not None
    if is_trained and not is_ours and (not name or adapter_base_model(name) is None):
        raise UserError(
            "model of DPTrainer: its adapter has been trained, and nothing says where. Give model_name=, the folder or hub name "
            "that the adapter was loaded from"
        )
