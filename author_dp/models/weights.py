"""Bind privacy.json to the weights beside it, by their SHA-256.

Guarantees: a folder holds no privacy.json while weights are written to it, and afterwards one that names the hash of every file
that is weights or says how to load them. `check_weights` accepts these files only. The tokenizer and generation_config.json are
not certified: they hold nothing that was trained.

Example:

    >>> with certified(Path("scratch"), adapter=False, make_report=trainer.privacy_report):
    ...     model.save_pretrained("scratch")
    >>> check_weights(Path("scratch"), json.loads(Path("scratch/privacy.json").read_text()))
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.ledger import REPORT_NAME
from author_dp.errors import UserError
from author_dp.files import fsync_folder, write_json
from author_dp.models.loading import adapter_base_model, public_name

# Whatever a library may load as weights, and what says how: a shard index, the configuration, an adapter's.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
CONFIGS = ("config.json", "adapter_config.json")
TRAINER_FILES = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth")
# What a run saves, by its kind.
MODEL_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json")
ADAPTER_FILES = re.compile(r"adapter_model\.safetensors|adapter_config\.json")
COMPLETE_MARKER = "complete.json"  # of a checkpoint: written last, when all else is on disk
RETRAIN_REMEDY = "Train again in a new folder"
DELETE_REMEDY = f"or delete {REPORT_NAME} to use the model without a guarantee"


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of `folder`; of its subfolders adapters only, which the Trainer loads when it resumes.

    Checkpoints in `folder` are models of their own, but there are none in a checkpoint.
    """
    in_checkpoint = is_checkpoint(folder) or (folder / COMPLETE_MARKER).exists()
    nested = [path for path in folder.glob("*/adapter_*") if in_checkpoint or not is_checkpoint(path.parent)]
    return sorted(path for path in [*folder.glob("*"), *nested] if path.is_file() and is_weight_file(path.name))


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` is named like a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None


def is_weight_file(name: str) -> bool:
    return name in CONFIGS or (name.lower().endswith(SUFFIXES) and not TRAINER_FILES.fullmatch(name))


def weight_name_pattern(adapter: bool) -> re.Pattern[str]:
    """Return the names of the weight files that a run saves.

    Args:
        adapter: whether it trains an adapter.
    """
    return ADAPTER_FILES if adapter else MODEL_FILES


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}). Restore it") from error
    return found.hexdigest()


def hash_weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of `folder`, by its name relative to it."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in weight_files(folder)}


def describe_base(name: Optional[str], revision: Optional[str] = None) -> dict[str, Any]:
    """Return what privacy.json says of an adapter's base: the hashes of a local folder, or the commit of a hub model.

    Args:
        name: None where it is not known.
        revision: the commit, where it is known.
    """
    if name and os.path.isdir(name):
        return {"name": public_name(name), "files": hash_weights(Path(name))}
    return {"name": name or None, "revision": revision}


@contextmanager
def write_certified(
    folder: Path, adapter: bool, make_report: Callable[[], dict[str, Any]], disable_dp: bool = False
) -> Iterator[None]:
    """Within, the caller writes weights to `folder`: remove its privacy.json and older weights before, write a new one after.

    Args:
        adapter: whether the weights are an adapter's.
        make_report: makes the rest of privacy.json.
        disable_dp: whether privacy.json certifies nothing. Then it is there before the weights are, which would otherwise pass
            for those of a base model if the run was killed.
    Raises:
        UserError: where weights of another kind lie there, so that it is not clear which ones are loaded.
    """
    own = weight_name_pattern(adapter)
    if disable_dp:
        write_json(folder / REPORT_NAME, make_report())
    else:
        remove_report(folder)
    for path in weight_files(folder):
        if own.fullmatch(path.name):
            path.unlink()
    yield
    hashes = hash_weights(folder)
    if foreign := [name for name in hashes if not own.fullmatch(Path(name).name)]:
        raise UserError(
            f"--output_dir {folder}: {', '.join(foreign)} lies beside the weights of this run, so nothing is certified. Move it "
            "away, then add --resume_from_checkpoint True"
        )
    write_json(folder / REPORT_NAME, {**make_report(), "weights": hashes})


def has_no_guarantee(folder: Path) -> bool:
    """Return whether the privacy.json of `folder` says that its weights were trained without privacy."""
    path = folder / REPORT_NAME
    return path.exists() and json.loads(path.read_text()).get("disable_dp") is True


def remove_report(folder: Path) -> None:
    """Remove the privacy.json of `folder`, on disk too, before its weights change."""
    if (folder / REPORT_NAME).exists():
        (folder / REPORT_NAME).unlink()
        fsync_folder(folder)


def check_weights(folder: Path, report: dict[str, Any], base: bool = True) -> None:
    """Raise UserError unless the weights in `folder` are exactly those that `report`, its privacy.json, names.

    Args:
        base: whether to check an adapter's local base too. A base from the hub is named by `report` only.
    """
    where, named = folder / REPORT_NAME, report.get("weights")
    if not isinstance(named, dict) or not named:
        raise UserError(
            f"{where}: it names no weights, as an older version wrote it, so it certifies nothing. {RETRAIN_REMEDY}, "
            f"{DELETE_REMEDY}"
        )
    found = {path.relative_to(folder).as_posix() for path in weight_files(folder)}
    if missing := sorted(named.keys() - found):
        raise UserError(f"{folder}: {missing[0]} is missing, which {REPORT_NAME} names. Restore it, {DELETE_REMEDY}")
    if extra := sorted(found - named.keys()):
        raise UserError(
            f"{folder}: {REPORT_NAME} does not certify {', '.join(extra)}, which lies beside the weights. Move it away"
        )
    for name in sorted(named):
        if sha256_of(folder / name) != named[name]:
            raise UserError(
                f"{folder / name}: its SHA-256 is not the one in {REPORT_NAME}: other weights, or another configuration. Restore "
                f"the file, {DELETE_REMEDY}"
            )
    if base and any(Path(name).name in ("adapter_config.json", "adapter_model.safetensors") for name in named):
        check_base(folder, report)


def check_base(folder: Path, report: dict[str, Any]) -> None:
    """Raise UserError unless the base of the adapter in `folder` is the one that `report` names."""
    known = report.get("adapter_base")
    if not isinstance(known, dict):
        raise UserError(
            f"{folder / REPORT_NAME}: it does not name the adapter's base, so it certifies nothing. {RETRAIN_REMEDY}, "
            f"{DELETE_REMEDY}"
        )
    if known["name"] is None:  # made in memory: there is nothing to load it from
        return
    base, files = adapter_base_model(str(folder)), known.get("files")
    if base is None or not os.path.isdir(base):
        if files is not None:
            raise UserError(f"{folder}: the adapter's base {base} is not there. Restore it: {REPORT_NAME} names its weights")
        return
    if files is None:
        raise UserError(
            f"{folder}: the adapter's base is {known['name']} of the hub, but {base} is a local folder. Rename that folder"
        )
    present = hash_weights(Path(base))
    if other := sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name)):
        raise UserError(
            f"{folder}: {Path(base) / other[0]} is not what {REPORT_NAME} names as the adapter's base. "
            f"Restore the base, {DELETE_REMEDY}"
        )


def check_same_base(base: Optional[dict[str, Any]], known: Optional[dict[str, Any]]) -> None:
    """Raise UserError where an adapter is resumed on another base than it was trained on.

    Args:
        base, known: of this run and of the checkpoint, from `describe_base`; None without an adapter.
    """
    for name in ("files",) if "files" in {**(base or {}), **(known or {})} else ("name",):
        if (base or {}).get(name) != (known or {}).get(name):
            raise UserError(
                "--model_name: the base model is not the one that the checkpoint's adapter was trained on (its name or weights "
                "differ). Restore that base, or give its path or hub name"
            )
