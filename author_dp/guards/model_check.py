"""Check the user's own model before anything is trained or written.

Guarantees: a model that passes computes an author's loss from that author's samples only (`sample_independence`), and the
clipping engine's norms and clipped sum on it equal those of a reference loop over authors, to rounding (`clipping_check`).

The checks use random tokens, never the user's texts. They restore the model's modes and buffers and the random generators;
`verify_model` freezes parameters that the loss does not use.

Example:

    >>> check = verify_model(model, "ghost", sequence_len=128)
    >>> check.error
    1.4e-07
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from author_dp.clipping import ClippingEngine
from author_dp.clipping.ghost import GhostClipping
from author_dp.errors import UserError
from author_dp.guards.clipping_check import (
    MAX_SHOWN_NAMES,
    check_engine,
    clipping_remedy,
    freeze_unused,
    make_clipping_check_batch,
)
from author_dp.guards.probing import MIN_LEN, model_errors_as_user_error, perturb_zero_params, resolve_sequence_len
from author_dp.guards.sample_independence import MAX_LEN, check_sample_independence
from author_dp.mechanism.fsdp import find_non_finite_shard
from author_dp.models.modes import deterministic_train_mode
from author_dp.models.quantization import check_quantized_frozen
from author_dp.progress import track_calls
from author_dp.wording import format_names

MODEL_CALLS = 52  # in a check, for its progress; more where an engine clips parameters one author at a time
MICROBATCH_LENS = (9, 7)  # tokens of the longest of seven samples: once more than samples, and once as many


class ModelCheck(NamedTuple):
    """The result of `verify_model`. It depends on the model only, and so is public."""

    error: float  # largest relative difference between the engine and the reference
    fallback_params: set[Any]  # the parameters that the engine clips one author at a time
    unused: list[str]  # names of trainable parameters that the loss does not use; frozen

    def freeze_fallback(self, engine: ClippingEngine) -> None:
        """Pass the fallback parameters to an engine, which then does not look for them again."""
        if isinstance(engine, GhostClipping):
            engine.freeze_fallback(self.fallback_params)

    def max_authors(self, limit: int) -> int:
        """Return how many authors a microbatch should have, at most `limit`.

        Fallback parameters cost no more with one author a microbatch, and a further backward for each author with several.
        """
        return 1 if self.fallback_params else limit

    def summary(self) -> str:
        """Return the result as a line of the log."""
        text = (
            f"Model check passed: samples are independent; clipping matches the reference (max. relative error {self.error:.1e})."
        )
        if self.fallback_params:
            text += f" {len(self.fallback_params)} parameters have no clipping rule: authors are clipped one at a time, which is "
            text += "exact but slower."
        if self.unused:
            names = format_names(self.unused, MAX_SHOWN_NAMES)
            text += f" The loss does not use {len(self.unused)} trainable parameters, which are frozen: {names}."
        return text


def verify_model(
    model: Any,
    clipping: str,
    sequence_len: Optional[int] = None,
    checkpointing: Optional[dict[str, Any]] = None,
    bf16: bool = False,
) -> ModelCheck:
    """Check that samples are independent and that the engine clips correctly; freeze unused parameters.

    Args:
        model: all trainable parameters are compared.
        clipping: the engine's name in ENGINES.
        sequence_len: tokens of the longest sample; default: as in `resolve_sequence_len`.
        checkpointing: --activation_checkpointing_kwargs if the run checkpoints activations. The engine is checked that way.
        bf16: whether the run uses autocast; random operations are then checked under it.
    Raises:
        UserError: naming the property that does not hold, or the parameters that differ.
    """
    max_len = resolve_sequence_len(model, sequence_len)
    cannot_run = f"--clipping {clipping}: the engine fails on this model. {clipping_remedy(clipping, model.parameters())}"
    with track_calls(model, "Check the model", MODEL_CALLS):
        check_sample_independence(model, max_len, bf16)
        with deterministic_train_mode(model), perturb_zero_params(model), model_errors_as_user_error(cannot_run):
            batches = [make_clipping_check_batch(model, length) for length in MICROBATCH_LENS]
            batches.append(make_clipping_check_batch(model, max(MIN_LEN, min(max_len, MAX_LEN)), samples_per_author=(1, 1)))
            unused = freeze_unused(model, batches[0])
            error, fallback_params = check_engine(model, clipping, batches, checkpointing, bf16)
    return ModelCheck(error, fallback_params, unused)


# --- types and values -----------------------------------------------------------------------------------


def check_model(model: nn.Module, call_model: bool = True) -> None:
    """Raise UserError for a model without per-author gradients, or one that would round the noise.

    Args:
        call_model: whether to check that samples are independent, too. DPTrainer does so in `verify_model`.
    """
    check_model_finite(model.named_parameters(), "--model_name: ", "Choose another model, or fix the checkpoint")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError("--model_name: an encoder-decoder model is not supported. Choose a decoder (causal language model)")
    for name, module in model.named_modules():
        if is_compiled_model(module):
            # Checks run it uncompiled, so that random numbers would be others than those that are checked.
            raise UserError(f"--model_name: {name or 'the model'} is compiled. Pass the model as it was before torch.compile")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"--model_name: {name} is a batch norm, which mixes the authors of a batch. Choose another model")
    check_quantized_frozen(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(
                f"--model_name: {name} is {parameter.dtype}, which would round the noise. Load it in float32, and use --bf16"
            )
    if call_model:
        check_sample_independence(model)


def is_compiled_model(module: nn.Module) -> bool:
    """Return whether torch.compile or torch.jit made the module, or its forward."""
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None or isinstance(module, torch.jit.ScriptModule):
        return True
    forward = module.forward  # torch.compiler.disable leaves the same mark as torch.compile, and one of its own
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)


def check_sharded_model(model: nn.Module) -> None:
    """Raise UserError for a model that --fsdp full_shard cannot shard exactly."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()) or getattr(model, "hf_device_map", None):
        raise UserError("--fsdp: all weights must be in float32, and on no device yet. Load the model without quantization")


def check_trained_model_finite(model: nn.Module, step: int) -> None:
    """Raise UserError if training has made a weight infinite or nan by `step`."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    check_model_finite(trained, f"--learning_rate: by step {step}, ", "Lower it, and restart")


def check_model_finite(parameters: Iterable[tuple[str, nn.Parameter]], prefix: str, remedy: str) -> None:
    """Raise UserError if a weight is not finite. Weights are public, so the error discloses nothing about an author."""
    if (name := find_non_finite_shard(parameters)) is not None:
        raise UserError(f"{prefix}{name} holds weights that are not finite. {remedy}")
