"""Load models, tokenizers and LoRA adapters from the hub or local folders, with errors that name the file at fault.

Guarantees: the model has exactly the weights in the folder. Missing weights are not initialized at random, and no weights are
dropped, as a LoRA adapter's would be if only its base were loaded.
"""

import json
import os
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from author_dp.errors import UserError, first_line
from author_dp.files import to_absolute_model_path
from author_dp.hub_access import hub_error, hub_is_reachable
from author_dp.logs import get_logger
from author_dp.models.lora import add_lora_adapters, load_adapter, reload_adapter_weights
from author_dp.models.quantization import cast_parameters, nf4_config, quantized_layers
from author_dp.models.weights import adapter_base_model, check_lfs_pointers, is_extra_layer_weight

logger = get_logger(__name__)


def load_model(
    name: str,
    lora: Optional[dict[str, Any]] = None,
    base_precision: str = "float32",
    device: torch.device | str = "cpu",
    bf16: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, with LoRA adapters if asked for.

    Trainable parameters are float32: noise would be rounded in less. A folder that holds a LoRA adapter resumes that adapter.

    Args:
        name: hub name or local folder.
        lora: arguments of `add_lora_adapters`; None: train all weights.
        base_precision: of the frozen base under LoRA: float32, bfloat16 or nf4 (4 bits).
        device: where 4-bit weights are loaded.
        bf16: whether 4-bit layers multiply in bfloat16.
    Raises:
        UserError: where model or tokenizer cannot be loaded, or they do not fit each other or the options.
    """
    name = to_absolute_model_path(name)  # an adapter then finds its base from everywhere
    adapter_base = adapter_base_model(name)
    if adapter_base is not None and lora is None:
        raise UserError(
            f"--model_name {name}: it holds a LoRA adapter. Add --enable_lora to resume it, or merge it into its base: "
            "python -m author_dp.merge FOLDER OUT"
        )
    base = adapter_base or name
    compute_dtype = torch.bfloat16 if bf16 else torch.float32
    options: dict[str, Any] = {} if base_precision == "float32" else {"dtype": torch.bfloat16}
    if base_precision == "nf4":
        options |= {"quantization_config": nf4_config(compute_dtype), "device_map": {"": device}}
    model, tokenizer = load_pretrained(name, base, options)
    check_vocabulary(model, tokenizer, name)
    if lora is not None and adapter_base is None:
        model = add_lora_adapters(model, **lora)
    if base_precision == "nf4" and not quantized_layers(model):
        raise UserError(f"--load_in_4bit: {base} has no plain linear layer. Use --base_dtype bfloat16")
    if base_precision != "float32" or quantized_layers(model):  # a folder may hold 4-bit layers and a compute dtype of its own
        model = cast_parameters(model, compute_dtype)
        if adapter_base is not None:
            reload_adapter_weights(model, name)
    return model, tokenizer


def load_pretrained(name: str, base: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of `base`, the tokenizer of `name`, and the adapter of `name` where they differ.

    Raises:
        UserError: for any failure to load.
    """
    local_only = not os.path.isdir(base) and not hub_is_reachable()
    try:
        model = load_base(base, local_files_only=local_only, **options)
        tokenizer = load_tokenizer(name, local_files_only=local_only)
        if base != name:
            logger.info(f"Resuming the LoRA adapter in {name} as it was made: --lora_dim and the like have no effect.")
            model = load_adapter(model, name)
        return model, tokenizer
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors, peft and each quantization library raise their own
        if local_only:
            raise hub_error("--model_name", base) from error
        if "Unrecognized configuration class" in str(error):  # T5, or a vision model
            raise UserError(
                f"--model_name {base}: it is no causal language model. Choose a decoder, like GPT-2 or Llama"
            ) from error
        raise UserError(
            f"--model_name {base}: it cannot be loaded ({first_line(error)}). Fix that, or choose another model"
        ) from error


def check_sequence_len(model: PreTrainedModel, sequence_len: int) -> None:
    """Raise UserError where samples may be longer than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or sequence_len
    if sequence_len > positions:
        raise UserError(f"--sequence_len {sequence_len}: it is more than the model's {positions} positions. Lower it")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError where a token has no embedding. Token ids may have gaps: the largest counts, not their number."""
    embeddings: Any = model.get_input_embeddings()
    number, largest = len(embeddings.weight), max(tokenizer.get_vocab().values(), default=0)
    if largest >= number:
        raise UserError(
            f"--model_name {name}: its tokenizer has token ids up to {largest}, its model {number} embeddings. "
            "Resize the embeddings, or give the tokenizer that belongs to the model"
        )


def check_model_folder(name: str) -> None:
    """Raise UserError for a local folder without a model, or with unusable files."""
    folder = Path(name)
    if not folder.is_dir():
        return
    check_lfs_pointers(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"--model_name {name}: no config.json. Give a folder that save_pretrained wrote, or a hub name")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--model_name {name}: config.json is not JSON ({error}). Copy it again") from error
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise UserError(f"--model_name {name}: no weights (model.safetensors). Copy them there, or give another folder")


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or local folder.

    Raises:
        UserError: for a folder without tokenizer files, or with broken ones.
    """
    fix = "Copy tokenizer.json and tokenizer_config.json of its base model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # each tokenizer raises its own
        if not os.path.isdir(name):
            raise
        raise UserError(f"--model_name {name}: its tokenizer cannot be loaded ({first_line(error)}). {fix}") from error
    if not tokenizer("Some text, 123.", add_special_tokens=False)["input_ids"]:
        raise UserError(f"--model_name {name}: no tokenizer files. {fix}")
    return tokenizer


def load_base(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        dtype: float32 unless the model stays frozen, as noise would be rounded in less.
        options: of from_pretrained.
    Raises:
        UserError: where weights are missing, or do not fit config.json.
    """
    check_model_folder(name)
    fix = "Copy both from one place"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"--model_name {name}: weights and config.json have different sizes (vocab_size, for example). {fix}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"--model_name {name}: the weights lack {len(missing)} tensors that config.json asks for, such as {missing[0]}. {fix}"
        )
    if extra := [key for key in sorted(report["unexpected_keys"]) if is_extra_layer_weight(key, model)]:
        raise UserError(
            f"--model_name {name}: the weights have layers that config.json does not ask for, such as {extra[0]}. {fix}"
        )
    return model
