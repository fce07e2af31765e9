"""Bind privacy.json to the weights in its folder, by their SHA-256.

Guarantees: while weights are written to a folder, it holds no privacy.json. Afterwards its privacy.json names the hash of every
file with weights, and of every file that says how to load them. `check_weights` accepts only these files. The tokenizer and
generation_config.json are not certified: they hold nothing that was trained.

Example:

    >>> with write_hashed_weights(Path("scratch"), adapter=False, make_report=trainer.privacy_report):
    ...     model.save_pretrained("scratch")
    >>> check_weights(Path("scratch"), json.loads(Path("scratch/privacy.json").read_text(encoding="utf-8")))
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch

from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME
from author_dp.accounting.output_dir import certified_folders, has_checkpoint_name
from author_dp.accounting.voiding import CARD, PAGES, remove_pages
from author_dp.errors import UserError
from author_dp.files import fsync_folder, read_json_object, sha256_of, to_absolute_model_path, write_json

# Files that a library may load as weights, and files that say how: shard index, configuration, adapter configuration.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
CONFIGS = ("config.json", "adapter_config.json")
TRAINER_FILES = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth")
# Files that a run saves: a full model, or an adapter.
MODEL_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json")
ADAPTER_FILES = re.compile(r"adapter_model\.safetensors|adapter_config\.json")
COMPLETE_MARKER = "complete.json"  # written last to a checkpoint, when all other files are on disk
RETRAIN_REMEDY = "Train again in a new folder"
DELETE_REMEDY = f"or delete {REPORT_NAME} to use the model without a guarantee"
ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
LFS_POINTER = b"version https://git-lfs"  # the first bytes of the file that stands in for one in git-lfs


def read_weights_marker(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: its files, their hashes, its place in the order of saving, and its options."""
    return json.loads((checkpoint / COMPLETE_MARKER).read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, and the adapters in its subfolders.

    The Trainer loads such adapters when it resumes. Checkpoints in the folder are separate models. A checkpoint contains no
    checkpoints, so all its subfolders count.
    """
    in_checkpoint = has_checkpoint_name(folder) or (folder / COMPLETE_MARKER).exists()
    nested = [path for path in folder.glob("*/adapter_*") if in_checkpoint or not has_checkpoint_name(path.parent)]
    return sorted(path for path in [*folder.glob("*"), *nested] if path.is_file() and is_weight_file(path.name))


def is_weight_file(name: str) -> bool:
    """Return whether a file, by its name, holds weights or says how to load them."""
    return name in CONFIGS or (name.lower().endswith(SUFFIXES) and not TRAINER_FILES.fullmatch(name))


def weight_name_pattern(adapter: bool) -> re.Pattern[str]:
    """Return a pattern for the names of the weight files that a run saves.

    Args:
        adapter: whether the run trains an adapter.
    """
    return ADAPTER_FILES if adapter else MODEL_FILES


def hash_weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file in a folder, by relative name."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in weight_files(folder)}


def describe_base_weights(name: Optional[str], revision: Optional[str] = None) -> dict[str, Any]:
    """Identify an adapter's base for privacy.json, by hashes (local folder) or commit (hub).

    Args:
        name: None if unknown.
        revision: the commit, if known.
    """
    if name and os.path.isdir(name):
        return {"name": public_model_name(name), "files": hash_weights(Path(name))}
    return {"name": name or None, "revision": revision}


@contextmanager
def write_hashed_weights(
    folder: Path, adapter: bool, make_report: Callable[[], dict[str, Any]], disable_dp: bool = False
) -> Iterator[None]:
    """Certify the weights that the caller writes to `folder` inside.

    Before, remove the folder's privacy.json with its pages, and older weights. After, write a new privacy.json with the hashes.

    Args:
        adapter: whether the weights are an adapter's.
        make_report: returns the rest of privacy.json.
        disable_dp: whether privacy.json certifies nothing. Then it is written before the weights: if the run was killed in
            between, they would otherwise pass for weights of a base model. So is one without a guarantee, where no ledger is.
    Raises:
        UserError: where the folder has weights of the other type, so that it is not clear which ones are loaded.
    """
    pattern = weight_name_pattern(adapter)
    if disable_dp:
        write_json(folder / REPORT_NAME, make_report())
    elif (folder / LEDGER_NAME).exists() or (folder.parent / LEDGER_NAME).exists():
        remove_weights_report(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT_NAME, {"disable_dp": False, "epsilon": None, "delta": None, "interrupted": True})
    pages = (CARD, *PAGES) if (folder / LEDGER_NAME).exists() else (CARD,)
    remove_pages([folder / name for name in pages])
    for path in weight_files(folder):
        if pattern.fullmatch(path.name):
            path.unlink()
    yield
    hashes = hash_weights(folder)
    if foreign := [name for name in hashes if not pattern.fullmatch(Path(name).name)]:
        raise UserError(
            f"--output_dir {folder}: it holds {', '.join(foreign)} besides the weights of this run, so nothing is certified. "
            "Move that away, then add --resume_from_checkpoint True"
        )
    write_json(folder / REPORT_NAME, {**make_report(), "weights": hashes})
    certified_folders.add(folder.resolve())


def weights_have_no_guarantee(folder: Path) -> bool:
    """Return whether a folder's privacy.json says that its weights were trained without privacy."""
    path = folder / REPORT_NAME
    return path.exists() and read_json_object(path).get("disable_dp") is True


def remove_weights_report(folder: Path) -> None:
    """Remove a folder's privacy.json, durably, before its weights change."""
    if (folder / REPORT_NAME).exists():
        (folder / REPORT_NAME).unlink()
        fsync_folder(folder)


def check_weights(folder: Path, report: dict[str, Any], base: bool = True) -> None:
    """Raise UserError unless the weights in a folder are exactly those that its privacy.json names.

    Args:
        report: content of the privacy.json.
        base: whether to check an adapter's local base too. A base from the hub is only named in `report`.
    """
    named = report.get("weights")
    if not isinstance(named, dict) or not named:
        raise UserError(
            f"{folder / REPORT_NAME}: it names no weights (an older version wrote it), so it certifies nothing. "
            f"{RETRAIN_REMEDY}, {DELETE_REMEDY}"
        )
    found = {path.relative_to(folder).as_posix() for path in weight_files(folder)}
    if missing := sorted(named.keys() - found):
        raise UserError(f"{folder}: {missing[0]} is missing, which {REPORT_NAME} names. Restore it, {DELETE_REMEDY}")
    if extra := sorted(found - named.keys()):
        raise UserError(f"{folder}: {REPORT_NAME} does not certify {', '.join(extra)}, which is in the same folder. Move it away")
    for name in sorted(named):
        if sha256_of(folder / name) != named[name]:
            raise UserError(
                f"{folder / name}: its SHA-256 is not the one in {REPORT_NAME}: weights or configuration have changed. Restore "
                f"the file, {DELETE_REMEDY}"
            )
    if base and any(Path(name).name in ("adapter_config.json", "adapter_model.safetensors") for name in named):
        check_base_weights(folder, report)


def check_base_weights(folder: Path, report: dict[str, Any]) -> None:
    """Raise UserError unless an adapter's base is the one that its privacy.json, `report`, names."""
    known = report.get("adapter_base")
    if not isinstance(known, dict):
        raise UserError(
            f"{folder / REPORT_NAME}: it does not name the adapter's base, so it certifies nothing. {RETRAIN_REMEDY}, "
            f"{DELETE_REMEDY}"
        )
    if known["name"] is None:  # created in memory: nothing to load it from
        return
    base, files = adapter_base_model(str(folder)), known.get("files")
    if base is None or not os.path.isdir(base):
        if files is not None:
            raise UserError(f"{folder}: the adapter's base {base} is missing, whose weights {REPORT_NAME} names. Restore it")
        return
    if files is None:
        raise UserError(
            f"{folder}: the adapter's base is {known['name']} on the hub, but {base} is a local folder. Rename that folder"
        )
    present = hash_weights(Path(base))
    if changed := sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name)):
        raise UserError(
            f"{folder}: {Path(base) / changed[0]} is not what {REPORT_NAME} names as the adapter's base. "
            f"Restore the base, {DELETE_REMEDY}"
        )


