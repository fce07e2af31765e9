"""Write synthetic text with a trained model; a privacy statement of the text is written beside it.

    python -m author_dp.generate FOLDER --number 1000 --out synthetic.jsonl

Guarantees: the file and its privacy statement (privacy_statement.py) appear together and complete, or not at all. The same
command resumes an interrupted run; on a machine of the same kind it writes the same rows. Each batch has a seed derived from its
index, and an incomplete batch is written again. Text without a guarantee is readable for its owner only (mode 0600).

Generation is post-processing of the model: it spends no privacy budget, and --seed need not be secret.
"""

import argparse
import hashlib
import json
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

from author_dp.cli import OptionParser
from author_dp.data.chat_template import ChatTemplate, TurnEnd
from author_dp.data.loading import expand_files
from author_dp.errors import UserError, first_line
from author_dp.files import sha256_of
from author_dp.hub_access import hub_error, hub_is_reachable
from author_dp.logs import get_logger
from author_dp.models.loading import load_base, load_tokenizer
from author_dp.models.lora import adapts_tied_weights, load_adapter
from author_dp.models.weights import adapter_base_model
from author_dp.outputs import privacy_statement, synthetic_report
from author_dp.outputs.partial_file import PartialFile
from author_dp.outputs.prompts import Prompt, PromptSource, make_prompts

logger = get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128  # if the model does not say how long its training texts were
# Options of transformers that would change the number of texts per prompt, or that have an option of their own here.
RESERVED_OPTIONS = (
    "num_return_sequences", "return_dict_in_generate", "do_sample", "max_length", "eos_token_id", "pad_token_id", "bos_token_id",
    "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens",
)  # fmt: skip
MODEL_FILE_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".txt", ".bin")
RUN_RECORD_PREFIXES = ("privacy", "training_args", "trainer_state", "optimizer", "scheduler", "rng_state", "_")


# --- Options ----------------------------------------------------------------------------------------------


def make_generate_parser() -> OptionParser:
    parser = OptionParser("python -m author_dp.generate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the --output_dir of a run, or a checkpoint in it")
    add("--out", type=Path, default=Path("synthetic.jsonl"), help="the file to write; default: %(default)s")
    add("--number", type=int, help="number of texts; default: one for each row of --prompts, 1,000 without")
    add("--seed", type=int, default=0, help="of sampling; default: %(default)s")
    add("--batch_size", type=int, default=64, help="texts generated at a time; default: %(default)s")
    add("--text_column", help="column of the text in the output; default: that of the training's text")
    add("--use_cpu", action="store_true", help="even if there is a GPU")
    add("--bf16", action="store_true", help="compute in bfloat16")
    prompts = parser.add_argument_group("prompts; without these options texts begin as in training")
    add = prompts.add_argument
    add("--prompts", metavar="FILE", help=".jsonl, .json, .csv or .parquet; its rows repeat if --number is larger")
    add("--public_prompts", action="store_true", help="declare that prompts and fields are public, or made up")
    add("--private_prompts", action="store_true", help="declare that some are taken from private data: the text has no guarantee")
    add("--prompt_column", default="prompt", help="column of texts, or of lists of messages; default: %(default)s")
    add("--messages_column", help="column of conversations, whose last answer is generated; instead of --prompt_column")
    add("--prompt_template", help="a text, with {column}s of --prompts: 'about {topic}:'; instead of --prompt_column")
    add("--keep_columns", nargs="+", default=[], help="columns of --prompts to copy, beside those of the template")
    add("--chat", action="store_true", help="a prompt is a user message, rendered by the model's chat template")
    add("--with_prompt", action="store_true", help="write the prompt as the beginning of the text, not as a column")
    sampling = parser.add_argument_group("sampling, as in transformers' GenerationConfig")
    add = sampling.add_argument
    add("--max_new_tokens", type=int, help=f"default: --sequence_len of the training, {DEFAULT_MAX_NEW_TOKENS} if unknown")
    add("--temperature", type=float, default=1.0, help="0: greedy decoding; default: %(default)s")
    add("--top_p", type=float, default=1.0, help="default: %(default)s")
    add("--top_k", type=int, default=0, help="0: all tokens; default: %(default)s")
    add("--repetition_penalty", type=float, default=1.0, help="default: %(default)s")
    add("--generation_options", nargs="+", default=[], metavar="NAME=VALUE", help="others: no_repeat_ngram_size=3 min_p=0.05")
    report = parser.add_argument_group("report on the text (private), the same as of python -m author_dp.synthetic_report")
    report.add_argument("--report", nargs="+", metavar="FILE", help="the --train_file of the training")
    synthetic_report.add_synthetic_report_options(report)
    return parser


