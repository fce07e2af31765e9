"""Compute, not measure, what a training run costs on a GPU that is not there. Needs no GPU.

    python benchmarks/roofline.py --kind full --microbatch 128 --bf16                    # a table of all rows
    python benchmarks/roofline.py --row ghost --kind LoRA --microbatch 128 --bf16 --json # one row
    python benchmarks/roofline.py --row ghost --bf16 --top 20                            # the costliest operations

The project's own step runs on a simulated GPU (tests/gpu/simulated_gpu.py) whose tensors have shapes only. Each operation takes
the larger of flops / rate and bytes / bandwidth of an H200, and at least SMALLEST. `run_s` assumes that launches are hidden
behind kernels, `run_s_launches` that none is: a real run lies between. The rows: Hugging Face's plain Trainer, this one without
privacy, with ghost clipping, and with two backward passes over checkpointed layers.

Not in it: how well a kernel uses the GPU, caches, the time that a wait costs, and loading data. Only a real GPU tells these.
"""

import argparse
import json
import math
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

import numpy as np  # noqa: E402
import simulated_torch  # noqa: E402, F401  # registers the device, before all else
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from simulated_gpu import Operation, SimulatedGpu, simulated_gpu  # noqa: E402
from torch.utils.data._utils.pin_memory import pin_memory  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from author_dp.clipping.norm_stats import NormStatistics  # noqa: E402
from author_dp.mechanism.fsdp_clipping import make_engine  # noqa: E402
from author_dp.mechanism.microbatches import LogicalBatch, MicrobatchShape, make_microbatches  # noqa: E402
from author_dp.mechanism.optimizer import AuthorDPOptimizer  # noqa: E402
from author_dp.models.fusion import fuse_operations  # noqa: E402
from author_dp.training.base_trainer import NoDDPWrapper, PlainEngine  # noqa: E402
from data_utils import collate  # noqa: E402
from dp_utils import DPTrainer  # noqa: E402

# An H200: flops per second (dense, no TF32), bytes per second, seconds of the host for a launch, of the smallest kernel.
RATE = {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12, torch.float64: 67e12}
BANDWIDTH, LAUNCH, SMALLEST = 4.8e12, 5e-6, 2e-6
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
WRITE_ONLY = {
    "copy", "fill", "zero", "normal", "uniform", "zeros", "ones", "full", "new_zeros", "new_ones", "zeros_like", "ones_like",
    "full_like", "new_full", "arange", "scalar_tensor",
}  # fmt: skip
ROWS, KINDS = ("plain", "non-private", "ghost", "two_pass"), ("full", "LoRA")
LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
SHAPES: dict[str, tuple[Any, dict]] = {
    "gpt2": (GPT2Config, {}),
    "smollm2": (LlamaConfig, dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                  num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    "llama1b": (LlamaConfig, LLAMA_1B),
    "llama8b": (LlamaConfig, dict(LLAMA_1B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  tie_word_embeddings=False)),
}  # fmt: skip


class Cost(NamedTuple):
    """What operations cost."""

    seconds: float = 0.0  # on the GPU
    kernels: float = 0

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        return Cost(self.seconds + times * other.seconds, self.kernels + times * other.kernels)

    @property
    def with_launches(self) -> float:
        """Seconds, if the host launches each kernel when the one before has ended."""
        return self.seconds + self.kernels * LAUNCH


def cost_of(op: Operation) -> Cost:
    """Return the cost of one operation."""
    written, read = (sum(t.num_bytes for t in tensors) for tensors in (op.outputs, op.inputs))
    kernels, flop_seconds, moved = 1, 0.0, read + written
    last = op.inputs[-1].num_bytes if op.inputs else 0
    if op.name in PRODUCTS:
        left, right = op.inputs[-2:]
        flop_seconds = 2 * math.prod(left.shape) * right.shape[-1] / RATE[left.dtype]
    elif op.name.startswith("_scaled_dot_product_flash_attention"):
        is_backward = "backward" in op.name
        query = op.inputs[1 if is_backward else 0]
        batch, heads, tokens, features = query.shape  # causal: half of the pairs
        flop_seconds = 2 * batch * heads * tokens**2 * features * (2.5 if is_backward else 1) / RATE[query.dtype]
        kernels = 3 if is_backward else 1
    elif op.name in WRITE_ONLY:
        moved = written + (last if op.name == "copy" and len(op.inputs) > 1 else 0)
    elif op.name in ("gather", "embedding", "index_select", "index"):
        moved = 2 * written + last
    elif op.name in ("scatter_add", "scatter", "index_add", "index_put"):
        moved = 3 * last
    elif op.name == "logsumexp":  # maximum, difference, exponential, sum and more: three passes, two of which write a copy
        moved, kernels = 6 * op.inputs[0].num_bytes, 8
    elif op.name == "embedding_dense_backward":
        kernels, moved = 8, 3 * op.inputs[0].num_bytes + written
    elif op.name in ("bincount", "nonzero"):
        kernels = 5
    elif op.name == "native_layer_norm_backward":  # weight and bias take two more
        kernels = 3 if len(op.outputs) > 1 else 1
    elif op.name.startswith("_fused_adamw"):  # reads four tensors of each parameter, writes three; 36 tensors a launch
        moved, kernels = read * 7 / 4, len(op.inputs) // 4 // 36 + 1
    elif op.name.startswith("_foreach"):
        moved, kernels = read * 1.5, len(op.inputs) // 2 // 110 + 1
    elif op.name == "_local_scalar_dense":
        return Cost()
    return Cost(max(flop_seconds, moved / BANDWIDTH, kernels * SMALLEST), kernels)


def total_cost(operations: list[Operation]) -> Cost:
    total = Cost()
    for op in operations:
        total = total.plus(cost_of(op))
    return total


class Step(NamedTuple):
    """What a step runs on the GPU."""

    first: list[Operation]  # of the first microbatch, with what comes once a step before it
    microbatch: list[Operation]  # of each other one
    update: list[Operation]
    waits: dict[tuple[str, str], int]  # of a microbatch, {(operation, where): times}
    peak: int  # bytes


# --- the steps ------------------------------------------------------------------------------------------------


def make_model(shape: str, lora: bool, overrides: dict[str, Any]) -> Any:
    """Return a model in training mode, of shapes only; `overrides` are of its configuration."""
    config, options = SHAPES[shape]
    options = {**options, **overrides}
    is_gpt2 = config is GPT2Config
    with torch.device("meta"):
        model = (GPT2LMHeadModel if is_gpt2 else LlamaForCausalLM)(config(**options, use_cache=False))
        if lora:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, fan_in_fan_out=is_gpt2))
    return model.train()


