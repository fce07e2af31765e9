"""Memory of LoRA on a frozen base in float32, bfloat16 and 4 bits: measured on a random Llama, and computed for larger ones.

python benchmarks/fewer_bits.py             # measured, each kind in a process of its own
python benchmarks/fewer_bits.py --computed  # of what is in memory beside activations
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from throughput import run
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parent.parent))

from author_dp.clipping import ENGINES
from author_dp.mechanism.losses import author_losses
from author_dp.models.loading import load_base
from author_dp.models.lora import add_lora_adapters
from author_dp.models.quantization import cast_parameters, nf4_config, num_elements, weight_bytes

GIB = 2**30
KINDS = ("float32", "bfloat16", "4 bits")
SHAPE = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 512}
SMOOTH = 0.005  # seconds between two looks at the memory
# Layers, width, inner width, of keys and values, vocabulary: of published Llama 3 models, heads of their own but for the first.
LLAMAS = {
    "1.2 billion": (16, 2048, 8192, 512, 128_256, True),
    "3.2 billion": (28, 3072, 8192, 1024, 128_256, True),
    "8.0 billion": (32, 4096, 14_336, 1024, 128_256, False),
    "70.6 billion": (80, 8192, 28_672, 1024, 128_256, False),
}
RANK = 8


class Peak:
    """The highest resident memory of this process while it is looked at, in bytes."""

    def __enter__(self) -> "Peak":
        self.process, self.highest, self.run_report.finished = psutil.Process(), 0, threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.run_report.finished.wait(SMOOTH):
            self.highest = max(self.highest, self.process.memory_info().rss)

    def __exit__(self, *_) -> None:
        self.run_report.finished.set()
        self.thread.join()


def load(folder: str, kind: str) -> Any:
    options: dict[str, Any] = {} if kind == "float32" else {"dtype": torch.bfloat16}
    if kind == "4 bits":
        options |= {"quantization_config": nf4_config(torch.float32), "device_map": {"": torch.device("cpu")}}
    model = add_lora_adapters(load_base(folder, **options), ["all-linear"], r=RANK)
    return model if kind == "float32" else cast_parameters(model)


def measure(folder: str, kind: str, authors: int, tokens: int) -> dict[str, float]:
    """Load, and take the clipped sum of one microbatch of random tokens; GiB beyond what imports take."""
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss
    with Peak() as loading:
        model = load(folder, kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.summed_grad = torch.zeros_like(parameter)
    ids = torch.randint(SHAPE["vocab_size"], (authors, tokens))
    batch = {"input_ids": ids, "labels": ids, "author": torch.arange(authors), "num_authors": authors}
    engine = ENGINES["ghost"](model.train(), 1.0)
    start = time.process_time()
    with Peak() as stepping:
        engine.backward(author_losses(engine.module, batch), batch["author"])
    seconds = time.process_time() - start
    return {"weights": weight_bytes(model) / GIB, "loading": (loading.highest - before) / GIB,
            "step": (stepping.highest - before) / GIB, "seconds": seconds,
            "parameters": sum(num_elements(p) for p in model.parameters())}  # fmt: skip


def measured(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        print(f"{options.authors} authors x {options.tokens} tokens, LoRA of rank {RANK} in all linear layers, one thread\n")
        print("| base | weights (GiB) | peak while loading | peak of a microbatch | CPU s |")
        print("|---|---|---|---|---|")
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16), "TQDM_DISABLE": "1"}
        for kind in KINDS:
            sizes = [str(options.authors), str(options.tokens)]
            found = run(__file__, "--one", kind, folder, *sizes, environment=environment)
            row = (f"{found[name]:.2f}" for name in ("weights", "loading", "step"))
            print(f"| {kind} | {' | '.join(row)} | {found['seconds']:.1f} |", flush=True)
        print(f"\n{found['parameters'] / 1e6:.0f} million parameters, adapters included")


def computed() -> None:
    """Print weights, and with them adapters, clipped sums and moments of LoRA, in GiB."""
    print("| Llama of | adapters | float32 | bfloat16 | 4 bits |\n|---|---|---|---|---|")
    for name, (layers, width, inner, narrow, vocabulary, tied) in LLAMAS.items():
        matrices = [(width, width)] * 2 + [(width, narrow)] * 2 + [(width, inner)] * 3
        linear = layers * sum(rows * columns for rows, columns in matrices)
        tables = vocabulary * width * (1 if tied else 2)
        norms = (2 * layers + 1) * width
        adapters = layers * RANK * sum(rows + columns for rows, columns in matrices)
        # NF4: half a byte, a byte a block of 64, and 4 for each 256 of these.
        nf4 = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * tables
        kinds = (4 * (linear + tables), 2 * (linear + tables), nf4)
        cells = " | ".join(f"{(base + 4 * norms + 16 * adapters) / GIB:.1f}" for base in kinds)
        print(f"| {name} | {adapters / 1e6:.0f} million | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, folder, authors, tokens = options.one
        print(json.dumps(measure(folder, kind, int(authors), int(tokens))))
    elif options.computed:
        computed()
    else:
        measured(options)


if __name__ == "__main__":
    main()
