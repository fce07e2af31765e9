"""Names of options: those that every run needs, and what people and other trainers call them.

It imports no large library, so that a command line without a required option is refused at once, before seconds of imports.
"""

import ast
import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

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


def find_missing_options(is_given: Callable[[str], bool]) -> str:
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


def exit_if_options_missing(program: str, words: Sequence[str], rank: int) -> None:
    """Exit with status 2 where a command line lacks required options; return if the parser may have more to say.

    Args:
        program: its file name; the file is beside this package.
        words: of the command line. Options may be abbreviated, or stand in the YAML file of --config.
    """
    given = {}  # value by name; "" for one in a file, or alone
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value or ("" if following.startswith("--") else following)
    try:
        text = Path(given.pop("config")).read_text("utf-8") if "config" in given else "{}"
        given |= dict.fromkeys(map(str, dict(yaml.load(text, yaml.BaseLoader))), "")
        error = find_missing_options(lambda option: any(option.startswith(name) for name in given))
        if not error or rank != 0 or {"-h", "--h", "--he", "--hel", "--help"} & set(words):
            return
        known = {"config", *read_option_names(program)}
    except (OSError, ValueError, TypeError, SyntaxError, AttributeError, yaml.YAMLError):
        return
    required = ("target_epsilon", "noise_multiplier", "per_sample_max_grad_norm")
    may_fail = any(value and not is_number(value) for name, value in given.items() if any(r.startswith(name) for r in required))
    is_known = all(any(option.startswith(name) for option in known) for name in given)
    if is_known and not may_fail:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


def read_option_names(program: str) -> set[str]:
    """Return the names of all options, and of more, from the source of their classes: importing them takes seconds."""
    root, spec = Path(__file__).parent, importlib.util.find_spec("transformers")
    library = ["models/lora.py", "guards/canaries.py", "training/loss_release.py"]
    paths = [root.parent / name for name in (program, "data_utils.py", "dp_utils.py")] + [root / name for name in library]
    paths.append(Path(spec.origin).with_name("training_args.py"))  # type: ignore[union-attr, arg-type]
    names = set()
    for source in (path.read_text("utf-8") for path in paths):
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        fields = [node.target for one in classes for node in one.body if isinstance(node, ast.AnnAssign)]
        names |= {field.id for field in fields if isinstance(field, ast.Name)} | set(re.findall(r'alias="(\w+)"', source))
    return names


def suggest_option(unknown: str, options: Sequence[str]) -> str:
    """Return a question that suggests an option in place of an unknown one; empty if none is similar."""
    word = unknown.partition("=")[0].lstrip("-").replace("-", "_")
    similar = [KNOWN_AS[word]] if KNOWN_AS.get(word) in options else difflib.get_close_matches(word, options, 1, 0.75)
    return f" (did you mean --{similar[0]}?)" if similar else ""


def is_number(value: str) -> bool:
    """Return whether a word can be read as a number."""
    try:
        return not math.isnan(float(value))
    except ValueError:
        return False
