"""Names of options: those that every run needs, and what people and other trainers call them.

This module imports no library, so that a command line without a required option is refused at once, before seconds of imports.
"""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# What other trainers call options, or people guess: the option that is meant.
KNOWN_AS = {
    "epsilon": "target_epsilon", "eps": "target_epsilon", "delta": "target_delta", "sigma": "noise_multiplier",
    "clip_norm": "per_sample_max_grad_norm", "max_norm": "per_sample_max_grad_norm", "clip": "per_sample_max_grad_norm",
    "max_per_sample_grad_norm": "per_sample_max_grad_norm", "l2_norm_clip": "per_sample_max_grad_norm",
    "model": "model_name", "model_name_or_path": "model_name", "dataset": "dataset_name", "data": "train_file",
    "user_column": "author_column", "dataset_text_field": "text_column", "max_seq_length": "sequence_len",
    "block_size": "sequence_len", "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs", "steps": "max_steps", "lr": "learning_rate", "lora": "enable_lora",
    "use_lora": "enable_lora", "use_peft": "enable_lora", "lora_rank": "lora_dim", "use_dora": "lora_use_dora",
    "use_rslora": "lora_use_rslora", "output": "output_dir", "resume": "resume_from_checkpoint", "load_in_8bit": "load_in_4bit",
}  # fmt: skip


def find_missing(is_given: Callable[[str], bool]) -> str:
    """Return the error that names all required options that are missing; empty if there are none.

    Args:
        is_given: says whether an option, by its name, is given.
    """
    if is_given("disable_dp"):
        return ""
    missing = {}
    if not is_given("target_epsilon") and not is_given("noise_multiplier"):
        missing["--target_epsilon"] = "8, or --noise_multiplier"
    if not is_given("per_sample_max_grad_norm"):
        missing["--per_sample_max_grad_norm"] = "1.0, the clip norm of an author's gradient"
    if not missing:
        return ""
    remedies = [f"{option} (such as {remedy})" for option, remedy in missing.items()]
    return f"{', '.join(missing)}: missing. Give {' and '.join(remedies)}; or --disable_dp for no privacy"


def exit_if_missing(program: str, words: Sequence[str], rank: int) -> None:
    """Exit with status 2 where a command line lacks required options; return where that is not certain.

    Args:
        words: of the command line. Options may be abbreviated, or stand in the YAML file of --config.
    """
    names = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    files = [value for name, value in zip(words, words[1:]) if name == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    try:
        names += [name for file in files for name in re.findall(r"(\w+)[\"']?\s*:", Path(file).read_text("utf-8"))]
    except (OSError, ValueError):
        return  # the parser says what is wrong with the file
    error = find_missing(lambda option: any(option.startswith(name) for name in names))
    if not error or rank > 0 or "-h" in words or any("help".startswith(name) for name in names):
        return
    required = error.partition(":")[0].replace("--", "").split(", ")
    if any(name in KNOWN_AS or difflib.get_close_matches(name, required) for name in names):
        return  # an unknown option, for which the parser suggests another
    print(f"{program}: error: {error}", file=sys.stderr)
    sys.exit(2)