def check_generate_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for options out of range, or that contradict each other."""
    if not Path(args.folder).is_dir():
        raise UserError(f"FOLDER {args.folder} is not a folder: give the --output_dir of a run")
    for name, minimum in (("number", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {minimum}")
    ranges = {
        "temperature": ("0, or 1e-4 to 1e4", args.temperature == 0 or 1e-4 <= args.temperature <= 1e4),
        "top_k": ("0 or above", args.top_k >= 0),
        "top_p": ("above 0 and at most 1", 0 < args.top_p <= 1),
        "repetition_penalty": ("0.01 to 100", 0.01 <= args.repetition_penalty <= 100),
    }  # fmt: skip
    for name, (words, is_valid) in ranges.items():
        if not is_valid:
            raise UserError(f"--{name} {getattr(args, name)} must be {words}")
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out}: JSON lines are written. Give a name that ends in .jsonl")
    if args.report:
        expand_files("--report", args.report)
        expand_files("--validation_file", args.validation_file or [])
    if args.public_prompts and args.private_prompts:
        raise UserError("--public_prompts and --private_prompts exclude each other: if any prompt is private, give the latter")
    if args.prompts and not (args.public_prompts or args.private_prompts):
        raise UserError(
            "--prompts FILE: say where prompts and fields come from: --public_prompts (published, or made up without private "
            "data) or --private_prompts (the text then has no guarantee)"
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
        raise UserError("--with_prompt has no effect on conversations, whose output is complete anyway: leave it out")


def generation_options(args: argparse.Namespace, max_new_tokens: int) -> dict[str, Any]:
    """Return the options of transformers' GenerationConfig."""
    others: dict[str, Any] = {}
    for option in args.generation_options:
        name, sign, value = option.partition("=")
        if not sign or name in RESERVED_OPTIONS or name not in GenerationConfig().to_dict():
            reason = f"; {name} is not to be set here" if name in RESERVED_OPTIONS else ""
            raise UserError(f"--generation_options {option}: it must be NAME=VALUE, of an option of GenerationConfig{reason}")
        try:
            others[name] = json.loads(value)
        except ValueError:
            others[name] = value
    options: dict[str, Any] = {"do_sample": args.temperature > 0, "max_new_tokens": max_new_tokens}
    if options["do_sample"]:
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    options |= {"repetition_penalty": args.repetition_penalty, **others}
    try:
        GenerationConfig(**options)
    except (ValueError, TypeError, AttributeError) as error:  # raised by transformers
        raise UserError(f"--generation_options {' '.join(args.generation_options)}: {first_line(error)}") from error
    return options


# --- The model --------------------------------------------------------------------------------------------


def load_generating_model(folder: str, revision: Optional[str] = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model of a folder, with a LoRA adapter merged into its base where that is the same model, and the tokenizer.

    Args:
        revision: commit of a base from the hub; default: the newest.
    Raises:
        UserError: if the folder or the base cannot be loaded.
    """
    local_only, base = False, None
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        base = adapter_base_model(folder)
        local_only = base is not None and not os.path.isdir(base) and not hub_is_reachable()
        model: Any = load_base(base or folder, local_files_only=local_only, **options)
        if base is not None:
            model = load_adapter(model, folder)
            if not adapts_tied_weights(model):
                model = model.merge_and_unload()
        model.eval()
        return model, load_tokenizer(folder)
    except UserError as error:
        raise UserError(str(error).replace("--model_name", "FOLDER")) from error
    except Exception as error:  # transformers, safetensors and peft each raise their own types
        if local_only:
            raise hub_error("FOLDER: the base model", str(base)) from error
        raise UserError(f"FOLDER {folder} cannot be loaded: {first_line(error)}") from error


def fingerprint_model(folder: str) -> str:
    """Return one SHA-256 of all files that affect generation: weights, configuration, tokenizer, and an adapter's base."""
    digest, base = hashlib.sha256(), adapter_base_model(folder)
    if base is not None and os.path.isdir(base):
        digest.update(fingerprint_model(base).encode())
    for path in sorted(Path(folder).iterdir()):
        is_run_record = path.name.startswith(RUN_RECORD_PREFIXES)
        if path.is_file() and path.suffix in MODEL_FILE_SUFFIXES and not is_run_record:
            digest.update(os.fsencode(path.name) + f":{sha256_of(path)}\n".encode())  # a name need not be UTF-8
    return digest.hexdigest()


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn_end: Optional[TurnEnd]) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, those of the model's generation_config.json, and that of a turn."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    tokens = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    tokens += [None if turn_end is None else turn_end.token]
    return sorted({int(token) for token in tokens if token is not None})


