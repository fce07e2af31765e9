"""How often the host waits for the GPU, exactly, by the function that waits.

A wait in a microbatch empties the GPU's queue: kernels that follow start only after the host has launched them.
"""

from collections import Counter

import pytest
from conftest import make_dataset
from runs import make_gpu_trainer, one_layer, train_on_gpu
from simulated_gpu import simulated_gpu

GROUPS = "author_dp/clipping/author_groups.py"
RUNS = {
    "k = 1": {"optim": "adamw_torch_fused"},
    "k = 2, LoRA in bf16": {"optim": "adamw_torch_fused", "privacy": {"samples_per_author": 2}, "bf16": True, "lora": True},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    options = dict(RUNS[request.param])
    return train_on_gpu(one_layer(options.pop("lora", False)), max_steps=3, logging_steps=3, **options)


def test_waits_of_each_microbatch(run):
    assert run.microbatches > 2
    assert {key: times / run.microbatches for key, times in run.waits("microbatches").items()} == {
        ("_local_scalar_dense", f"{GROUPS}:__init__"): 1  # are all norms finite?
    }


def test_waits_of_the_rest_of_a_step(run):
    assert not run.waits("release") and not run.waits("update") and not run.waits("loop")


def test_waits_of_a_log_line(run):
    assert run.waits("log line") == {
        ("_local_scalar_dense", "author_dp/training/base_trainer.py:_inner_training_loop"): 1,  # the loss, by the Trainer
        ("copy to the CPU", "author_dp/clipping/norm_stats.py:pop"): 1,
        ("copy to the CPU", "author_dp/guards/noise_monitor.py:flush"): 1,
        ("_local_scalar_dense", "author_dp/guards/precision.py:test"): 1,
        ("copy to the CPU", "author_dp/mechanism/fsdp.py:find_non_finite_shard"): 1,
    }


def test_waits_of_an_evaluation_batch(tmp_path):
    waits = []
    with simulated_gpu() as gpu:
        trainer = make_gpu_trainer(tmp_path, per_device_eval_batch_size=4)
        for texts in (4, 12):
            gpu.waits.clear()
            trainer.evaluate(make_dataset([1] * texts, seed=3))
            waits.append(Counter(gpu.waits))
    batches = 2  # more in the second evaluation
    more = {key[1:]: times / batches for key, times in (waits[1] - waits[0]).items()}
    assert more == {("copy to the CPU", "author_dp/training/evaluation.py:evaluate"): 1}
