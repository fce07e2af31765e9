"""fsdp.py: whole runs of sharded models, saved and resumed."""

from pathlib import Path

import pytest
import torch
from conftest import MODELS, flat, make_dataset, make_trainer, read_report, tiny_gpt2, trainable
from forked_runs import in_processes
from transformers import GPT2LMHeadModel

# --- what is saved ----------------------------------------------------------------------------------------


def banded_run(folder: Path) -> dict:
    privacy = {"noise_multiplier": 1.0, "noise_bands": "2", "sample_rate": 0.3}
    trainer = make_trainer(
        folder, tiny_gpt2(), make_dataset([1] * 20), privacy=privacy, full_shard=True, optim="adamw_torch", learning_rate=0.01,
        max_steps=4, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer.train()
    return {"weights": flat(trainable(trainer.model).values()), "spent": read_report(folder / "checkpoint-4")["accounted_steps"]}


@pytest.mark.integration
def test_sharded_run_with_noise_bands(tmp_path):
    first, second = in_processes(tmp_path, 2, banded_run, tmp_path / "run")
    assert torch.equal(first["weights"], second["weights"]) and first["spent"] == 2
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert all(isinstance(values["noise_variance"], float) for values in state.values())


def run(folder: Path, kind: str, steps: int, processes: int, resume: bool) -> dict:
    """Train with Adam and without noise, all authors in each batch."""
    trainer = make_trainer(
        folder / "run", tiny_gpt2(**MODELS[kind]), make_dataset([1] * 6), privacy={"noise_multiplier": 0.0},
        full_shard=processes > 1, optim="adamw_torch", learning_rate=0.01, max_steps=steps, save_strategy="steps", save_steps=2,
        per_device_train_batch_size=6 // processes, resume_from_checkpoint=resume or None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return {"weights": flat(trainable(trainer.model).values())}


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["tied", "lora"])
def test_sharded_run_resumes_with_another_number_of_processes(tmp_path, kind):
    """Checkpoints of two and of three processes give what one run of one process gives."""
    for name in ("sharded", "alone"):
        (tmp_path / name).mkdir()
    in_processes(tmp_path, 2, run, tmp_path / "sharded", kind, 2, 2, False)
    (found, *_) = in_processes(tmp_path, 3, run, tmp_path / "sharded", kind, 4, 3, True)
    alone = run(tmp_path / "alone", kind, 4, 1, False)["weights"]
    assert (found["weights"] - alone).norm() < 1e-4 * (alone - flat(trainable(tiny_gpt2(**MODELS[kind])).values())).norm()
    if kind == "tied":
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "sharded" / "run")
        assert torch.equal(flat(loaded.parameters()), found["weights"])
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert loaded.config.architectures == ["GPT2LMHeadModel"]
    # Resume without sharding.
    again = run(tmp_path / "sharded", kind, 6, 1, True)["weights"]
    assert (again - run(tmp_path / "alone", kind, 6, 1, True)["weights"]).norm() < 1e-4 * again.norm()
