"""Frozen base weights in fewer bits, bfloat16 or 4, under LoRA adapters in float32.

Promise: only how the frozen matrices are stored changes. The model computes what a float32 model with the same, rounded weights
does: a matrix is made float32 when its layer runs, forward and backward, and let go at once. (Under --bf16, products of matrices
are in bfloat16, as they are there anyway; tables that a model computes when it is made, like Gemma 3's embed_scale, are rounded
as the weights are.) So the proof at the start compares as closely as ever; what is trained, its clipped sums and its noise are
float32.

In 4 bits a linear layer is bitsandbytes' `Linear4bit`, NF4 with its scales quantized once more [1]. Embeddings and the head stay
in bfloat16 there. Whatever is no matrix of a plain linear layer or embedding (norms, biases, stacks of experts) is in float32.

Example:

    >>> model = load_base("llama", dtype=torch.bfloat16, quantization_config=four_bits(torch.float32))
    >>> model = settle(add_lora(model, r=8))

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
from transformers.pytorch_utils import Conv1D

from author_dp.errors import UserError

# --- layers whose matrix is in bfloat16 -------------------------------------------------------------------


class UpcastMatmul(torch.autograd.Function):
    """x W^T for a frozen W that is made of x's type here and again in the backward pass; in between it is kept as it is."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)  # (outputs, inputs)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def upcast_linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    product: torch.Tensor = UpcastMatmul.apply(x, weight)
    return product if bias is None else product + bias


class BF16Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return upcast_linear(x, self.weight, self.bias)


class BF16Conv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return upcast_linear(x, self.weight.T, self.bias)


class BF16Embedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x W^T + b and nothing else, its matrix in float32: a subclass may compute anything."""
    return type(layer).forward is nn.Linear.forward or type(layer).__name__ == "FalconLinear"


def bf16_class_for(layer: nn.Module) -> Optional[type]:
    """Return the class of a layer whose matrix may be in bfloat16; None where the layer may compute anything else."""
    if is_plain_linear(layer):
        return BF16Linear
    if type(layer) is Conv1D:
        return BF16Conv1D
    return BF16Embedding if type(layer) is nn.Embedding else None


def cast_parameters(model: Any, compute: Optional[torch.dtype] = None) -> Any:
    """Give each parameter of a model that was loaded in bfloat16 its type, and return the model.

    What is trained becomes float32, as noise would be rounded in less; frozen matrices stay as they are where all layers that use
    them are `in_16_bits`; all else becomes float32. The layers stay the objects that they are: others hold them.

    Args:
        compute: in which layers in 4 bits multiply; by default as they were loaded, which a folder of 4 bits may decide.
    """
    uses: dict[Any, list] = defaultdict(list)
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            uses[parameter].append((name, layer))
    for parameter, places in uses.items():
        kinds = [bf16_class_for(layer) if name == "weight" else None for name, layer in places]
        if not parameter.is_floating_point():  # in 4 bits
            continue
        if parameter.requires_grad or None in kinds:
            parameter.data = parameter.data.float()
        elif parameter.dtype != torch.float32:
            for kind, (_, layer) in zip(kinds, places):
                layer.__class__ = kind
    for layer in model.modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not is_quantized(layer):
                layer._buffers[name] = buffer.float()
    for layer in quantized_layers(model):
        set_compute_dtype([layer], compute or layer.compute_dtype)
    return model


# --- 4 bits -----------------------------------------------------------------------------------------------


def nf4_config(compute: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' configuration of NF4; `compute` is the type of products of matrices.

    Raises:
        UserError: where bitsandbytes is missing, or does not load.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--load_in_4bit needs bitsandbytes ({error}): pip install 'bitsandbytes>=0.50', or use --base_dtype bfloat16"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear4bit, without importing it."""
    return isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state")


def quantized_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if is_quantized(layer)]


def set_compute_dtype(layers: Iterable[Any], dtype: torch.dtype) -> None:
    """Let layers in 4 bits multiply in `dtype`, forward and backward alike."""
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        # Or the backward pass would round the weights to the type that they were loaded in, which the forward pass does not.
        layer.weight.quant_state.dtype = dtype
        # An evaluation on a CPU would pack the weights for inference, through which no gradient goes back afterwards.
        layer.support_avx512bf16_for_cpu = False


@contextmanager
def float32_compute(model: nn.Module) -> Iterator[None]:
    """With layers in 4 bits that multiply in float32."""
    before = [(layer, layer.compute_dtype) for layer in quantized_layers(model)]
    set_compute_dtype((layer for layer, _ in before), torch.float32)
    try:
        yield
    finally:
        for layer, dtype in before:
            if dtype is not None:
                set_compute_dtype([layer], dtype)


def check_quantized_frozen(model: nn.Module, names: Optional[list[str]] = None) -> None:
    """Raise UserError where what is in 4 bits would be trained.

    Args:
        names: of --lora_modules_to_save, before peft copies them; None: look at what is trained.
    """
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        parts = name.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]  # the layer, and what holds it
        # As peft matches names: by their ends.
        if found := [other for other in names or [] if any(whole.endswith(other) for whole in around)]:
            raise UserError(
                f"--lora_modules_to_save {found[0]} would train {name}, which --load_in_4bit keeps in 4 bits: leave "
                "it out (adapters go there), or use --base_dtype bfloat16"
            )
        if names is None and any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            raise UserError(
                f"--load_in_4bit: {name} is in 4 bits, and its bias would be trained, which bitsandbytes rounds: train no biases "
                "(--lora_bias, or those of the adapter in --model_name), or use --base_dtype bfloat16"
            )


# --- what others ask ------------------------------------------------------------------------------------


def computes_in_float32(model: nn.Module) -> bool:
    """Whether the model is as exact as float32, however its frozen weights are stored (in 4 bits: within `in_float32`)."""
    return all(
        parameter.dtype == torch.float32 or isinstance(layer, BF16Linear | BF16Conv1D | BF16Embedding) or is_quantized(layer)
        for layer in model.modules()
        for parameter in layer.parameters(recurse=False)
    )


def num_elements(parameter: Any) -> int:
    """Return how many numbers a parameter stands for: in 4 bits two lie in each of its bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def model_sizes(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters."""
    sizes = [(num_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of all weights, scales included."""
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in (p, *quant_scales(p)))


def quant_scales(parameter: Any) -> list[torch.Tensor]:
    """Return what a parameter in 4 bits is scaled by; empty for another one."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
