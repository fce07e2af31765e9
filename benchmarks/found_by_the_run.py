"""Which mistakes in the mechanism does a run find by itself, and how soon? python benchmarks/found_by_the_run.py

Plants the bugs of tests/test_gradient_audit.py, and some of tests/test_selfcheck.py,
in a run of the demo at epsilon 8 with gradient canaries, one at a time, after the model check (which finds wrong clips before
anything is trained). Prints the table of docs/verification.md. The run tests itself every five steps.
"""

import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
OPTIONS = (
    f"--model_name {ROOT}/demo/model --train_file {ROOT}/demo/comments.jsonl --sequence_len 64 --target_epsilon 8 "
    "--per_sample_max_grad_norm 1.0 --samples_per_author 2 --audit_canaries 1000 --audit_kind gradient --logging_steps 5 "
    "--save_strategy no --eval_fraction 0 --log_level warning --disable_tqdm True"
)
USUAL = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --max_steps 100"
SMALL = "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_steps 150"  # draws are often empty
ADD_NOISE = "author_dp.mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide"
ON_TWO = {  # processes
    "all of the noise on every process": (ADD_NOISE, "std /= math.sqrt(self.grad_buffer.noise_shares)", "pass", ""),
    "noise on the first process alone": (ADD_NOISE, "if std > 0:", "if torch.distributed.get_rank() == 0:", ""),
    "another sampler key on each process": (
        "author_dp.training.dataloading.make_sampler", "broadcast(secrets.randbits(128))", "secrets.randbits(128)", ""),
    "the whole draw on each process": (
        "author_dp.mechanism.sampling.PoissonAuthorSampler.sample_batch", "authors[self.rank :: self.world_size]", "authors", ""),
}  # fmt: skip
FURTHER = ("noise reused in each step", "noise from --seed in each step", "Laplacian noise")
SHORT = {
    "released noise fails a test:": "noise:",
    "gradient canaries fail a test:": "canaries:",
    "sampling of authors fails a test:": "sampling:",
}
LEFT_OUT = {"an author who is never in"}  # who does not show in 100 steps at the demo's rate; in the test at a higher one


def bugs() -> dict[str, tuple]:
    import test_gradient_audit
    import test_selfcheck

    further = {name: test_selfcheck.BUGS[name] for name in FURTHER}
    return {"none": (), **test_gradient_audit.BUGS, **further, **ON_TWO}


def plant_and_run(name: str, arguments: list[str]) -> None:
    """Run the script in this process, with a bug from the moment at which training starts."""
    from planting import find, with_edit

    import dp_utils

    train = dp_utils.DPTrainer.train

    def train_with_bug(*args, **kwargs):
        if bug := bugs()[name]:
            where, old, new = bug[:3]
            function = find(where)
            function.__code__ = with_edit(function, old, new)  # type: ignore[attr-defined]
        return train(*args, **kwargs)

    dp_utils.DPTrainer.train = train_with_bug  # type: ignore[method-assign]
    sys.argv = ["fine-tune-dp.py", *arguments]
    runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="__main__")


def row(name: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if name in ON_TWO else []
    options = SMALL if name == "empty draws skipped" else USUAL
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*f"{OPTIONS} {options} --output_dir {folder}/out".split(), *(["--use_cpu"] if launcher else [])]
        command = [sys.executable, *launcher, __file__, "--plant", name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        ledger = (Path(folder) / "out" / "privacy_ledger.jsonl").read_text(encoding="utf-8")
        said = re.search(r"is not what the ledger says: (.*?)(?: \(after|: anyone|\. Nothing)", done.stderr)
        if said is None:
            assert done.returncode == 0, done.stderr
            audit = json.loads((Path(folder) / "out" / "privacy.json").read_text(encoding="utf-8"))["audit"]
            low, high = audit["epsilon_between"]
            return f"not stopped; epsilon between {low:.2f} and {high:.2f}, at least {audit['epsilon_lower_bound']:.2f} | "
        steps = sum('"record": "step"' in line for line in ledger.splitlines())
        found = said[1]
        for words, short in SHORT.items():
            found = found.replace(words, short)
        return f"{found} | {steps} |"


def main() -> None:
    if "--plant" in sys.argv:
        return plant_and_run(sys.argv[2], sys.argv[3:])
    print("| planted | found | after steps |\n|---|---|---|")
    for name in bugs():
        if name not in LEFT_OUT and (len(sys.argv) < 2 or any(words in name for words in sys.argv[1:])):
            print(f"| {name} | {row(name)}", flush=True)


if __name__ == "__main__":
    main()