def generation_token_budget(
    model: PreTrainedModel, prompts: list[Prompt], max_new_tokens: Optional[int], sequence_len: Optional[int], has_file: bool
) -> int:
    """Return how many tokens to generate; the default is limited to the model's positions.

    Args:
        max_new_tokens: the option; None: as long as training texts.
        sequence_len: maximum tokens of a training text, if known.
        has_file: whether the prompts are rows of a file, for the error message.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    number, longest = max(enumerate((len(prompt.ids) for prompt in prompts), 1), key=lambda pair: pair[1])
    tokens = max_new_tokens or min(sequence_len or DEFAULT_MAX_NEW_TOKENS, positions - longest)
    if longest + tokens > positions or tokens < 1:
        place = f"--prompts, row {number}" if has_file else "the prompt"
        remedy = f"lower --max_new_tokens {max_new_tokens}, or shorten it" if max_new_tokens else "shorten it"
        raise UserError(f"{place} has {longest} tokens, the model {positions} positions: {remedy}")
    return tokens


# --- Writing ----------------------------------------------------------------------------------------------


def generation_batch_seed(seed: int, index: int) -> int:
    """Return the seed of a batch, which depends on its index only, not on the batches before."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "big") >> 1


def generate_batch(
    model: Any, prompts: Sequence[list[int]], config: GenerationConfig, seed: int
) -> tuple[list[list[int]], list[bool]]:
    """Return the tokens generated after each prompt, without the end token, and whether the text reached its end."""
    longest, pad = max(map(len, prompts)), config.pad_token_id
    rows = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=model.device)  # (texts, tokens)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        output: Any = model.generate(input_ids=rows, attention_mask=mask, generation_config=config)
    texts, ended = [], []
    for row in output[:, longest:].tolist():
        end = next((index for index, token in enumerate(row) if token in config.eos_token_id), None)
        texts.append(row[:end])
        ended.append(end is not None)
    return texts, ended


