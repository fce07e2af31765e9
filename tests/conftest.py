"""Small models, data and trainers for the tests; nothing here is downloaded."""

import gc
import json
import os
import random
import subprocess
from pathlib import Path

import datasets
import model_checks
import mutation
import numpy as np
import pytest
import speed
import torch
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from script_runs import SCRIPT, Program, command
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, TrainerCallback, TrainingArguments

from author_dp.clipping import ENGINES
from author_dp.data.splits import author_hashes
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import LogicalBatch, make_microbatches
from data_utils import AuthorDataset, collate, group_by_author
from dp_utils import DPTrainer, PrivacyArguments

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
VOCABULARY = 61
COUNTS = [1, 2, 3, 1, 1, 5]  # samples of each author
MODELS = {"tied": {"tied": True}, "untied": {"tied": False}, "lora": {"lora": True}}

torch.set_num_threads(1)  # of tiny models; two workers share two cores
os.environ.pop("CI", None)  # where it is set, transformers says each line twice
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"  # AMX's bfloat16 products mix rows, which `check_float32` refuses
datasets.disable_progress_bars()
UserError.on_command_line = True  # errors name options as the script does; test_wording.py tests Python's arguments


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Let each test start accelerate anew, so that --bf16 or --torch_compile of one is not seen by the next."""
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(params=ENGINES)
def clipping(request) -> str:
    return request.param


def tiny_gpt2(tied: bool = True, lora: bool = False, dropout: float = 0.0, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if lora:
        adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])
        model = get_peft_model(model, adapters)
        for name, parameter in model.named_parameters():  # lora_B starts at zero, which would hide half of the gradients
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_dataset(counts: list[int], seed: int = 0, longest: int = 12) -> AuthorDataset:
    """Authors with `counts` samples each, of 2 to `longest` random tokens."""
    generator = random.Random(seed)
    authors = [author for author, count in enumerate(counts) for _ in range(count)]
    generator.shuffle(authors)
    tokens = [[generator.randrange(VOCABULARY) for _ in range(generator.randint(2, longest))] for _ in authors]
    return AuthorDataset(datasets.Dataset.from_dict({"input_ids": tokens}), *group_by_author(authors), author_hashes(authors))


def make_batch(counts: list[int] = COUNTS, seed: int = 0, longest: int = 12) -> dict:
    """One microbatch with all samples of all authors."""
    dataset = make_dataset(counts, seed, longest)
    draws = [dataset.indices[a:b] for a, b in zip(dataset.offsets, dataset.offsets[1:])]
    (batch,) = make_microbatches(dataset.__getitems__(draws), len(counts), collate)
    return batch


def clipped_sum(model, batch: dict, clip_norm: float, clipping: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat clipped sum over the authors of a batch, and the norms before clipping, by an engine."""
    engine = ENGINES[clipping](model, clip_norm)
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    model.train()
    norms = engine.backward(author_losses(engine.module, batch), batch["author"])
    total = flat(parameter.summed_grad for parameter in trainable(model).values())
    engine.close()
    return total, norms


def make_trainer(
    folder, model=None, dataset=None, *, privacy=None, full_shard=False, canaries=None, eval_dataset=None, rehearsal=False,
    **options,
) -> DPTrainer:  # fmt: skip
    """A trainer whose update is minus the gradient: SGD with learning rate 1. Tests of `rehearsal` and of the script have one."""
    privacy = {"noise_multiplier": 1.0, "per_sample_max_grad_norm": 0.5, **(privacy or {})}
    defaults = {
        "output_dir": str(folder), "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": 4, "remove_unused_columns": False,
    }  # fmt: skip
    trainer = DPTrainer(
        model if model is not None else tiny_gpt2(),
        TrainingArguments(**{**defaults, **options}),
        PrivacyArguments(**privacy),
        train_dataset=dataset if dataset is not None else make_dataset(COUNTS),
        data_collator=collate,
        full_shard=full_shard,
        canaries=canaries,
        eval_dataset=eval_dataset,
    )
    trainer.model_name = "named"  # as adapters begin with other values than 0
    if not rehearsal:
        trainer.rehearse = lambda: None
    return trainer