def make_step_trainer(row: str, model: Any, bf16: bool) -> Any:
    """Return what DPTrainer.training_step uses of a DPTrainer, on the GPU; its checks would need numbers."""
    device, disable_dp = torch.device("cuda"), row == "non-private"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, fused=True)
    if disable_dp:
        engine: Any = PlainEngine(model, 1024)
    else:
        engine = make_engine(model, "ghost", 1.0, checkpointed=row == "two_pass")
        engine.freeze_fallback(set())
        optimizer = AuthorDPOptimizer(
            optimizer, noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=1024, before_release=lambda: None
        )
    return SimpleNamespace(
        model=model, optimizer=optimizer, dp_optimizer=optimizer, engine=engine, norms=NormStatistics(1.0, device),
        privacy=SimpleNamespace(disable_dp=disable_dp), args=SimpleNamespace(device=device, world_size=1),
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast("cuda", torch.bfloat16, enabled=bf16)),
        gradient_canaries=None, tracked=lambda microbatches: microbatches, generators=MagicMock(), monitors=MagicMock(),
        _step_loss=torch.zeros((), device=device),
    )  # fmt: skip


def make_logical_batch(microbatches: int, authors: int, tokens: int) -> LogicalBatch:
    """Return equal microbatches in pinned memory, as a run's data loader makes them, one text of all tokens an author."""
    shape = MicrobatchShape(authors, 1, (tokens,))
    sampled = [[{"input_ids": np.zeros(tokens, np.int32)}]] * (microbatches * authors)
    batches = [pin_memory(batch) for batch in make_microbatches(sampled, authors, collate, shape)]
    return LogicalBatch(batches, len(sampled), 0)


class LastOnly(list):
    """The two microbatches of a step: before the second, the GPU forgets what it ran, which is then in `first`."""

    def __init__(self, gpu: SimulatedGpu, microbatches: list):
        super().__init__(microbatches)
        self.gpu, self.first = gpu, []

    def __iter__(self):
        for index, microbatch in enumerate(super().__iter__()):
            if index:
                self.first = list(self.gpu.operations)
                self.gpu.reset()
            yield microbatch


def run_private_step(gpu: SimulatedGpu, trainer: Any, batch: LogicalBatch) -> Step:
    """Run DPTrainer.training_step and the optimizer's step; return what the last microbatch and the update ran."""
    gpu.reset()
    microbatches = LastOnly(gpu, batch.microbatches)
    DPTrainer.training_step(trainer, NoDDPWrapper(trainer.engine.module), batch._replace(microbatches=microbatches))
    operations, waits, peak = list(gpu.operations), {key[1:]: times for key, times in gpu.waits.items()}, gpu.memory.peak
    gpu.reset()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return Step(microbatches.first, operations, list(gpu.operations), waits, peak)