def to_generated_row(prompt: Prompt, text: str, column: str, with_prompt: bool) -> dict[str, Any]:
    """Return a row of the output, in TRL's columns, which training reads too."""
    if "messages" in prompt.row:
        return {**prompt.row, "messages": [*prompt.row["messages"], {"role": "assistant", "content": text.strip()}]}
    if not with_prompt:
        return {**prompt.row, column: text}
    return {name: value for name, value in prompt.row.items() if name != "prompt"} | {column: prompt.row["prompt"] + text}


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file and its privacy statement; return the statement."""
    check_generate_arguments(args)
    guarantee = privacy_statement.read_privacy_statement(Path(args.folder))
    if args.report:
        real = synthetic_report.with_default_synthetic_columns(report_options(args), {"model": guarantee})
        synthetic_report.check_synthetic_split(guarantee or {}, real)
    source = privacy_statement.statement_prompt_source(args.private_prompts, args.prompts, args.prompt_template)
    statement = privacy_statement.make_statement(guarantee, source)
    data = (guarantee or {}).get("data") or {}
    model, tokenizer = load_generating_model(args.folder, (guarantee or {}).get("adapter_base", {}).get("revision"))
    prompts = make_prompts(
        tokenizer,
        data.get("start_token"),
        PromptSource(
            args.prompts, args.prompt_column, args.messages_column, args.prompt_template, tuple(args.keep_columns), args.chat
        ),
    )
    args.text_column = args.text_column or data.get("text_column") or "content"
    if args.text_column in prompts[0].row and not (args.with_prompt and args.text_column == "prompt"):
        raise UserError(f"--text_column {args.text_column!r} is the name of another column of the output: choose another")
    number = args.number or (len(prompts) if args.prompts else 1_000)
    tokens = generation_token_budget(model, prompts, args.max_new_tokens, data.get("sequence_len"), bool(args.prompts))
    options = generation_options(args, tokens)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not args.use_cpu else None
    device = device or torch.device("cpu")
    settings = {
        "model": fingerprint_model(args.folder), "number": number, "seed": args.seed, "batch_size": args.batch_size,
        "sampling": options, "text_column": args.text_column, "with_prompt": args.with_prompt, "bf16": args.bf16,
        "prompts": source, "prompt_template": args.prompt_template if source != privacy_statement.PRIVATE else None,
        "versions": {name: version(name) for name in ("torch", "transformers")}, "device": device.type,
    }  # fmt: skip
    prompts_hash = hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()
    output = PartialFile(args.out, {**settings, "texts of prompts": prompts_hash}, 0o666 if statement["covered"] else 0o600)
    turn_end = ChatTemplate(tokenizer).turn_end if "messages" in prompts[0].row else None
    for warning in make_generation_warnings(statement, data, args, turn_end):
        logger.warning(warning)
    model.to(device, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    ends = eos_token_ids(model, tokenizer, turn_end)
    write_generated_texts(model, tokenizer, prompts, output, number, args, GenerationConfig(**options, eos_token_id=ends or [-1]))
    public = {**settings, **({"sha256_of_prompts": prompts_hash} if source == privacy_statement.PUBLIC else {})}
    content = {**statement, "file": args.out.name, "rows": number, "rows_that_end": output.state["ended"], "generated": public}
    if statement["covered"]:
        privacy_statement.check_still_covered(Path(args.folder))
    output.finish(content)
    return content


def write_generated_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    output: PartialFile,
    number: int,
    args: argparse.Namespace,
    config: GenerationConfig,
) -> None:
    """Write the remaining ones of `number` texts in batches."""
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else max(0, config.eos_token_id[0])
    is_useful_log: Any = lambda record: "attention_mask" not in record.getMessage()  # noqa: E731
    logging.get_logger("transformers.modeling_utils").addFilter(is_useful_log)
    model.generation_config = GenerationConfig()  # otherwise options that are unset above come from the folder
    with tqdm(total=number, initial=output.rows, unit=" texts", desc="Generate") as bar:
        while output.rows < number:
            batch = [prompts[i % len(prompts)] for i in range(output.rows, min(output.rows + args.batch_size, number))]
            seed = generation_batch_seed(args.seed, output.rows // args.batch_size)
            try:
                tokens, ended = generate_batch(model, [prompt.ids for prompt in batch], config, seed)
            except (
                ValueError,
                TypeError,
                ArithmeticError,
                IndexError,
                RuntimeError,
            ) as error:  # by transformers, for its options
                if not isinstance(error, (ValueError, TypeError)) and not args.generation_options:
                    raise
                raise UserError(f"--generation_options, --temperature and the like: {first_line(error)}") from error
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            output.add(
                [to_generated_row(p, text, args.text_column, args.with_prompt) for p, text in zip(batch, texts)], sum(ended)
            )
            bar.update(len(batch))


def make_generation_warnings(
    statement: dict[str, Any], data: dict[str, Any], args: argparse.Namespace, turn_end: Optional[TurnEnd]
) -> list[str]:
    """Return warnings about a missing guarantee, and about texts that will not begin or end well.

    Args:
        statement: privacy statement of the text.
        data: how training texts became samples, from the model's privacy.json.
        turn_end: what ends the answers; None where texts are generated.
    """
    warnings = [] if statement["covered"] else [statement["statement"]]
    if "start_token" in data and data["start_token"] is None and not args.prompts and args.prompt_template is None:
        warnings.append("The model never saw how a text begins: train with --prepend_bos, or give a --prompt_template")
    learned_texts = "text_column" in data or "targets" not in data  # by an older version: not known
    ends = turn_end.token is not None if turn_end is not None else "messages_column" in data or not learned_texts
    if data.get("end_token", "") is None and not ends:
        warnings.append("The model never saw how a text ends, so texts end at --max_new_tokens: train with --append_eos")
    return warnings


def report_options(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options of --report: the columns that are given here are those of the output, not of the real text."""
    return argparse.Namespace(**{**vars(args), **dict.fromkeys(synthetic_report.COLUMN_OPTIONS)})


def main(arguments: list[str]) -> None:
    args = make_generate_parser().parse_args(arguments)
    content = generate(args)
    ended = f"{content['rows_that_end']:,} of {content['rows']:,} texts reach their end"
    print(f"{content['file']}: {ended}. {content['statement']}")
    if args.report:
        report = synthetic_report.make_synthetic_report(args.out, args.report, report_options(args))
        print(synthetic_report.format_synthetic_report(report))
