"""What goes wrong on a GPU only: each case is noticed or handled."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_dataset, make_trainer
from runs import make_gpu_trainer
from simulated_gpu import simulated_gpu

from author_dp.errors import MechanismError, UserError
from author_dp.guards.seed_checks import replay_global_rng
from author_dp.mechanism import noise
from author_dp.training.dry_run import DryRun, largest_microbatch


def test_rocm_has_no_product_with_another_type_of_result(tmp_path, monkeypatch):
    with simulated_gpu(has_out_dtype=False), pytest.raises((UserError, RuntimeError), match="out_dtype"):
        make_gpu_trainer(tmp_path, bf16=True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with simulated_gpu(has_out_dtype=False):
        make_gpu_trainer(tmp_path, bf16=True, max_steps=1).train()


def test_model_check_runs_the_engine_in_the_type_of_the_run(tmp_path, monkeypatch):
    """A product that only bfloat16 needs fails at the start, not in the first step."""
    from author_dp.clipping import norms

    plain = norms.matmul

    def matmul(left, right):
        if left.dtype == torch.bfloat16 and left.dim() == 3:
            raise RuntimeError("no such kernel")
        return plain(left, right)

    monkeypatch.setattr(norms, "matmul", matmul)
    with simulated_gpu(), pytest.raises(UserError, match=r"the engine fails on this model.*no such kernel"):
        make_gpu_trainer(tmp_path, bf16=True)


def test_replay_global_rng_does_not_warn_of_several_gpus(monkeypatch):
    with simulated_gpu(), warnings.catch_warnings():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        warnings.simplefilter("error")
        first, second = replay_global_rng(lambda: torch.rand(2, device="cuda").cpu())
    assert torch.equal(first, second)


def test_dry_run_on_the_cpu_of_a_gpu_machine_reports_the_process(tmp_path):
    with simulated_gpu():
        trainer = make_trainer(tmp_path, use_cpu=True)
        assert trainer.args.device.type == "cpu"
        trainer.add_callback(dry_run := DryRun(trainer))
        trainer.train()
        assert " 0.0 GiB" not in dry_run.summary() and dry_run.summary().endswith(" GiB")  # and proposes nothing


GIB = 2**30


@pytest.mark.parametrize(
    ("resident", "peak", "authors", "available", "most", "expected"),
    [
        (2, 6, 8, 20, 256, 32),  # 0.5 GiB an author; 18 - 2 GiB hold exactly 32
        (2, 6, 8, 19.9, 256, 16),  # 31 fit
        (2, 6, 8, 80, 64, 64),
        (2, 6, 8, 80, 48, 32),
        (2, 6, 8, 2.8, 256, 1),
        (2, 6, 8, 2.7, 256, 0),
        (2, 6, 8, 2, 256, 0),  # not even the weights
        (2, 2, 1, 80, 256, 256),
    ],
)
def test_largest_microbatch_fits_in_nine_tenths_of_the_memory(resident, peak, authors, available, most, expected):
    found = largest_microbatch(resident * GIB, peak * GIB, authors, int(available * GIB), most)
    assert found == expected
    if found:
        assert resident + found * (peak - resident) / authors <= 0.9 * available


def test_dry_run_proposes_the_microbatch_of_the_gpu(tmp_path, monkeypatch):
    with simulated_gpu():  # 100 GiB of its memory are free
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * GIB)
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 9}
        trainer = make_gpu_trainer(tmp_path, dataset=make_dataset([1] * 40), **options)
        trainer.add_callback(dry_run := DryRun(trainer))
        trainer.train()
        assert trainer.state.global_step == 2
        assert "12.0 GiB. Microbatches of 8 authors, as now, suit this GPU" in dry_run.summary()

        def propose(peak: int, authors: int, batch: int) -> str:
            dry_run.step_peak, dry_run.shape = peak * GIB, dry_run.shape._replace(authors=authors)
            trainer.plan = replace(trainer.plan, expected_batch_size=batch)
            return dry_run.proposal()

        assert "For this GPU, give --per_device_train_batch_size 8 --gradient_accumulation_steps 2: the" in propose(12, 1, 16)
        assert "--per_device_train_batch_size 32 --gradient_accumulation_steps 32:" in propose(20, 8, 1024)
        assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 64:" in propose(99, 8, 256)
        assert "8 authors, as now, suit" in propose(12, 8, 248)  # 16 do not divide it
        assert "12 authors, as now, suit" in propose(12, 12, 192)  # 8 are a power of two, but not better
        assert "consider --activation_checkpointing" in propose(99, 1, 32)
        trainer.args.activation_checkpointing = True
        assert "consider a shorter --sequence_len" in propose(99, 1, 32)


def test_secure_noise_is_copied_in_few_pieces_without_waits(monkeypatch):
    monkeypatch.setattr(noise, "COPIED_AT_ONCE", 2**19)
    with simulated_gpu() as gpu:
        source, total = noise.GaussianNoise(torch.device("cuda"), secure=True), torch.zeros(2**20 + 3, device="cuda")
        gpu.reset()
        for chunk in total.split(source.chunk_size):
            source.add_(chunk, 0.5)
        assert sum(gpu.copies.values()) == 3 and not gpu.waits
        values = total.inner
    assert values.std().item() == pytest.approx(0.5, rel=0.02) and values[-1] != 0


def test_two_passes_use_deterministic_kernels(tmp_path):
    """Flash attention's backward pass otherwise adds up in another order in the second pass."""
    seen = []
    with simulated_gpu():
        trainer = make_gpu_trainer(tmp_path, max_steps=1, activation_checkpointing=True)
        trainer.model.transformer.h[0].register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
        trainer.train()
    assert set(seen) == {True} and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("when", ["before", "while training"])
def test_tf32_is_noticed(tmp_path, when):
    flags = torch.backends.cuda.matmul
    try:
        with simulated_gpu(), pytest.raises((UserError, MechanismError), match=r"cuda\.matmul\.fp32_precision tf32"):
            trainer = make_gpu_trainer(tmp_path, max_steps=1) if when == "while training" else None
            flags.fp32_precision = "tf32"
            (trainer or make_gpu_trainer(tmp_path)).train()
    finally:
        flags.fp32_precision = "none"


def test_several_gpus_in_one_process_use_one(tmp_path, monkeypatch):
    with simulated_gpu():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        trainer = make_gpu_trainer(tmp_path, dataset=make_dataset([1] * 24), max_steps=1)
        trainer.train()
        assert trainer.args.n_gpu == 1
