"""What goes wrong on a GPU only: each case is noticed or handled."""

import warnings

import pytest
import torch
from conftest import make_dataset, make_trainer
from runs import make_gpu_trainer
from simulated_gpu import simulated_gpu

from author_dp.errors import MechanismError, UserError
from author_dp.guards.seed_checks import replay_global_rng
from author_dp.mechanism import noise
from author_dp.training.dry_run import DryRun


def test_rocm_has_no_product_with_another_type_of_result(tmp_path, monkeypatch):
    with simulated_gpu(has_out_dtype=False), pytest.raises((UserError, RuntimeError), match="out_dtype"):
        make_gpu_trainer(tmp_path, bf16=True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with simulated_gpu(has_out_dtype=False):
        make_gpu_trainer(tmp_path, bf16=True, max_steps=1).train()


def test_model_check_runs_the_engine_in_the_type_of_the_run(tmp_path, monkeypatch):
    """A product that only bfloat16 needs fails at the start, not in the first step."""
    from author_dp.clipping import grad_factors

    plain = grad_factors.matmul

    def matmul(left, right):
        if left.dtype == torch.bfloat16 and left.dim() == 3:
            raise RuntimeError("no such kernel")
        return plain(left, right)

    monkeypatch.setattr(grad_factors, "matmul", matmul)
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
        assert " 0.0 GiB" not in DryRun(trainer).summary()


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
