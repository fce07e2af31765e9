"""Clipping engines on the simulated GPU equal those on the CPU, and the reference loop."""

import copy

import pytest
import simulated_torch  # noqa: F401  # registers the device, before the first backward
import torch
from accelerate.utils import send_to_device
from conftest import MODELS, as_arrays, flat, make_batch, tiny_gpt2, trainable
from reference import clipped_sum
from simulated_gpu import GpuTensor, simulated_gpu

from author_dp.clipping import ENGINES, ClippingEngine
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.mechanism.losses import author_losses

CLIP_NORM = 0.5
CLASSES: dict[str, type[ClippingEngine]] = {**ENGINES, "two_pass": TwoPassClipping}


def clip(model, batch: dict, engine_class, device: str, bf16: bool = False, steps: int = 1) -> tuple[torch.Tensor, ...]:
    """Return norms and the flat clipped sum of `steps` equal microbatches, on the CPU."""
    model, batch = copy.deepcopy(model).to(device).train(), send_to_device(batch, device)
    engine = engine_class(model, CLIP_NORM)
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    for _step in range(steps):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        norms = engine.backward(losses, batch["author"])
    total = flat(parameter.summed_grad for parameter in trainable(model).values())
    engine.close()
    return tuple(t.inner if isinstance(t, GpuTensor) else t for t in (norms, total))


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 2, 3], [2, 2, 2]])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("engine", CLASSES)
def test_engine_on_gpu_equals_cpu_and_reference_loop(engine, kind, counts):
    model, batch = tiny_gpt2(**MODELS[kind]), make_batch(counts)
    expected = clip(model, batch, CLASSES[engine], "cpu")
    with simulated_gpu() as gpu:
        found = clip(model, batch, CLASSES[engine], "cuda")
    for one, other in zip(found, expected):
        assert (one - other).norm() <= 1e-6 * other.norm()
    reference = clipped_sum(model, as_arrays(batch), CLIP_NORM)
    assert (found[1] - reference).norm() <= 1e-5 * reference.norm()
    assert not gpu.float64


@pytest.mark.parametrize("engine", ["ghost", "two_pass"])
@pytest.mark.parametrize("kind", ["tied", "lora"])
def test_engine_on_gpu_is_near_the_reference_loop_in_bf16(engine, kind):
    model, batch = tiny_gpt2(**MODELS[kind]), make_batch([1, 2, 3])
    with simulated_gpu():
        _, found = clip(model, batch, CLASSES[engine], "cuda", bf16=True)
    reference = clipped_sum(model, as_arrays(batch), CLIP_NORM)
    assert (found - reference).norm() <= 0.02 * reference.norm()


def test_tensors_of_both_devices_raise():
    with simulated_gpu(), pytest.raises(RuntimeError, match="both devices"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_a_wait_is_noted_with_its_function():
    with simulated_gpu() as gpu:
        values = torch.arange(3, device="cuda")
        gpu.waits.clear()
        assert values.sum().item() == 3 and values[values > 1].tolist() == [2]
    here = "tests/gpu/test_simulated_engines.py:test_a_wait_is_noted_with_its_function"
    assert gpu.waits == {("", "_local_scalar_dense", here): 1, ("", "index", here): 1, ("", "copy to the CPU", here): 1}


def test_a_pinned_copy_does_not_wait():
    with simulated_gpu() as gpu:
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        assert not gpu.waits
        torch.ones(2).to("cuda", non_blocking=True)
    assert sum(gpu.waits.values()) == 1
