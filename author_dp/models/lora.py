"""Add LoRA adapters [1] to a causal language model: options, target layers, errors.

Trainable parameters that this leaves in the model are clipped or refused later (guards/model_check.py).

Example:

    >>> model = add_lora_adapters(model, targets=["all-linear"], r=8, lora_alpha=8)

References:
    [1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
"""

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from author_dp.errors import UserError, first_line
from author_dp.files import read_json_object
from author_dp.models.bfloat16_layers import is_plain_linear
from author_dp.models.quantization import check_quantized_frozen, is_quantized
from author_dp.models.weights import ADAPTER_CONFIG, check_lfs_pointers
from author_dp.validation import check_range, option

ALL_LINEAR = "all-linear"
MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
MAMBA_FUSED_LAYERS = ("out_proj", "conv1d")  # Mamba's kernels read these weights past the adapter, so peft refuses the layers


@dataclass
class LoraArguments:
    """Train low-rank adapters instead of all weights (Hu et al. 2021, arXiv 2106.09685)."""

    enable_lora: bool = option(False, "Train LoRA adapters; the base model stays frozen.")
    lora_dim: int = option(8, "Rank of the adapters.", alias="lora_r")
    lora_alpha: int = option(8, "Scale the adapters' output by lora_alpha / lora_dim.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: Optional[list[str]] = option(
        None,
        "Names of the layers to adapt, or all-linear for all linear layers except the head. Default: peft's choice "
        "for the model, or all-linear where peft has none.",
    )
    lora_use_dora: bool = option(False, "Train magnitudes separately from directions (DoRA).")
    lora_use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_dim) instead: rank-stabilized LoRA.")
    lora_bias: str = option("none", "Train biases too: all, or those of adapted layers.", ["none", "all", "lora_only"])
    lora_modules_to_save: Optional[list[str]] = option(
        None, "Names of layers to train in full alongside the adapters, such as lm_head."
    )
    base_dtype: Optional[str] = option(
        None,
        "Data type of the frozen base under LoRA: float32 (the default), or bfloat16 for half the memory.",
        ["float32", "bfloat16"],
    )
    load_in_4bit: bool = option(
        False, "Keep the linear layers of the frozen base under LoRA in 4 bits (NF4); needs bitsandbytes."
    )

    def __post_init__(self):
        if self.load_in_4bit and self.base_dtype is not None:
            raise UserError(
                f"--load_in_4bit, --base_dtype {self.base_dtype}: they contradict each other. Leave one of them out (in 4 bits, "
                "embeddings and the head are in bfloat16)"
            )
        flag = self.base_precision_flag()
        if flag and not self.enable_lora:
            raise UserError(f"{flag}: it is for weights that are not trained. Add --enable_lora, or leave it out")
        self.check_given({one.name for one in fields(self) if getattr(self, one.name) != one.default})
        if self.load_in_4bit and self.lora_bias != "none":
            raise UserError(
                f"--lora_bias {self.lora_bias}: it would train biases of layers that --load_in_4bit keeps in 4 bits. Leave it "
                "out, or use --base_dtype bfloat16"
            )
        check_range("--lora_dim", self.lora_dim, "[1, inf)")
        check_range("--lora_alpha", self.lora_alpha, "[1, inf)")
        check_range("--lora_dropout", self.lora_dropout, "[0, 1)")

    def check_given(self, names: set[str]) -> None:
        """Raise UserError for options of adapters, by their names, where there are none; given with their defaults, too."""
        given = [f"--{one.name}" for one in fields(self) if one.name in names and one.name.startswith("lora_")]
        if given and not self.enable_lora:
            raise UserError(f"{', '.join(given)}: without --enable_lora, all weights are trained. Add it, or leave this out")

    @property
    def base_precision(self) -> str:
        """Return the precision of the frozen base: nf4, bfloat16 or float32."""
        return "nf4" if self.load_in_4bit else self.base_dtype or "float32"

    def base_precision_flag(self) -> Optional[str]:
        """Return the option that stores the base in less than float32; None without one."""
        return {"nf4": "--load_in_4bit", "bfloat16": "--base_dtype bfloat16"}.get(self.base_precision)

    def to_options(self) -> Optional[dict[str, Any]]:
        """Return keyword arguments of `add_lora_adapters`; None without --enable_lora."""
        if not self.enable_lora:
            return None
        return {
            "targets": self.lora_target_modules,
            "r": self.lora_dim,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_dora": self.lora_use_dora,
            "use_rslora": self.lora_use_rslora,
            "bias": self.lora_bias,
            "modules_to_save": self.lora_modules_to_save,
        }


