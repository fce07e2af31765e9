"""Mark a model that this program trains, so that a later training cannot take it for an untouched one.

Guarantees: a model object that one run has trained in this process does not start another one, whose epsilon would leave that
out. The configuration of a trained model says that this program has trained it, wherever it is saved, and by whom.
"""

from typing import Any, Optional

from peft import PeftModel
from torch.distributed.tensor import DTensor

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.distributed import gather
from author_dp.errors import UserError

CONFIG_MARK = "trained_by_author_dp"  # in config.json
WITHOUT_PRIVACY = "without privacy"
ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")  # of a new adapter


def marked_model(model: Any) -> Any:
    """Return what carries the marks: the model, or the base below its adapters, which stays when they are merged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def mark_as_trained(model: Any, ledger: Optional[PrivacyLedger]) -> None:
    """Mark a model at the first step of its training.

    Args:
        ledger: the one that counts the training, and has its header; None without privacy.
    """
    marked_model(model)._trained_under = WITHOUT_PRIVACY if ledger is None else ledger.record_hashes[-1]
    set_training_mark(model)


def set_training_mark(model: Any) -> None:
    """Let a model's configuration say that this program has trained it."""
    setattr(marked_model(model).config, CONFIG_MARK, True)


def has_training_mark(model: Any, resumes: bool = False) -> bool:
    """Return whether a model was loaded whose configuration says that this program has trained it.

    Args:
        resumes: whether a checkpoint replaces its weights. Where this process has trained it, `check_origin_is_known` decides.
    """
    base = marked_model(model)
    is_loaded = bool(base.name_or_path) and getattr(base, "_trained_under", None) is None
    return getattr(base.config, CONFIG_MARK, False) is True and is_loaded and not resumes


def check_origin_is_known(model: Any, is_named: bool, ledger: PrivacyLedger) -> None:
    """Raise UserError for weights from a training that the report of this one would not name. Collective.

    Args:
        model: about to be trained, not from a checkpoint.
        is_named: whether the caller says where the model comes from.
        ledger: the one that counts its training.
    """
    trained_under = getattr(marked_model(model), "_trained_under", None)
    if trained_under is not None and trained_under not in ledger.record_hashes[1:]:  # the first is that of every ledger
        raise UserError(
            "model of DPTrainer: another run of this process has trained it, which the epsilon of this run would leave out. Load "
            "the model anew, or the result of that run from its folder"
        )
    if isinstance(model, PeftModel) and trained_under is None and not is_named and any(gather(adapter_is_trained(model))):
        raise UserError(
            "model of DPTrainer: its adapter is not a new one, and nothing says where it was trained. Give model_name=, the "
            "folder or hub name of the adapter; or that of its base, if the adapter begins with values of your choice"
        )


def adapter_is_trained(model: PeftModel) -> bool:
    """Return whether a weight that is zero in a new adapter is not; of a sharded model, in this process' shard."""
    weights = [weight for name, weight in model.named_parameters() if any(part in name for part in ZERO_AT_FIRST)]
    return any(bool((weight.to_local() if isinstance(weight, DTensor) else weight).any()) for weight in weights)
