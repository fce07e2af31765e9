"""Check that saved weights are those in memory, and save weights elsewhere where their folder fails.

The budget of a trained model is spent, whether or not it could be saved. So weights that cannot be written to the output
directory go to a new folder of mode 0700 beside it, or in the system's temporary directory. Their privacy.json is written last.
"""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from author_dp.accounting.output_dir import RESCUED
from author_dp.errors import RESUME_REMEDY, UserError, first_line, to_user_error
from author_dp.models.modes import temporarily_set
from author_dp.models.weights import write_hashed_weights
from author_dp.permissions import owner_only


def check_rescued(folder: Path, model: Any, state_dict: Optional[dict[str, torch.Tensor]] = None) -> None:
    """Compare the weights in `folder` with those in memory, one tensor at a time.

    Tensors that the library saves under names or in shapes of its own are left out.

    Args:
        state_dict: of a sharded model, gathered.
    Raises:
        UserError: if a saved tensor differs, or a trained parameter was not saved.
    """
    if isinstance(model, PeftModel):
        expected = get_peft_model_state_dict(model, state_dict, save_embedding_layers=False)
    else:
        expected = model.state_dict() if state_dict is None else state_dict
    saved, others = set[int](), 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = expected.get(name)
                if tensor is None or tensor.shape != torch.Size(file.get_slice(name).get_shape()):
                    others += 1
                    continue
                saved.add(tensor.data_ptr())
                if not torch.equal(file.get_tensor(name).to(tensor.device), tensor):
                    raise UserError(f"{path}: {name} is not what is in memory. Check the disk, and save again")
    if others or state_dict is not None:
        return  # names of their own, or copies whose addresses are others
    lost = [
        n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor) and p.data_ptr() not in saved
    ]
    if lost:
        raise UserError(f"{folder}: {lost[0]} was trained, and is not among the saved weights. Change the --lora options")


def rescue_weights(trainer: Any, state_dict: Optional[dict[str, torch.Tensor]]) -> Optional[Path]:
    """Save the weights outside the output directory; return where, or None if they fit nowhere.

    Args:
        trainer: a saving.CertifiedTrainer.
    """
    folder = trainer.folder.resolve()
    for parent in (folder.parent, Path(tempfile.gettempdir())):
        place = None
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{folder.name}{RESCUED}", dir=parent))  # of mode 0700
            is_adapter = isinstance(trainer.model, PeftModel)
            with write_hashed_weights(place, is_adapter, trainer.privacy_report, trainer.plan.disable_dp), owner_only():
                rescue_weights_only(trainer.model, place, state_dict)
                check_rescued(place, trainer.model, state_dict)
                if trainer.processing_class is not None:
                    with suppress(Exception):  # the tokenizer is that of the base model, which has it too
                        trainer.processing_class.save_pretrained(place)
            return place
        except Exception:  # the next place, or the error of the first attempt
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
    return None


def rescue_weights_only(model: Any, place: Path, state_dict: Optional[dict[str, torch.Tensor]]) -> None:
    """Save weights and configuration, without a generation configuration that may be the reason why saving failed."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = [(base, "generation_config", GenerationConfig())] if hasattr(base, "generation_config") else []
    with temporarily_set(*own):
        model.save_pretrained(place, state_dict=state_dict)


def rescue_message(error: Exception, folder: Path, place: Path) -> UserError:
    """Return the error of a failed save, with the place where the weights are."""
    known = error if isinstance(error, UserError) else to_user_error(error)
    if known is None:
        known = UserError(f"--output_dir {folder}: the model could not be saved ({first_line(error).rstrip(': ')})")
    reason = str(known).removesuffix(str(UserError(RESUME_REMEDY))).strip().removesuffix(".")
    return UserError(f"{reason}. The weights of this step are in {place}, with their privacy.json. {RESUME_REMEDY}")
