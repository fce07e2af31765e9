"""The shared parts of the benchmarks: tables as subcommands, runs in new processes, cached rows, and times side by side.

    python benchmarks/FILE.py --help             # the tables of a file
    python benchmarks/FILE.py TABLE [options]    # print one of them

A table is a function with `@table`. Whatever it measures runs alone, in a process that `alone` or `fine_tune` starts.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path += [str(ROOT / "demo"), str(ROOT / "tests")]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments  # noqa: E402

from author_dp.models.training_marks import marked_model  # noqa: E402
from author_dp.outputs.html_page import STATISTICS_NAME  # noqa: E402
from data_utils import AuthorDataset, collate, group_by_author  # noqa: E402
from dp_utils import DPTrainer, PrivacyArguments  # noqa: E402

GIB = 2**30
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
# glibc then gives larger pieces back to the system when they are freed: a peak is what was in use, not how it lay.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2_048,
}  # fmt: skip
SHAPES: dict[str, Callable] = {
    "GPT-2": lambda **config: GPT2LMHeadModel(GPT2Config(**config)),
    "SmolLM2": lambda **config: LlamaForCausalLM(LlamaConfig(**SMOLLM2, **config)),
}
LORA = {"r": 4, "lora_alpha": 32}

# --- the command line -----------------------------------------------------------------------------------------

ALONE, ANSWER = "--alone", "ANSWER "


def option(*names: str, **settings: Any) -> Callable[[argparse.ArgumentParser], Any]:
    """Return an option of a table, from the arguments of add_argument."""
    return lambda parser: parser.add_argument(*names, **settings)


def table(*options: Callable[[argparse.ArgumentParser], Any], passes_on: bool = False) -> Callable:
    """Declare a function of the parsed options that prints a table.

    Args:
        passes_on: whether unknown options are allowed; they come as `args.rest`.
    """

    def declare(function: Callable) -> Callable:
        function.options, function.passes_on = options, passes_on
        return function

    return declare


def main(description: str, *tables: Any) -> None:
    """Print the table that the command line names. A file with a single table needs no name."""
    if sys.argv[1:2] == [ALONE]:
        return answer(*sys.argv[2:])
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=description, **style)
    commands = parser.add_subparsers(required=True, metavar="TABLE") if len(tables) > 1 else None
    for function in tables:
        summary = function.__doc__.splitlines()[0]
        used = commands.add_parser(function.__name__, help=summary, description=function.__doc__, **style) if commands else parser
        for add in function.options:
            add(used)
        used.set_defaults(table=function)
    args, rest = parser.parse_known_args()
    function = vars(args).pop("table")
    if rest and not function.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    function(args)


# --- processes ------------------------------------------------------------------------------------------------


def alone_command(measure: Callable, processes: int = 1, **arguments: Any) -> list[str]:
    """Return the command that calls a benchmark's function in new processes, with arguments that JSON can hold."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    file = measure.__globals__["__file__"]
    return [sys.executable, *launcher, file, ALONE, measure.__name__, json.dumps(arguments, default=str)]


