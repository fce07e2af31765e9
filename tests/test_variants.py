"""benchmarks/variants.py: what each variant trains, at which rate, and that the guarantee of a step stays."""

import sys
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import ROOT, flat, make_batch, make_dataset, make_trainer, tiny_gpt2, trainable

sys.path.append(str(ROOT / "benchmarks"))

import variants

from author_dp.clipping import ENGINES
from author_dp.mechanism.losses import author_losses
from author_dp.training import setup


def test_freeze_a_leaves_b_to_train():
    script = SimpleNamespace(load_model=lambda *_: (tiny_gpt2(lora=True), None))
    variants.freeze_a(script)
    names = trainable(script.load_model("gpt2")[0])
    assert names and all("lora_B" in name for name in names)


def test_raise_rate_of_b_moves_b_to_groups_of_its_own(tmp_path, monkeypatch):
    script = SimpleNamespace(DPTrainer=conftest.DPTrainer)
    variants.raise_rate_of_b(script)
    monkeypatch.setattr(conftest, "DPTrainer", script.DPTrainer)
    model = tiny_gpt2(lora=True)
    trainer = make_trainer(tmp_path, model, optim="adamw_torch", learning_rate=0.01)
    rates = {parameter: group["lr"] for group in trainer.create_optimizer().param_groups for parameter in group["params"]}
    expected = {parameter: 0.04 if "lora_B" in name else 0.01 for name, parameter in trainable(model).items()}
    assert rates == expected
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    trainer.train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainable(model).items())


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_scaled_clipping_bounds_each_author_after_scaling(clip_norm):
    model = tiny_gpt2(lora=True)
    plain, scales = tiny_gpt2(lora=True), {name: torch.rand_like(p) + 0.1 for name, p in trainable(model).items()}
    batch = make_batch([2])
    for one, engine_class in ((model, variants.ScaledClipping), (plain, ENGINES["grad_sample"])):
        for name, parameter in trainable(one).items():
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
            if one is model:
                parameter.scale = scales[name]
        engine = engine_class(one, clip_norm if one is model else 1e9)
        engine.backward(author_losses(engine.module.train(), batch), batch["author"])
    scaled = flat(parameter.summed_grad for parameter in trainable(model).values())
    unclipped = flat(parameter.summed_grad * scales[name] for name, parameter in trainable(plain).items())
    assert torch.allclose(scaled, unclipped * min(1.0, clip_norm / float(unclipped.norm())), rtol=1e-4)
    assert float(scaled.norm()) <= clip_norm * (1 + 1e-5)


def test_scaled_optimizer_undoes_the_scale_and_sets_the_next(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "grad_sample", ENGINES["grad_sample"])
    monkeypatch.setattr(setup, "AuthorDPOptimizer", setup.AuthorDPOptimizer)
    variants.scale_then_privatize(SimpleNamespace())
    used, scales, set_gradients = [], [], variants.ScaledOptimizer.set_gradients

    def keep(self) -> None:
        scales.append(flat(getattr(parameter, "scale", torch.ones_like(parameter)) for parameter in self.params))
        set_gradients(self)
        used.append(flat(parameter.grad for parameter in self.params))

    monkeypatch.setattr(variants.ScaledOptimizer, "set_gradients", keep)
    # Everybody with all texts in each step, hardly any noise, and weights that stay: both steps have one gradient.
    privacy = {"clipping": "grad_sample", "noise_multiplier": 1e-6, "per_sample_max_grad_norm": 10.0}
    options = {"optim": "adamw_torch", "learning_rate": 1e-12, "max_steps": 2, "per_device_train_batch_size": 6}
    make_trainer(tmp_path, tiny_gpt2(lora=True), make_dataset([1] * 6), privacy=privacy, **options).train()
    noise = 1e-6 * 10.0 / 6 * (1 / scales[1] + 1)  # of the second step, and of the first one
    assert bool(((used[0] - used[1]).abs() < 7 * noise).all())
    assert float((used[0] / noise).abs().max()) > 20  # so the comparison above says something; 80 to 123 in 13 runs
    assert float(scales[0].std()) == 0 < float(scales[1].std())
    assert float(scales[1].square().mean()) == pytest.approx(1, rel=1e-4)