def sample(cases, of: int = 4) -> list:
    """Every `of`-th of the cases, for unit tests; the others are integration tests."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.integration] if number % of else []) for number, case in enumerate(cases)]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flat(tensors) -> torch.Tensor:
    """One vector of all tensors; those in shares are gathered, which is collective."""
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).detach().flatten() for t in tensors])


def run_script(
    *arguments: str, processes: int = 0, cwd: Path | None = None, script: Path = SCRIPT
) -> subprocess.CompletedProcess:
    """Run fine-tune-dp.py, or another script, as a user would; with `processes`, through torch.distributed.run."""
    return Program(*command(*arguments, processes=processes, script=script)[1:], cwd=cwd).wait(300)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny GPT-2 with the demo's tokenizer, whose special tokens differ from those of its config, as if added later.

    GPT-2's own tokenizer has 70 times as many tokens, whose logits would take half of the time of all runs.
    """
    tokenizer = GPT2TokenizerFast.from_pretrained(ROOT / "demo" / "model", local_files_only=True)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def comments(tmp_path_factory) -> Path:
    """Text by author: speeches of plays where they are at hand, the demo's comments otherwise."""
    source = SHARED / "shakespeare.jsonl" if SHARED.exists() else ROOT / "demo" / "comments.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:2_000]]
    path = tmp_path_factory.mktemp("comments") / "comments.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_report(folder) -> dict:
    return json.loads((Path(folder) / "privacy.json").read_text())


def within(observed: float, expected: float, deviation: float) -> bool:
    """Whether a random figure is within six standard deviations, which chance alone misses once in 5e8 times."""
    return abs(observed - expected) <= 6 * deviation


def as_arrays(batch: dict) -> list[list[np.ndarray]]:
    """Undo collation: the token ids of each real author's samples."""
    rows = [ids[labels != -100].numpy() for ids, labels in zip(batch["input_ids"], batch["labels"])]
    authors = [
        [rows[i] for i in np.flatnonzero(batch["author"].numpy() == author) if len(rows[i])]
        for author in range(batch["num_authors"] - batch["num_dummies"])
    ]
    return [samples for samples in authors if samples]


class Recorder(TrainerCallback):
    """Keep the gradient that each step releases, and the weights around it."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(flat(p.grad for p in trainable(model).values()).clone())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(trainer) -> tuple[list[LogicalBatch], Recorder]:
    """Train, and return what each step saw and released."""
    batches, recorder = [], Recorder()
    step = trainer.training_step

    def training_step(model, inputs, *args):
        batches.append(inputs)
        recorder.wrapped_in = type(model).__name__
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.add_callback(recorder)
    trainer.train()
    return batches, recorder


def resumable(folder, max_steps: int = 6, target: float = 3.0, **options):
    privacy = {"noise_multiplier": None, "target_epsilon": target}
    return make_trainer(folder, dataset=make_dataset([1] * 60), max_steps=max_steps, privacy=privacy,
                        save_strategy="steps", save_steps=2, **options)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", default="", help="all, or some of unit, integration and mutation, with commas")
    parser.addoption("--cached", action="store_true", help="leave out bugs that were noticed since their test last changed")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(mutation)
    config.pluginmanager.register(speed)
    config.pluginmanager.register(model_checks)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the chosen tiers: by default unit tests, and of files that are named integration tests, too."""
    named = any(Path(argument).resolve() not in (ROOT, ROOT / "tests") for argument in config.args)
    chosen = config.option.tier or ("unit,integration" if named else "unit")
    tiers = set(chosen.replace("all", "unit,integration,mutation").split(","))
    mutants = list(mutation.make_mutants(items)) if "mutation" in tiers else []
    if config.option.cached:
        mutants = [mutant for mutant in mutants if not mutant.is_cached]
    kept = [item for item in items if ("integration" if item.get_closest_marker("integration") else "unit") in tiers]
    gc.freeze()  # the Trainer collects garbage at each start: not among libraries and tests
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept + mutants
