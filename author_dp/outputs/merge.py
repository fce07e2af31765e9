"""Merge an adapter into its base: one model, with the guarantee of the adapter.

    python -m author_dp.merge FOLDER OUT

FOLDER is the --output_dir of a run with --enable_lora, or a checkpoint in it. OUT is a new folder. Merging reads no data, so the
guarantee stays (post-processing; Dwork and Roth 2014, Proposition 2.1).

Guarantees: the privacy.json in OUT is that of the adapter, for the merged weights. So a training that starts from them, and
whoever publishes them, knows what has been spent.
"""

from pathlib import Path

from peft import PeftModel

from author_dp.errors import UserError
from author_dp.models.training_marks import set_training_mark
from author_dp.models.weights import adapter_base_model, write_hashed_weights
from author_dp.outputs.generate import load_generating_model
from author_dp.outputs.guarantee import format_total_guarantee, why_no_guarantee
from author_dp.outputs.privacy_statement import PUBLIC_KEYS, check_still_covered, read_privacy_statement
from author_dp.outputs.publish import check_publish_target, record_published_place
from author_dp.validation import check_usage


def merge(folder: Path, out: Path) -> str:
    """Write the merged model to `out`; return its guarantee in words.

    Raises:
        UserError: if `folder` holds no adapter of this program, or it cannot be merged.
    """
    check_publish_target(folder, out)
    guarantee = read_privacy_statement(folder)
    if guarantee is None or adapter_base_model(str(folder)) is None:
        raise UserError(
            f"FOLDER {folder}: it holds no adapter with a privacy.json. Give the --output_dir of a run with --enable_lora"
        )
    model, tokenizer = load_generating_model(str(folder), (guarantee.get("adapter_base") or {}).get("revision"))
    if isinstance(model, PeftModel):  # which `load_generating_model` merges where it can
        raise UserError(f"FOLDER {folder}: its adapter changes tied weights, so it cannot be merged. Use it as it is")
    set_training_mark(model)
    report = {name: value for name, value in guarantee.items() if name in PUBLIC_KEYS and name not in ("weights", "adapter_base")}
    out.mkdir(parents=True, exist_ok=True)
    with write_hashed_weights(out, adapter=False, make_report=lambda: report, disable_dp=guarantee["disable_dp"]):
        model.save_pretrained(out)
        if not guarantee["disable_dp"]:
            check_still_covered(folder)
    tokenizer.save_pretrained(out)
    record_published_place(folder, out)
    reason = why_no_guarantee(guarantee)
    return f"no guarantee: {reason}" if reason else format_total_guarantee(guarantee)


def main(arguments: list[str]) -> None:
    check_usage(arguments, "author_dp.merge FOLDER OUT", range(2, 3))
    folder, out = map(Path, arguments)
    print(f"{out}: {merge(folder, out)}")
