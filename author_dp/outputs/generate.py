"""Write synthetic text with a trained model; its guarantee travels with the file.

    python -m author_dp.generate FOLDER --number 1000 --out synthetic.jsonl

Promise: the file, and the sidecar beside it (sidecar.py), appear together and whole, or not at all. An interrupted run goes on by
the same command, on a machine of the same kind to the same rows, wherever it was cut: each batch is drawn from a seed of its own,
and a batch that was not finished is written anew. What no guarantee covers is for its owner's eyes only (mode 0600).

What a model writes is post-processing: it spends nothing, and --seed has nothing to protect.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from author_dp.errors import UserError
from author_dp.hub_access import hub_error, hub_is_reachable
from author_dp.models.loading import adapter_base_model, first_line, load_adapter, load_base, load_tokenizer
from author_dp.outputs import privacy_statement as sidecar
from author_dp.outputs import synthetic_report
from author_dp.outputs.partial_file import PartialFile
from author_dp.outputs.prompts import Prompt, Source, make_prompts, template_fields

logger = logging.get_logger(f"transformers.{__name__}")

TOKENS = 128  # of a text at most, where the model does not say with how many it was trained
# Options of transformers that would make another number of texts than one a prompt, or have an option here.
RESERVED_OPTIONS = (
    "num_return_sequences", "return_dict_in_generate", "do_sample", "max_length", "eos_token_id", "pad_token_id", "bos_token_id",
    "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens",
)  # fmt: skip


# --- options ----------------------------------------------------------------------------------------------


def make_parser() -> synthetic_report.Parser:
    parser = synthetic_report.Parser("python -m author_dp.generate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the --output_dir of a run, or a checkpoint in it")
    add("--out", type=Path, default=Path("synthetic.jsonl"), help="the file to write; default: %(default)s")
    add("--number", type=int, help="texts to write; default: one for each row of --prompts, 1,000 without")
    add("--seed", type=int, default=0, help="other texts for another number; default: %(default)s")
    add("--batch_size", type=int, default=64, help="texts at a time; default: %(default)s")
    add("--text_column", default="content", help="column of the text in the file that is written; default: %(default)s")
    add("--use_cpu", action="store_true", help="also where there is a GPU")
    add("--bf16", action="store_true", help="compute in bfloat16")
    prompts = parser.add_argument_group("prompts; without one of these a text begins as in training")
    add = prompts.add_argument
    add("--prompts", metavar="FILE", help=".jsonl, .json, .csv or .parquet; goes round where --number is more than its rows")
    add("--public_prompts", action="store_true", help="declare that prompts and fields are public, or made up")
    add("--private_prompts", action="store_true", help="declare that some are taken from private data: no guarantee then")
    add("--prompt_column", default="prompt", help="column of texts, or of lists of messages; default: %(default)s")
    add("--messages_column", help="column of conversations, whose last answer is to be written; instead of --prompt_column")
    add("--prompt_template", help="a text, with {column}s of --prompts: 'about {topic}:'; instead of --prompt_column")
    add("--keep_columns", nargs="+", default=[], help="columns of --prompts that go to the output; those of the template do so")
    add("--chat", action="store_true", help="a prompt is what the user says, for the model's chat template to write")
    add("--with_prompt", action="store_true", help="the prompt is the beginning of the text, not a column beside it")
    sampling = parser.add_argument_group("sampling, as transformers' GenerationConfig has it")
    add = sampling.add_argument
    add("--max_new_tokens", type=int, help=f"default: --sequence_len of the training, {TOKENS} where that is not known")
    add("--temperature", type=float, default=1.0, help="0: the likeliest token always; default: %(default)s")
    add("--top_p", type=float, default=1.0, help="default: %(default)s")
    add("--top_k", type=int, default=0, help="0: all tokens; default: %(default)s")
    add("--repetition_penalty", type=float, default=1.0, help="default: %(default)s")
    add("--generation_options", nargs="+", default=[], metavar="NAME=VALUE", help="others: no_repeat_ngram_size=3 min_p=0.05")
    report = parser.add_argument_group("report on the text (private), as python -m author_dp.synthetic_report writes it")
    report.add_argument("--report", nargs="+", metavar="FILE", help="the --train_file of the training")
    synthetic_report.add_options(report)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other."""
    if not Path(args.folder).is_dir():
        raise UserError(f"FOLDER {args.folder} is no folder: give the --output_dir of a run")
    for name, least in (("number", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    ranges = {
        "temperature": ("0 or above", 0 <= args.temperature < math.inf), "top_k": ("0 or above", args.top_k >= 0),
        "top_p": ("above 0 and at most 1", 0 < args.top_p <= 1),
        "repetition_penalty": ("above 0", 0 < args.repetition_penalty < math.inf),
    }  # fmt: skip
    for name, (words, fits) in ranges.items():
        if not fits:
            raise UserError(f"--{name} {getattr(args, name)} must be {words}")
    for name in args.report or []:
        if not Path(name).is_file():
            raise UserError(f"--report {name}: there is no such file")
    if args.public_prompts and args.private_prompts:
        raise UserError("--public_prompts and --private_prompts exclude each other: if any prompt is private, give the latter")
    if args.prompts and not (args.public_prompts or args.private_prompts):
        raise UserError(
            "--prompts FILE: say where prompts and fields come from, by --public_prompts (published, or made up without a look "
            "at private data) or --private_prompts (there is no guarantee for the text then)"
        )
    if not args.prompts and args.prompt_template is None:
        for name in ("public_prompts", "private_prompts", "messages_column", "keep_columns", "chat", "with_prompt"):
            if getattr(args, name):
                raise UserError(
                    f"--{name} has no effect without a prompt: give --prompts FILE or --prompt_template, or leave it out"
                )
    if args.prompt_template is not None and args.messages_column is not None:
        raise UserError("--prompt_template and --messages_column exclude each other: give one of them")
    if args.with_prompt and (args.chat or args.messages_column):
        raise UserError("--with_prompt has no effect on conversations, which are written whole: leave it out")
    if args.text_column in ("prompt", "messages", *args.keep_columns, *template_fields(args.prompt_template or "")):
        raise UserError(f"--text_column {args.text_column!r} is the name of another column of the output: choose another")


def prompt_source(args: argparse.Namespace) -> str:
    """Return where prompts come from, by the user's word."""
    if args.private_prompts:
        return sidecar.PRIVATE
    if args.prompts:
        return sidecar.PUBLIC
    return sidecar.NO_PROMPTS if args.prompt_template is None else sidecar.FIXED


def sampling(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Return the options of transformers' GenerationConfig.

    Args:
        tokens: of a text, at most.
    """
    more: dict[str, Any] = {}
    for option in args.generation_options:
        name, sign, value = option.partition("=")
        if not sign or name in RESERVED_OPTIONS or not hasattr(GenerationConfig(), name):
            own = f"; {name} is not to be set here" if name in RESERVED_OPTIONS else ""
            raise UserError(f"--generation_options {option}: it must be NAME=VALUE, of an option of GenerationConfig{own}")
        try:
            more[name] = json.loads(value)
        except ValueError:
            more[name] = value
    options: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": tokens}
    if options["do_sample"]:
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return {**options, "repetition_penalty": args.repetition_penalty, **more}


# --- the model --------------------------------------------------------------------------------------------


def load(folder: str, revision: Optional[str] = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model of a folder, a LoRA adapter merged into its base, and the tokenizer.

    Args:
        revision: the commit of a base from the hub; default: the newest.
    Raises:
        UserError: with what is wrong with the folder.
    """
    local_only, base = False, None
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        base = adapter_base_model(folder)
        local_only = base is not None and not os.path.isdir(base) and not hub_is_reachable()
        model: Any = load_base(base or folder, local_files_only=local_only, **options)
        if base is not None:
            adapted: Any = load_adapter(model, folder)
            model = adapted.merge_and_unload()
        model.eval()
        return model, load_tokenizer(folder)
    except UserError as error:
        raise UserError(str(error).replace("--model_name", "FOLDER")) from error
    except Exception as error:  # transformers, safetensors and peft raise their own
        if local_only:
            raise hub_error("FOLDER: the base model", str(base)) from error
        raise UserError(f"FOLDER {folder} cannot be loaded: {first_line(error)}") from error


def fingerprint(folder: str) -> str:
    """Return one SHA-256 of all that makes the model write as it does: weights, configuration, tokenizer, an adapter's base."""
    whole, base = hashlib.sha256(), adapter_base_model(folder)
    if base is not None and os.path.isdir(base):
        whole.update(fingerprint(base).encode())
    for path in sorted(Path(folder).iterdir()):
        made_here = path.name.startswith(
            ("privacy", "training_args", "trainer_state", "optimizer", "scheduler", "rng_state", "_")
        )
        if path.is_file() and path.suffix in (".safetensors", ".json", ".model", ".jinja", ".txt", ".bin") and not made_here:
            whole.update(os.fsencode(path.name) + f":{sidecar.sha256_of(path)}\n".encode())  # not all names are UTF-8
    return whole.hexdigest()


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's own generation_config.json."""
    given: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    tokens = [tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
    return sorted({int(token) for token in tokens if token is not None})


def token_budget(
    model: PreTrainedModel, prompts: list[Prompt], wanted: Optional[int], trained: Optional[int], has_file: bool
) -> int:
    """Return how many tokens a text may have; what is not asked for is cut at the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    number, longest = max(enumerate((len(prompt.ids) for prompt in prompts), 1), key=lambda pair: pair[1])
    tokens = wanted or min(trained or TOKENS, positions - longest)
    if longest + tokens > positions or tokens < 1:
        place = f"--prompts, row {number}" if has_file else "the prompt"
        remedy = f"lower --max_new_tokens {wanted}, or shorten it" if wanted else "shorten it"
        raise UserError(f"{place} has {longest} tokens, the model {positions} positions: {remedy}")
    return tokens


# --- writing ----------------------------------------------------------------------------------------------


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of a batch: of its number alone, not of what was drawn before."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "big") >> 1


def write_batch(model: Any, ids: Sequence[list[int]], options: GenerationConfig, seed: int) -> tuple[list[list[int]], list[bool]]:
    """Return for each prompt the tokens that follow it, up to the one that ends the text, and whether there was one."""
    longest, pad = max(map(len, ids)), options.pad_token_id
    rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)  # (texts, tokens), padded left
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        written: Any = model.generate(input_ids=rows, attention_mask=mask, generation_config=options)
    texts, ended = [], []
    for row in written[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in options.eos_token_id), None)
        texts.append(row[:end])
        ended.append(end is not None)
    return texts, ended


def to_row(prompt: Prompt, text: str, column: str, with_prompt: bool) -> dict[str, Any]:
    """Return a row of the file: TRL's columns, as training reads them."""
    if "messages" in prompt.row:
        return {**prompt.row, "messages": [*prompt.row["messages"], {"role": "assistant", "content": text.strip()}]}
    if not with_prompt:
        return {**prompt.row, column: text}
    return {name: value for name, value in prompt.row.items() if name != "prompt"} | {column: prompt.row["prompt"] + text}


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file and its sidecar; return the sidecar."""
    check(args)
    guarantee, kind = sidecar.read_guarantee(Path(args.folder)), prompt_source(args)
    said = sidecar.make_statement(guarantee, kind)
    notes = (guarantee or {}).get("data") or {}
    model, tokenizer = load(args.folder, (guarantee or {}).get("adapter_base", {}).get("revision"))
    prompts = make_prompts(
        tokenizer,
        notes.get("start_token"),
        Source(args.prompts, args.prompt_column, args.messages_column, args.prompt_template, tuple(args.keep_columns), args.chat),
    )
    number = args.number or (len(prompts) if args.prompts else 1_000)
    options = sampling(args, token_budget(model, prompts, args.max_new_tokens, notes.get("sequence_len"), bool(args.prompts)))
    settings = {
        "model": fingerprint(args.folder), "number": number, "seed": args.seed, "batch_size": args.batch_size,
        "sampling": options, "text_column": args.text_column, "with_prompt": args.with_prompt, "bf16": args.bf16,
        "prompts": kind, "prompt_template": args.prompt_template if kind != sidecar.PRIVATE else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not args.use_cpu else None
    settings["device"] = (device or torch.device("cpu")).type
    exact = hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()
    draft = PartialFile(args.out, {**settings, "texts of prompts": exact}, 0o666 if said["covered"] else 0o600)
    for warning in warnings(said, notes, args, tokenizer):
        logger.warning(warning)
    model.to(device or "cpu", dtype=torch.bfloat16 if args.bf16 else torch.float32)
    write_all(model, tokenizer, prompts, draft, number, args, options)
    public = {**settings, **({"sha256_of_prompts": exact} if kind == sidecar.PUBLIC else {})}
    content = {**said, "file": args.out.name, "rows": number, "rows_that_end": draft.state["ended"], "generated": public}
    draft.finish(content)
    return content


def write_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    draft: PartialFile,
    number: int,
    args: argparse.Namespace,
    options: dict[str, Any],
) -> None:
    """Write what is left of `number` texts, a batch at a time."""
    ends = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    config = GenerationConfig(**options, eos_token_id=ends or [-1], pad_token_id=pad)
    needless: Any = lambda record: "attention_mask" not in record.getMessage()  # noqa: E731
    logging.get_logger("transformers.modeling_utils").addFilter(needless)
    model.generation_config = GenerationConfig()  # or what is left open above would be taken from the folder
    with tqdm(total=number, initial=draft.rows, unit=" texts", desc="Generate") as bar:
        while draft.rows < number:
            chosen = [prompts[i % len(prompts)] for i in range(draft.rows, min(draft.rows + args.batch_size, number))]
            seed = batch_seed(args.seed, draft.rows // args.batch_size)
            try:
                tokens, ended = write_batch(model, [prompt.ids for prompt in chosen], config, seed)
            except (ValueError, TypeError) as error:  # what transformers says of its options
                raise UserError(f"--generation_options, --temperature and the like: {first_line(error)}") from error
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            draft.add([to_row(p, text, args.text_column, args.with_prompt) for p, text in zip(chosen, texts)], sum(ended))
            bar.update(len(chosen))


def warnings(said: dict, notes: dict, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what whoever starts this should know at once."""
    found = [] if said["covered"] else [said["statement"]]
    if "start_token" in notes and notes["start_token"] is None and not args.prompts and args.prompt_template is None:
        found.append("The model never saw how a text begins: train with --prepend_bos, or give a --prompt_template")
    if "end_token" in notes and notes["end_token"] is None and "targets" not in notes:
        found.append("The model never saw how a text ends, so that texts end at --max_new_tokens: train with --append_eos")
    return found


def main(arguments: list[str]) -> None:
    args = make_parser().parse_args(arguments)
    content = generate(args)
    ended = f"{content['rows_that_end']:,} of {content['rows']:,} texts come to their end"
    print(f"{content['file']}: {ended}. {content['statement']}")
    if args.report:
        print(synthetic_report.format_report(synthetic_report.make_report(args.out, args.report, args)))
