"""Complete trainings on the simulated GPU, for the tests."""

import gc
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import simulated_torch  # noqa: F401  # registers the device, before the first backward
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import VOCABULARY, make_dataset, make_trainer
from peft import LoraConfig, get_peft_model
from simulated_gpu import SimulatedGpu, simulated_gpu
from transformers import GPT2Config, GPT2LMHeadModel

gc.collect()
gc.freeze()  # the Trainer collects garbage; without all imported modules that takes no time
SAMPLES = [1, 2, 3, 1, 1, 5] * 4  # of each author


class Run(NamedTuple):
    """A training that has ended."""

    trainer: Any
    gpu: SimulatedGpu
    microbatches: int

    def waits(self, phase: str) -> Counter:
        """Return {(operation, where): times} of a phase."""
        return Counter({key[1:]: times for key, times in self.gpu.waits.items() if key[0] == phase})


def one_layer(lora: bool = False, dropout: float = 0.0) -> Any:
    """Return a GPT-2 with one layer: half the operations of tiny_gpt2, all of the same kinds."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True)) if lora else model


def make_gpu_trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    """Return a trainer on the device, with two microbatches or more in a step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    defaults = {"use_cpu": False, "max_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    dataset = options.pop("dataset", None) or make_dataset(SAMPLES)
    trainer = make_trainer(folder, one_layer() if model is None else model, dataset, **{**defaults, **options})
    assert trainer.args.device.type == "cuda"
    return trainer


def train_on_gpu(model: Any = None, **options: Any) -> Run:
    """Train on a simulated GPU, and note in which phase of the run the host waits."""
    with tempfile.TemporaryDirectory() as folder, simulated_gpu() as gpu:
        gpu.recording = False
        trainer = make_gpu_trainer(Path(folder), model, **options)
        microbatches = note_phases(trainer, gpu)
        trainer.train()
        gpu.phase = "after"
    return Run(trainer, gpu, len(microbatches))


def note_phases(trainer: Any, gpu: SimulatedGpu) -> list[Any]:
    """Set `gpu.phase` while the trainer trains; return the list to which it adds each microbatch.

    Phases: start, first step, microbatches, release, update, loop (the rest of a step), log line, end.
    """
    seen: list[Any] = []
    gpu.phase = "start"

    def within(owner: Any, name: str, phase: str, after: Any = None) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, gpu.phase = gpu.phase, phase if trainer.state.global_step else "first step"
            try:
                return function(*args, **kwargs)
            finally:
                gpu.phase = before if after is None else after()

        setattr(owner, name, wrapped)

    def after_log_line() -> str:
        return "end" if trainer.state.global_step == trainer.args.max_steps else "loop"

    within(trainer, "training_step", "microbatches", lambda: "loop" if trainer.state.global_step else "first step")
    within(trainer, "_maybe_log_save_evaluate", "log line", after_log_line)
    step, create = trainer.training_step, trainer.create_optimizer

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        seen.extend(inputs.microbatches if trainer.state.global_step else [])
        return step(model, inputs, *args)

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(inner, "pre_step"):
            within(inner, "pre_step", "release")
        within(getattr(inner, "original_optimizer", inner), "step", "update")
        return optimizer

    trainer.training_step, trainer.create_optimizer = training_step, create_optimizer
    return seen
