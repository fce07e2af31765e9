"""LoRA adapters for any model: which layers they go to, and what may be trained beside them.

Promise: nothing here is about privacy. Whatever is trainable afterwards is clipped, or refused, by what follows (proof.py).

Example:

    >>> model = add_lora(model, targets=["all-linear"], r=8, lora_alpha=8)

References:
    [1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""

from typing import Any, Optional

from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from author_dp.models.quantization import is_plain_linear, is_quantized

ALL_LINEAR = "all-linear"
# peft refuses these layers where Mamba's kernels read their weights past the adapter.
FUSED_IN_MAMBA = ("out_proj", "conv1d")
KINDS_OF_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def add_lora(model: PreTrainedModel, targets: Optional[list[str]] = None, **options: Any) -> Any:
    """Return the model with LoRA adapters.

    Args:
        targets: names of layers, or ["all-linear"]: all linear layers but the head. Default: peft's choice for the kind of model,
            all-linear where peft has none.
        options: of peft's LoraConfig.
    Raises:
        ValueError: where the names or options do not fit the model.
    """
    options["task_type"] = TaskType.CAUSAL_LM
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    if targets is None and model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        try:
            return get_peft_model(model, LoraConfig(**options))
        except NoMatchingPeftModuleError:  # experts of Mixtral, which are no layers any more
            pass
    if targets in (None, [ALL_LINEAR]):
        return get_peft_model(
            model, LoraConfig(target_modules=ALL_LINEAR, exclude_modules=excluded_layers(model) or None, **options)
        )
    return get_peft_model(model, LoraConfig(target_modules=targets, **options))


def excluded_layers(model: Any) -> list[str]:
    """Return linear layers that all-linear is to leave out: those that return more than their product, like Llama 4's router."""
    names = []
    fused = model.config.model_type in KINDS_OF_MAMBA
    for name, layer in model.named_modules():
        fits = is_plain_linear(layer) or is_quantized(layer)
        if (isinstance(layer, nn.Linear) and not fits) or (fused and name.split(".")[-1] in FUSED_IN_MAMBA):
            names.append(name)
    return names