def run_plain_step(gpu: SimulatedGpu, model: Any, batch: LogicalBatch, bf16: bool) -> Step:
    """Run what Hugging Face's Trainer does: its loss, the mean over the step's tokens, and the clipping of the norm."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    total, num_tokens = torch.zeros((), device="cuda"), torch.tensor(1024 * 128, device="cuda")
    for microbatch in batch.microbatches:
        gpu.reset()
        ids, labels = (microbatch[name].to("cuda", non_blocking=True) for name in ("input_ids", "labels"))
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=num_tokens).loss
        loss.backward()
        bool(torch.isnan(loss.detach()))  # logging_nan_inf_filter
        bool(torch.isinf(loss.detach()))
        total += loss.detach()
        del loss
    operations, waits, peak = list(gpu.operations), {key[1:]: times for key, times in gpu.waits.items()}, gpu.memory.peak
    gpu.reset()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return Step(operations, operations, list(gpu.operations), waits, peak)


def simulate(row: str, options: argparse.Namespace) -> Step:
    """Return the step of a row: its second microbatch, as a step has many of these."""
    model = make_model(options.shape, options.kind == "LoRA", options.config)
    if row != "plain":
        fuse_operations(model)
    with simulated_gpu(compute=False) as gpu:
        model = model.to("cuda")
        batch = make_logical_batch(2, options.microbatch, options.tokens)
        if row == "plain":
            return run_plain_step(gpu, model, batch, options.bf16)
        if row == "two_pass":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if options.kind == "LoRA":
                model.enable_input_require_grads()
        return run_private_step(gpu, make_step_trainer(row, model, options.bf16), batch)


# --- the results ----------------------------------------------------------------------------------------------


def cost_of_run(row: str, step: Step, options: argparse.Namespace) -> Cost:
    """Return the cost of all steps; with privacy, the last microbatch of each is half empty on average."""
    microbatches = options.authors / options.microbatch + (0.5 if row in ("ghost", "two_pass") else 0)
    once = total_cost(step.update).plus(total_cost(step.first))
    return Cost().plus(once.plus(total_cost(step.microbatch), microbatches - 1), options.steps)


def result_of(row: str, step: Step, plain: Cost, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a row."""
    run = cost_of_run(row, step, options)
    return {
        "row": row,
        "computed_not_measured": True,
        "kernels": round(total_cost(step.microbatch).kernels),  # a microbatch
        "waits": sum(step.waits.values()),  # a microbatch
        "run_s": round(run.seconds, 1),
        "run_s_launches": round(run.with_launches, 1),
        "ratio_to_plain": round(plain.seconds / run.seconds, 3),
        "peak_gib": round(step.peak / 2**30, 2),
    }


def costliest(step: Step, options: argparse.Namespace) -> list[str]:
    """Return lines with the operations that cost most in a step, by name and place."""
    groups: dict[str, Cost] = defaultdict(Cost)
    for operations, times in ((step.microbatch, options.authors / options.microbatch), (step.update, 1)):
        for op in operations:
            dtype = str(op.inputs[-1].dtype).removeprefix("torch.") if op.inputs else ""
            name = f"{op.name} {dtype} in {op.where}"
            groups[name] = groups[name].plus(cost_of(op), times)
    ordered = sorted(groups.items(), key=lambda item: -item[1].seconds)[: options.top]
    return [f"    {cost.seconds * 1e3:8.2f} ms/step {cost.kernels:8.0f} kernels  {name}" for name, cost in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=ROWS, help="default: all")
    parser.add_argument("--kind", choices=KINDS, default="full")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON that overrides the shape's configuration")
    parser.add_argument("--microbatch", type=int, default=128, help="authors in memory at once")
    parser.add_argument("--authors", type=int, default=1024, help="expected in a step")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=894)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--top", type=int, default=0, help="print so many of the costliest operations, and where the host waits")
    parser.add_argument("--json", action="store_true", help="print one object a row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    plain_step = simulate("plain", options)
    plain = cost_of_run("plain", plain_step, options)
    if not options.json:
        print(
            f"Computed for one H200, not measured: {options.shape}, {options.kind}, {'bf16' if options.bf16 else 'float32'}, "
            f"{options.steps} steps of {options.authors} authors x {options.tokens} tokens, {options.microbatch} at once\n\n"
            "| row | kernels a microbatch | waits | run, launches hidden (s) | none hidden (s) | plain / row | peak (GiB) |\n"
            "|---|---|---|---|---|---|---|"
        )
    for row in [options.row] if options.row else ROWS:
        step = plain_step if row == "plain" else simulate(row, options)
        result = result_of(row, step, plain, options)
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        print(
            "| " + " | ".join(str(value) for name, value in result.items() if name != "computed_not_measured") + " |", flush=True
        )
        if options.top:
            waits = ", ".join(f"{name} in {where}: {times}" for (name, where), times in step.waits.items())
            print("\n".join([*costliest(step, options), f"    waits of a microbatch: {waits or 'none'}"]))


if __name__ == "__main__":
    main()