def add_lora_adapters(model: PreTrainedModel, targets: Optional[list[str]] = None, **options: Any) -> Any:
    """Return the model with new LoRA adapters.

    Args:
        targets: names of layers, or ["all-linear"]: all linear layers except the head. Default: peft's choice for the type of
            model, or all-linear where peft has none.
        options: of peft's LoraConfig.
    Raises:
        UserError: where names or options do not fit the model, or 4-bit weights would be trained.
    """
    check_quantized_frozen(model, options.get("modules_to_save") or [])
    options["task_type"] = TaskType.CAUSAL_LM
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        if targets is None and model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            try:
                return get_peft_model(model, LoraConfig(**options))
            except NoMatchingPeftModuleError:  # Mixtral: its experts are no longer layers
                pass
        if targets in (None, [ALL_LINEAR]):
            options["exclude_modules"] = excluded_layers(model) or None
            targets = ALL_LINEAR  # type: ignore[assignment]  # peft tells the word from a list of names
        return get_peft_model(model, LoraConfig(target_modules=targets, **options))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"--lora_target_modules, or another --lora option: it does not fit {model.name_or_path or 'the model'} "
            f"({first_line(error)}). Change it, or leave it out"
        ) from error


def adapts_tied_weights(model: nn.Module) -> bool:
    """Return whether an adapted layer shares its weight with another layer, as embeddings and head often do.

    Merged into the shared weight, the adapter of one of them would change the other too.
    """
    uses = Counter(parameter.data_ptr() for layer in model.modules() for parameter in layer.parameters(recurse=False))
    adapted = (layer.get_base_layer() for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    return any(uses[parameter.data_ptr()] > 1 for layer in adapted for parameter in layer.parameters(recurse=False))


def excluded_layers(model: Any) -> list[str]:
    """Return linear layers that all-linear leaves out.

    They return more than their product, like Llama 4's router, or a fused kernel bypasses them.
    """
    names = []
    is_mamba = model.config.model_type in MAMBA_TYPES
    for name, layer in model.named_modules():
        fits = is_plain_linear(layer) or is_quantized(layer)
        if (isinstance(layer, nn.Linear) and not fits) or (is_mamba and name.split(".")[-1] in MAMBA_FUSED_LAYERS):
            names.append(name)
    return names


def load_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Add the LoRA adapter in a local folder to its base, to resume training.

    Raises:
        UserError: for an adapter of another type, without weights, or that does not fit the base.
    """
    folder = Path(name)
    check_lfs_pointers(folder)
    peft_type = read_json_object(folder / ADAPTER_CONFIG).get("peft_type")
    if peft_type != "LORA":
        raise UserError(f"--model_name {name}: it holds an adapter of type {peft_type}. Only LoRA adapters can be resumed")
    if not any((folder / f"adapter_model{suffix}").exists() for suffix in (".safetensors", ".bin")):
        raise UserError(f"--model_name {name}: no adapter weights (adapter_model.safetensors). Copy them there")
    weights = load_peft_weights(name, device="cpu")
    resize_for_adapter(model, weights)
    adapted: Any = PeftModel.from_pretrained(model, name, is_trainable=True)
    saved, loaded = (
        {key for key in keys if "lora_" in key}
        for keys in (weights, get_peft_model_state_dict(adapted, save_embedding_layers=False))
    )
    if unmatched := sorted(saved ^ loaded):
        raise UserError(
            f"--model_name {name}: the adapter does not fit its base: {len(unmatched)} weights are missing, or have no layer in "
            f"the base, such as {unmatched[0]}. Give the base that it was trained on"
        )
    return adapted


def resize_for_adapter(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Give the base as many embeddings as an adapter was trained with; peft saves resized ones with the adapter."""
    embeddings: Any = model.get_input_embeddings()
    layers = (embeddings, model.get_output_embeddings())
    names = [name for name, layer in model.named_modules() if any(layer is other for other in layers)]
    ends = tuple(f".{name}.{weight}" for name in names for weight in ("weight", "base_layer.weight"))
    rows = {len(tensor) for key, tensor in weights.items() if key.endswith(ends)}
    if len(rows) == 1 and rows != {len(embeddings.weight)}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def reload_adapter_weights(model: PreTrainedModel, name: str) -> None:
    """Load an adapter's weights again, after `cast_parameters`.

    peft first copies fully trained layers into the base's dtype, which rounds them.
    """
    set_peft_model_state_dict(model, load_peft_weights(name, device="cpu"))