def alone(measure: Callable, *, processes: int = 1, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Return what a benchmark's function returns in a new process, or in the first of several.

    Args:
        environment: variables beside the inherited ones.

    Raises:
        SystemExit: the process failed; with its errors.
    """
    command = alone_command(measure, processes, **arguments)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(ANSWER)).removeprefix(ANSWER))


def answer(name: str, arguments: str) -> None:
    """Call a function of the running script, and print its result as JSON."""
    result = getattr(sys.modules["__main__"], name)(**json.loads(arguments))
    if int(os.environ.get("RANK", 0)) == 0:
        print(ANSWER + json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def fine_tune(
    *options: str, output_dir: Path | None = None, threads: int | None = None, variant: str = ""
) -> dict[str, dict[str, float]]:
    """Run fine-tune-dp.py; return the metrics of its evaluations, "before" and "after".

    Args:
        output_dir: a temporary folder by default.
        variant: of variants.py, which runs instead.
        threads: as the environment has it by default.

    Raises:
        SystemExit: the run failed; with its errors.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryDirectory() as folder:
        out = output_dir or Path(folder) / "out"
        script = [str(ROOT / "benchmarks" / "variants.py"), variant] if variant else [str(ROOT / "fine-tune-dp.py")]
        command = [sys.executable, *script, *options, "--output_dir", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        return json.loads((out / STATISTICS_NAME).read_text(encoding="utf-8"))["evaluation"]


# --- cached rows ----------------------------------------------------------------------------------------------


def cache_option(name: str) -> Callable[[argparse.ArgumentParser], Any]:
    return option("--cache", type=Path, default=Path(name), help="measurements that are in this file are not repeated")


def parallel_option(default: int = 1) -> Callable[[argparse.ArgumentParser], Any]:
    return option("--parallel", type=int, default=default, help="runs at once, of one thread each")


def cached(path: Path, keys: Iterable[Any], measure: Callable[[Any], Any], parallel: int = 1) -> Iterator[Any]:
    """Yield measure(key) of each key, in order, from the cache or measured anew. A key that comes n times has n results.

    Args:
        path: a file of lines [key, result] as JSON; a new result is added at once.
        parallel: calls of `measure` at once.
    """
    known, lock = defaultdict(list), threading.Lock()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        key, result = json.loads(line)
        known[json.dumps(key)].append(result)

    def measure_and_add(key: Any) -> Any:
        result = measure(key)
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([key, result]) + "\n")
        return result

    there = [(key, known[json.dumps(key)]) for key in keys]
    if parallel == 1:  # in this thread: only the main one gets signals, which a trainer handles
        yield from (found.pop(0) if found else measure_and_add(key) for key, found in there)
        return
    pool = ThreadPoolExecutor(parallel)
    try:
        results = [found.pop(0) if found else pool.submit(measure_and_add, key) for key, found in there]
        for result in results:
            yield result.result() if isinstance(result, Future) else result
    finally:
        pool.shutdown(cancel_futures=True)


# --- times and memory -----------------------------------------------------------------------------------------


def synchronize() -> float:
    """Return the time, once the accelerator has done what it was given."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(function: Callable, repetitions: int = 1, clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Return the median seconds of a call, and its last result."""
    seconds, result = [], None
    for _ in range(repetitions):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return statistics.median(seconds), result


def in_turns(rows: Iterable[Any], runs: int, measure: Callable[[Any], list[float]]) -> dict[Any, list[float]]:
    """Return the seconds of each row, of all its runs. Rows take turns, as the speed of a machine changes."""
    rows = list(rows)
    seconds: dict[Any, list[float]] = {row: [] for row in rows}
    for _ in range(runs):
        for row in rows:
            seconds[row] += measure(row)
    return seconds


def medians(seconds: dict[Any, list[float]]) -> dict[Any, float]:
    return {row: statistics.median(times) for row, times in seconds.items()}


class StepTimes(TrainerCallback):
    """Seconds of each step, by the clock and of all processors, from one step's end to the next one's: with data loading.

    Args:
        turn: called after each step with both lists so far; what it takes is not counted.
    """

    def __init__(self, turn: Callable[[list[float], list[float]], None] = lambda seconds, processor: None):
        self.seconds, self.processor, self.last, self.turn = [], [], None, turn

    def on_step_end(self, *args, **kwargs):
        now = (synchronize(), time.process_time())
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.processor.append(now[1] - self.last[1])
        self.turn(self.seconds, self.processor)
        self.last = (synchronize(), time.process_time())


def peak_memory() -> float:
    """GiB: of the GPU where there is one, of the process otherwise."""
    return torch.accelerator.max_memory_allocated() / GIB if DEVICE.type != "cpu" else process_peak()


def process_peak() -> float:
    """GiB of this process, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- trainings ------------------------------------------------------------------------------------------------


def make_model(lora: bool | dict[str, Any], shape: str = "GPT-2", **config: Any) -> torch.nn.Module:
    """Return a model of one of the SHAPES with random weights, adapted by LoRA if asked, with other options if given."""
    torch.manual_seed(0)
    model = SHAPES[shape](**config)
    if lora:
        options = LORA if lora is True else lora
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=shape == "GPT-2", **options))
    return model


def make_data(authors: int, samples_per_author: int, tokens: int, vocabulary: int = 50_257) -> AuthorDataset:
    """Return samples of random token ids."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (authors * samples_per_author, tokens), dtype=np.int32)
    owners = np.repeat(np.arange(authors), samples_per_author)
    return AuthorDataset(datasets.Dataset.from_dict({"input_ids": ids}), *group_by_author(owners))


def quiet(steps: int, batch_size: int) -> dict[str, Any]:
    """Return options of a training of one step and `steps` timed ones that says and saves nothing."""
    return {
        "max_steps": steps + 1, "per_device_train_batch_size": batch_size, "use_cpu": DEVICE.type == "cpu", "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "log_level": "error",
    }  # fmt: skip


def take_as_new(model: torch.nn.Module) -> torch.nn.Module:
    """Let a run start with the model of another row, which DPTrainer would refuse: only times and memory are measured."""
    marked_model(model)._trained_under = None
    return model


def make_trainer(
    row: str, model: torch.nn.Module, data: AuthorDataset, folder: str, *, steps: int, samples_per_author: int = 1,
    privacy: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **options: Any,
) -> DPTrainer:  # fmt: skip
    """Return a trainer. By default every author is in every batch, so that rows do equal work.

    Args:
        row: "non-private" or an engine.
        privacy: the noise of private rows, a noise multiplier of 1 by default, and what differs from a clip norm of 1.
        trainer: further arguments of DPTrainer.
        options: what differs from `quiet`.
    """
    settings = {"disable_dp": True} if row == "non-private" else {"clipping": row, **(privacy or {"noise_multiplier": 1.0})}
    return DPTrainer(
        take_as_new(model),
        TrainingArguments(**{"output_dir": folder, **quiet(steps, len(data)), "max_grad_norm": 0.0, **options}),
        PrivacyArguments(**{"per_sample_max_grad_norm": 1.0, "samples_per_author": samples_per_author, **settings}),
        **{"train_dataset": data, "data_collator": collate, "model_name": "random", **(trainer or {})},
    )


# --- tables and figures ---------------------------------------------------------------------------------------


def where() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    return f"{name}, torch {torch.__version__}"


def format_row(*cells: Any) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def format_head(*names: str) -> str:
    return f"{format_row(*names)}\n{'|---' * len(names)}|"


def print_head(*names: str) -> None:
    print(format_head(*names), flush=True)


def print_row(*cells: Any) -> None:
    print(format_row(*cells), flush=True)


@contextmanager
def drawing(name: str, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes, and save it beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, layout="constrained", **options)
    yield figure, axes
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name(name), dpi=150)
