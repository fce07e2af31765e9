"""Store the frozen base under LoRA in bfloat16 or 4 bits, and train the adapters in float32.

Guarantees: only the storage of the frozen matrices changes. The model computes the same as a float32 model with the same, rounded
weights: a matrix is upcast to float32 when its layer runs, forward and backward, and released at once. The model check therefore
compares as closely as without quantization. Trainable parameters, clipped sums and noise are float32. There are two exceptions.
Under --bf16, matrix products are in bfloat16, as they are without quantization. Tables that a model computes when it is created,
like Gemma 3's embed_scale, are rounded like the weights.

In 4 bits, a linear layer is bitsandbytes' `Linear4bit`: NF4 with double quantization [1]. Embeddings and the head are bfloat16.
Parameters other than matrices of plain linear layers and embeddings (norms, biases, stacked experts) are float32.

Example:

    >>> model = load_base("llama", dtype=torch.bfloat16, quantization_config=nf4_config(torch.float32))
    >>> model = cast_parameters(add_lora_adapters(model, r=8))

References:
    [1] Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314, section 3
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from author_dp.errors import UserError
from author_dp.models.bfloat16_layers import BF16Conv1D, BF16Embedding, BF16Linear, bf16_class_for

# --- storage ----------------------------------------------------------------------------------------------


def cast_parameters(model: Any, compute_dtype: Optional[torch.dtype] = None) -> Any:
    """Set dtypes after a bfloat16 load, in place, and return the model.

    Trainable parameters become float32: noise would be rounded in less. Frozen matrices stay bfloat16 where every layer that uses
    them has a `bf16_class_for`. The rest becomes float32. Layers stay the same objects, since other code holds them.

    Args:
        compute_dtype: of products in 4-bit layers; by default as loaded, which a folder with 4-bit weights may set.
    """
    uses: dict[Any, list] = defaultdict(list)
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            uses[parameter].append((name, layer))
    for parameter, users in uses.items():
        classes = [bf16_class_for(layer) if name == "weight" else None for name, layer in users]
        if not parameter.is_floating_point():  # 4 bits
            continue
        if parameter.requires_grad or None in classes:
            parameter.data = parameter.data.float()
        elif parameter.dtype != torch.float32:
            for bf16_class, (_, layer) in zip(classes, users):
                layer.__class__ = bf16_class
    for layer in model.modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not is_quantized(layer):
                layer._buffers[name] = buffer.float()
    for layer in quantized_layers(model):
        set_quantized_compute_dtype([layer], compute_dtype or layer.compute_dtype)
    return model


# --- 4 bits ---------------------------------------------------------------------------------------------


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' configuration of NF4.

    Args:
        compute_dtype: of matrix products.
    Raises:
        UserError: where bitsandbytes is missing, or cannot be imported.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--load_in_4bit: bitsandbytes is missing ({error}). pip install 'bitsandbytes>=0.50', or use --base_dtype bfloat16"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype
    )


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer is bitsandbytes' Linear4bit, without importing it."""
    return isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state")


def quantized_layers(model: nn.Module) -> list[Any]:
    """Return the 4-bit layers of a model."""
    return [layer for layer in model.modules() if is_quantized(layer)]


def set_quantized_compute_dtype(layers: Iterable[Any], dtype: torch.dtype) -> None:
    """Let 4-bit layers multiply in `dtype`, forward and backward."""
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        # Otherwise the backward pass would round the weights to their dtype at loading, unlike the forward pass.
        layer.weight.quant_state.dtype = dtype
        # Otherwise an evaluation on a CPU packs the weights for inference, and later gradients do not pass through them.
        layer.support_avx512bf16_for_cpu = False


@contextmanager
def quantized_float32_compute(model: nn.Module) -> Iterator[None]:
    """Inside, 4-bit layers multiply in float32."""
    previous = [(layer, layer.compute_dtype) for layer in quantized_layers(model)]
    set_quantized_compute_dtype((layer for layer, _ in previous), torch.float32)
    try:
        yield
    finally:
        for layer, dtype in previous:
            if dtype is not None:
                set_quantized_compute_dtype([layer], dtype)


def check_quantized_frozen(model: nn.Module, names: Optional[list[str]] = None) -> None:
    """Raise UserError where 4-bit weights, or biases of their layers, would be trained.

    Args:
        names: of --lora_modules_to_save, before peft copies them; None: check which parameters are trainable.
    """
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        parts = name.split(".")
        ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]  # and the layer itself
        # peft matches names by their ends.
        if matches := [other for other in names or [] if any(ancestor.endswith(other) for ancestor in ancestors)]:
            raise UserError(
                f"--lora_modules_to_save {matches[0]}: it would train {name}, which --load_in_4bit keeps in 4 bits. Leave it out "
                "(adapters go there), or use --base_dtype bfloat16"
            )
        if names is None and any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            raise UserError(
                f"--load_in_4bit: {name} is in 4 bits, and its bias would be trained, which bitsandbytes rounds. Train no biases "
                "(see --lora_bias, or the adapter in --model_name), or use --base_dtype bfloat16"
            )


# --- dtypes -----------------------------------------------------------------------------------------------


def computes_in_float32(model: nn.Module) -> bool:
    """Return whether the model is as exact as float32, however its frozen weights are stored.

    4-bit layers are, inside `quantized_float32_compute`.
    """
    return all(
        parameter.dtype == torch.float32 or isinstance(layer, BF16Linear | BF16Conv1D | BF16Embedding) or is_quantized(layer)
        for layer in model.modules()
        for parameter in layer.parameters(recurse=False)
    )


def quant_scales(parameter: Any) -> list[torch.Tensor]:
    """Return the quantization scales of a 4-bit parameter; none for others."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