def check_same_base_weights(base: Optional[dict[str, Any]], known: Optional[dict[str, Any]]) -> None:
    """Raise UserError where an adapter would be resumed on another base than it was trained on.

    Args:
        base, known: bases of this run and of the checkpoint, from `describe_base_weights`; None without an adapter.
    """
    for name in ("files",) if "files" in {**(base or {}), **(known or {})} else ("name",):
        if (base or {}).get(name) != (known or {}).get(name):
            raise UserError(
                "--model_name: the base model is not the one that the checkpoint's adapter was trained on (its name or weights "
                "differ). Restore that base, or give its path or hub name"
            )


def check_lfs_pointers(folder: Path) -> None:
    """Raise UserError where a file is only git-lfs' pointer to it."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1_000 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(
                f"--model_name {folder}: {path.name} is a git-lfs pointer, not the file. Run 'git lfs pull' in its repository"
            )


def is_extra_layer_weight(key: str, model: torch.nn.Module) -> bool:
    """Return whether an unexpected weight belongs to a list of layers in the model, beyond its end."""
    match = re.match(r"(.+?)\.(\d+)\.", key)
    if match is None:
        return False
    modules = dict(model.named_modules())
    layers = [match[1], f"{getattr(model, 'base_model_prefix', '')}.{match[1]}"]
    return any(name in modules and f"{name}.{match[2]}" not in modules for name in layers)


def public_model_name(name: str) -> str:
    """Return the last component of a local path, without private folder names; a hub name unchanged."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def adapter_base_model(name: str) -> Optional[str]:
    """Return the base model of the LoRA adapter in a local folder; None where it holds none.

    A base with a relative path is looked up from the working directory, then from the adapter's folder.

    Raises:
        UserError: where the folder holds a full model too, the base is an adapter itself, or no base is named.
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
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model_name {name}: {ADAPTER_CONFIG} does not name its base model. Copy the adapter again") from error
    sibling = Path(name) / base
    resolved = str(sibling.resolve()) if not os.path.isdir(base) and sibling.is_dir() else to_absolute_model_path(base)
    if (Path(resolved) / ADAPTER_CONFIG).exists():
        raise UserError(f"--model_name {name}: its base {resolved} holds an adapter itself. Merge that one into its base first")
    return resolved
