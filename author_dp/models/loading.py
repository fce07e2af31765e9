"""Load models and tokenizers as their folders say, or say which file is wrong.

Promise: a model is the one whose weights lie in the folder: none is made up where some are missing, and none is thrown away, as a
LoRA adapter's would be where its base alone is loaded.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from author_dp.errors import UserError, first_line
from author_dp.hub_access import hub_error, hub_is_reachable
from author_dp.models.lora import add_lora_adapters
from author_dp.models.quantization import cast_parameters, nf4_config, quantized_layers, weight_bytes

logger = logging.get_logger(f"transformers.{__name__}")

ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
POINTER = b"version https://git-lfs"


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
    name = to_absolute(name)  # an adapter then finds its base from everywhere
    adapter_base = adapter_base_model(name)
    if adapter_base is not None and lora is None:
        raise UserError(
            f"--model_name {name}: it holds a LoRA adapter. Add --enable_lora to resume it, or merge it into its base"
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
    if base_precision != "float32":
        size = weight_bytes(model) / 2**20
        logger.warning(f"The base is in {base_precision}: all weights, adapters included, take {size:,.1f} MiB.")
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
    """Raise UserError where the tokenizer has more tokens than the model has embeddings."""
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        raise UserError(
            f"--model_name {name}: its tokenizer has {len(tokenizer)} tokens, its model {embeddings.num_embeddings} embeddings. "
            "Resize the embeddings, or give the tokenizer that belongs to the model"
        )


def adapter_base_model(name: str) -> Optional[str]:
    """Return the base model of the LoRA adapter in a local folder, None where it holds none.

    A base named by a relative path is looked for from here, then from the adapter's folder.

    Raises:
        UserError: where the folder holds a full model too, the base is an adapter itself, or is not named.
    """
    path = Path(name) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if full := [entry.name for pattern in FULL_WEIGHTS for entry in sorted(Path(name).glob(pattern))]:
        raise UserError(
            f"--model_name {name}: it holds both an adapter ({ADAPTER_CONFIG}) and a full model ({', '.join(full)}), so it is "
            "not clear which one to load. Move one of them to another folder"
        )
    try:
        base = json.loads(path.read_text())["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model_name {name}: {ADAPTER_CONFIG} does not name its base model: copy the adapter anew") from error
    beside = Path(name) / base
    found = str(beside.resolve()) if not os.path.isdir(base) and beside.is_dir() else to_absolute(base)
    if (Path(found) / ADAPTER_CONFIG).exists():
        raise UserError(f"--model_name {name}: its base {found} holds an adapter itself. Merge that one into its own base first")
    return found


def to_absolute(name: str) -> str:
    """Return the absolute path of a local folder, so that what names it loads from everywhere; a hub name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def public_name(name: str) -> str:
    """Return a hub name as it is, and of a local path the last part alone."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def check_folder(name: str) -> None:
    """Raise UserError for a local folder that holds no model, or files that are not what their names say."""
    folder = Path(name)
    if not folder.is_dir():
        return
    check_lfs_pointers(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"--model_name {name} holds no config.json: give a folder that save_pretrained wrote, or a hub name")
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"--model_name {name}: config.json is not JSON ({error}): copy it anew") from error
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise UserError(f"--model_name {name} holds no weights (model.safetensors): copy them there, or give another folder")


def check_lfs_pointers(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1_000 and path.read_bytes().startswith(POINTER):
            raise UserError(
                f"--model_name {folder}: {path.name} is a git-lfs pointer, not the file: run 'git lfs pull' in its repository"
            )


def load_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Put the LoRA adapter of a local folder on its base, to go on training it.

    Raises:
        UserError: for an adapter of another kind, without its weights, or that does not fit the base.
    """
    folder = Path(name)
    check_lfs_pointers(folder)
    kind = json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_type")
    if kind != "LORA":
        raise UserError(f"--model_name {name} holds an adapter of type {kind}: only LoRA adapters can be gone on with")
    if not any((folder / f"adapter_model{suffix}").exists() for suffix in (".safetensors", ".bin")):
        raise UserError(f"--model_name {name} holds no adapter weights (adapter_model.safetensors): copy them there")
    adapted: Any = PeftModel.from_pretrained(model, name, is_trainable=True)
    given, placed = (
        {key for key in weights if "lora_" in key}
        for weights in (load_peft_weights(name, device="cpu"), get_peft_model_state_dict(adapted, save_embedding_layers=False))
    )
    if odd := sorted(given ^ placed):
        raise UserError(
            f"--model_name {name}: the adapter does not fit its base: {len(odd)} weights have no place there, or are missing, "
            f"first {odd[0]}; give the base that it was made on"
        )
    return adapted


def reload_adapter_weights(model: PreTrainedModel, name: str) -> None:
    """Load an adapter's weights once more: what it trains in full has a place of the base's type at first, which rounds it."""
    set_peft_model_state_dict(model, load_peft_weights(name, device="cpu"))


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or local folder.

    Raises:
        UserError: for a folder without tokenizer files, or with broken ones.
    """
    remedy = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) of its base model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # each tokenizer raises its own
        if not os.path.isdir(name):
            raise
        raise UserError(f"--model_name {name}: its tokenizer cannot be loaded ({first_line(error)}): {remedy}") from error
    if not tokenizer("Some text, 123.", add_special_tokens=False)["input_ids"]:
        raise UserError(f"--model_name {name} holds no tokenizer files: {remedy}")
    return tokenizer


def load_base(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Load a causal language model, in float32 unless it stays frozen: noise would be rounded in less.

    Args:
        options: of from_pretrained.
    Raises:
        UserError: where weights are missing, or do not fit config.json.
    """
    check_folder(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"--model_name {name}: the weights have other sizes than config.json says (vocab_size, for example): copy both from "
            "one place"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"--model_name {name}: its weights lack {len(missing)} of those that config.json asks for, first {missing[0]}: copy "
            "both from one place"
        )
    if surplus := [key for key in sorted(report["unexpected_keys"]) if is_extra_layer_weight(key, model)]:
        raise UserError(
            f"--model_name {name}: its weights hold layers that config.json does not ask for, first {surplus[0]}: copy both from "
            "one place"
        )
    return model


def is_extra_layer_weight(key: str, model: torch.nn.Module) -> bool:
    """Whether a weight without a place belongs to a list of layers that the model has, beyond its end."""
    place = re.match(r"(.+?)\.(\d+)\.", key)
    if place is None:
        return False
    modules = dict(model.named_modules())
    layers = [place[1], f"{getattr(model, 'base_model_prefix', '')}.{place[1]}"]
    return any(name in modules and f"{name}.{place[2]}" not in modules for name in layers)
