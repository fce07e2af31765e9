"""Test steps on two processes: what each releases, against a plain loop."""

import json
import math
from pathlib import Path

import bugs
import pytest
import reference
import torch
from conftest import MODELS, ROOT, read_report, sample, tiny_gpt2, within
from mutation import catches
from script_runs import Program, launcher

from author_dp.accounting.ledger import PrivacyLedger


def run_processes(folder: Path, processes: int, **options) -> list[dict]:
    """Run tests/one_step.py under torch.distributed.run; return what each process saw and released."""
    arguments = [*launcher(processes), str(ROOT / "tests/one_step.py"), str(folder), json.dumps(options)]
    done = Program(*arguments).wait(300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "engine"), sample([("tied", "ghost"), ("lora", "ghost"), ("tied", "grad_sample")]))
def test_processes_release_the_update_of_a_plain_loop(tmp_path, kind, engine):
    # Expected batch 24 of 27 authors: an empty draw has a chance of 1e-26.
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 3, "clipping": engine}
    options = {"model": MODELS[kind], "counts": [1, 2, 3, 1, 4, 1, 1, 2, 2] * 3, "privacy": privacy, "per_device": 12}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    assert abs(len(first["authors"]) - len(second["authors"])) <= 1
    assert len({str(samples) for samples in authors}) == len(authors) == first["batch_size"] == second["batch_size"]
    expected = reference.clipped_sum(tiny_gpt2(**MODELS[kind]), authors, 0.5) / 24
    assert (first["gradient"] - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(first["gradient"], second["gradient"]) and torch.equal(first["weights"], second["weights"])
    assert first["loss"] == pytest.approx(second["loss"])
    assert first["wrapped_in"] == "NoDDPWrapper"  # and not in DistributedDataParallel, which would average
    assert read_report(tmp_path / "run")["world_size"] == 2
    assert PrivacyLedger(tmp_path / "run" / "privacy_ledger.jsonl").steps == 1


@catches("all of the noise on every rank", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "std /= math.sqrt(self.grad_buffer.noise_shares)", "pass", spawned=True)  # fmt: skip
@catches("the noise of one rank alone, short of its share", *bugs.NOISE_ON_RANK_0_ALONE, spawned=True)
@pytest.mark.integration
def test_processes_together_add_the_noise_of_one(tmp_path):
    # Expected batch 1 of 9: one process usually has no author, sometimes both have none.
    options = {"model": {}, "counts": [1] * 9, "privacy": {"noise_multiplier": 3.0}, "per_device": 1}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    total = reference.clipped_sum(tiny_gpt2(), authors, 0.5) if authors else 0.0
    noise = first["gradient"] * 2 - total  # expected batch 2 = 1 per device on two processes
    assert within(noise.var().item() / (3.0 * 0.5) ** 2, 1, math.sqrt(2 / len(noise)))
    assert torch.equal(first["gradient"], second["gradient"])


@pytest.mark.integration
def test_processes_without_privacy_average_over_all(tmp_path):
    """One process often has no author."""
    options = {"model": {}, "counts": [1] * 4, "privacy": {"disable_dp": True, "noise_multiplier": None}, "per_device": 1}
    first, second = run_processes(tmp_path, 2, **options)
    authors = first["authors"] + second["authors"]
    expected = reference.clipped_sum(tiny_gpt2(), authors, 1e9) / 2 if authors else torch.zeros_like(first["gradient"])
    assert (first["gradient"] - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(first["gradient"], second["gradient"]) and torch.equal(first["weights"], second["weights"])
