"""benchmarks/roofline.py runs the project's own step, and a microbatch stays within its kernels, waits and computed time."""

import argparse
import sys

import pytest
from conftest import ROOT, make_dataset, tiny_gpt2
from runs import make_gpu_trainer
from simulated_gpu import simulated_gpu

sys.path.append(str(ROOT / "benchmarks"))
import roofline

from author_dp.models.fusion import fuse_operations


def make_model(lora: bool):
    """Return a tiny model as fine-tune-dp.py prepares one."""
    model = tiny_gpt2(lora=lora).train()
    model.config.use_cache = False
    fuse_operations(model)
    return model


@pytest.mark.parametrize(("lora", "bf16"), [(False, False), (True, True)])
def test_roofline_runs_the_operations_of_a_training(tmp_path, lora, bf16):
    with simulated_gpu() as gpu:
        model = make_model(lora)
        trainer = make_gpu_trainer(
            tmp_path, model, dataset=make_dataset([1] * 40), optim="adamw_torch_fused", bf16=bf16, max_steps=2, logging_steps=9
        )
        step, found = trainer.training_step, []

        def training_step(model, inputs, *args):
            result = step(model, inputs, *args)
            found.append((inputs.microbatches[-1]["input_ids"].shape, list(gpu.operations)))
            return result

        trainer.training_step, trainer.tracked = training_step, lambda batches: roofline.LastOnly(gpu, batches)
        trainer.train()
    (authors, tokens), operations = found[-1]
    model = make_model(lora)
    with simulated_gpu(compute=False) as gpu:
        batch = roofline.make_logical_batch(2, authors, tokens)
        expected = roofline.run_private_step(gpu, roofline.make_step_trainer("ghost", model.to("cuda"), bf16), batch)
    found, computed = ([(op.name, op.inputs, op.where) for op in ops] for ops in (operations, expected.microbatch))
    assert found == computed


# Of one microbatch of 128 authors x 128 tokens in bfloat16: kernels, waits, and seconds of a run with hidden launches.
LIMITS = {
    ("ghost", "full"): (1_180, 1, 265), ("ghost", "LoRA"): (660, 1, 181), ("two_pass", "full"): (2_200, 2, 460)
}  # fmt: skip


@pytest.mark.parametrize(("row", "kind"), LIMITS)
def test_microbatch_stays_within_its_limits(row, kind):
    options = argparse.Namespace(
        shape="gpt2", kind=kind, microbatch=128, authors=1024, tokens=128, steps=894, bf16=True, config={}
    )
    step = roofline.simulate(row, options)
    result = roofline.result_of(row, step, roofline.Cost(1.0), options)
    most_kernels, waits, most_seconds = LIMITS[row, kind]
    assert result["waits"] == waits
    assert result["kernels"] <= most_kernels and result["run_s"] <= most_seconds
