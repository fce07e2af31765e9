"""DPTrainer on the simulated GPU: complete trainings, resuming, evaluation, release and generation."""

import pytest
import torch
from conftest import make_dataset, make_trainer, resumable, tiny_gpt2
from runs import SAMPLES, make_gpu_trainer, one_layer, train_on_gpu
from simulated_gpu import GpuTensor, simulated_gpu
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.outputs.generate import generate_batch
from author_dp.training.loss_release import release_eval_loss

SMALL_LLAMA = dict(
    vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=16,
)  # fmt: skip
RUNS = {
    "lora in bf16": {"model": {"lora": True}, "bf16": True, "optim": "adamw_torch_fused", "learning_rate": 1e-3},
    "two passes with dropout in bf16": {"model": {"dropout": 0.1}, "bf16": True, "activation_checkpointing": True},
    "Opacus' engine": {"privacy": {"clipping": "grad_sample"}, "max_steps": 1},
    "no privacy": {"privacy": {"disable_dp": True, "noise_multiplier": None}, "bf16": True},
    "bands": {"privacy": {"noise_bands": "2"}, "optim": "adamw_torch", "learning_rate": 1e-3},
    "secure noise, k = 2, a worker": {
        "privacy": {"secure_noise": True, "samples_per_author": 2},
        "dataloader_num_workers": 1,
        "max_steps": 1,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_training_stays_on_the_gpu(name):
    options = dict(RUNS[name])
    run = train_on_gpu(one_layer(**options.pop("model", {})), **options)
    assert run.trainer.state.global_step == run.trainer.args.max_steps
    assert all(isinstance(p, GpuTensor) and p.dtype == torch.float32 for p in run.trainer.model.parameters())
    assert all(p.inner.isfinite().all() for p in run.trainer.model.parameters())
    assert not run.gpu.float64  # Macs' GPUs have none


def test_training_of_a_llama_in_bf16():
    run = train_on_gpu(LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA)), bf16=True, max_steps=1)
    assert run.trainer.model_check.error < 1e-3


def test_canaries_find_a_correct_mechanism_on_the_gpu():
    run = train_on_gpu(canaries=GradientCanaries(8, 7**40))
    assert run.trainer.run_report.audit["canaries"] == 8


class StopEarly(TrainerCallback):
    follows = "steps"

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_a_run_resumes_evaluates_releases_and_generates_on_the_gpu(tmp_path):
    with simulated_gpu() as gpu:
        options = {"use_cpu": False, "optim": "adamw_torch_fused", "learning_rate": 1e-3, "max_steps": 3}
        trainer = resumable(tmp_path, **options)
        trainer.add_callback(StopEarly())
        trainer.train()
        before = [p.inner.clone() for p in trainer.model.parameters()]
        evaluation = make_dataset([2, 1, 1], seed=3)
        trainer = resumable(tmp_path, **options, resume_from_checkpoint=True, eval_dataset=evaluation)
        trainer.train()
        assert trainer.state.global_step == 3
        assert not all(torch.equal(p.inner, old) for p, old in zip(trainer.model.parameters(), before))
        on_gpu = trainer.evaluate()
        released = release_eval_loss(trainer, 1e7, 9.0, limited=False)
        config = GenerationConfig(max_new_tokens=3, do_sample=True, pad_token_id=0, eos_token_id=[0])
        tokens, _ = generate_batch(trainer.model, [[1, 2], [3]], config, seed=0)
    assert not gpu.float64
    assert len(tokens) == 2
    assert released["loss"] == pytest.approx(on_gpu["eval_author_loss"], abs=1e-3)


def test_evaluation_on_the_gpu_equals_the_cpu(tmp_path):
    dataset = make_dataset([2, 1, 3], seed=3)
    with simulated_gpu() as gpu:
        trainer = make_gpu_trainer(tmp_path, tiny_gpt2())
        on_gpu = trainer.evaluate(dataset)
        assert not gpu.float64
    on_cpu = make_trainer(tmp_path / "cpu", tiny_gpt2(), make_dataset(SAMPLES)).evaluate(dataset)
    for name in ("eval_loss", "eval_author_loss"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-6)
