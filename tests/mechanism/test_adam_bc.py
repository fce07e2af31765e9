"""Test that AdamBC subtracts the noise variance from AdamW's second moment, by itself and in runs."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from mutation import catches

from author_dp.accounting.banded_mf import toeplitz_coefficients
from author_dp.errors import UserError
from author_dp.mechanism.adam_bc import FLOOR, AdamBC
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise

OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


def start(sizes=((3, 2), (4,))) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def gradients(step: int, parameters) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(parameter.shape, generator=generator) for parameter in parameters]


def take_steps(optimizer, parameters, steps) -> None:
    for step, variance in steps:
        optimizer.noise_variance = variance
        for parameter, gradient in zip(parameters, gradients(step, parameters)):
            parameter.grad = gradient
        optimizer.step()


def reference(values: np.ndarray, all_gradients: list[np.ndarray], variances: list[float]) -> np.ndarray:
    """Apply Algorithm 1 of the paper with weight decay, in float64, all sums written out."""
    beta1, beta2 = OPTIONS["betas"]
    for t in range(1, len(variances) + 1):
        weights1, weights2 = (np.array([(1 - b) * b ** (t - s) for s in range(1, t + 1)]) / (1 - b**t) for b in (beta1, beta2))
        mean = sum(w * g for w, g in zip(weights1, all_gradients))
        square = sum(w * g**2 for w, g in zip(weights2, all_gradients))
        noise = sum(w * v for w, v in zip(weights2, variances))
        values = values * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        values = values - OPTIONS["lr"] * mean / (np.sqrt(np.maximum(square - noise, FLOOR * noise)) + OPTIONS["eps"])
    return values


@catches("Adam's mean of noise not that of the squares", "mechanism.adam_bc.AdamBC._update",
    'state["noise_variance"] += (1 - beta2)', 'state["noise_variance"] += (1 - beta1)')  # fmt: skip
def test_adam_bc_makes_the_updates_of_the_paper():
    variances = [0.3, 0.5, 0.5, 2.0, 0.1]
    ours = start()
    take_steps(AdamBC(torch.optim.AdamW(ours, **OPTIONS)), ours, enumerate(variances))
    for place, (first, last) in enumerate(zip(start(), ours)):
        seen = [gradients(step, ours)[place].numpy().astype(float) for step in range(len(variances))]
        assert np.allclose(reference(first.detach().numpy().astype(float), seen, variances), last.detach().numpy(), atol=1e-5)


def test_adam_bc_without_noise_is_adamw():
    """Also where groups of parameters have different options."""
    ours, theirs = start(), start()
    groups = [[{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 0.3}] for first, second in (ours, theirs)]
    plain = [torch.optim.AdamW(group, **OPTIONS) for group in groups]
    take_steps(AdamBC(plain[0]), ours, [(step, 0.0) for step in range(4)])
    take_steps(plain[1], theirs, [(step, 0.0) for step in range(4)])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs))


def test_adam_bc_divides_by_the_gradient_not_the_noise():
    """A gradient of 1 under noise of variance 4: plain Adam moves by 1 / sqrt(5) of the rate, this one by the rate."""
    moved = {}
    for name, variance in (("ours", 4.0), ("plain", 0.0)):
        parameter = torch.nn.Parameter(torch.zeros(2_000))
        optimizer = AdamBC(torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0))
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            before, optimizer.noise_variance = parameter.detach().mean().item(), variance
            parameter.grad = 1 + 2 * torch.randn(2_000, generator=generator)
            optimizer.step()
            moved.setdefault(name, []).append(before - parameter.detach().mean().item())
    late = {name: np.mean(values[200:]) / 0.01 for name, values in moved.items()}
    assert late["ours"] == pytest.approx(1, abs=0.1) and late["plain"] == pytest.approx(5**-0.5, abs=0.02)


def test_adam_bc_and_adamw_continue_from_each_other():
    ours = start()
    take_steps(AdamBC(torch.optim.AdamW(ours, **OPTIONS)), ours, [(step, 0.5) for step in range(5)])
    for half in (torch.optim.AdamW, lambda p, **options: AdamBC(torch.optim.AdamW(p, **options))):
        parameters = start()
        first = half(parameters, **OPTIONS)
        take_steps(first, parameters, [(step, 0.0 if half is torch.optim.AdamW else 0.5) for step in range(3)])
        state = copy.deepcopy(first.state_dict())
        if half is torch.optim.AdamW:  # the mean of squares is the same in both
            second = AdamBC(torch.optim.AdamW(parameters, **OPTIONS))
            second.load_state_dict(state)
            take_steps(second, parameters, [(3, 0.5)])
            kept = second.state[parameters[0]]["noise_variance"]
            assert kept == pytest.approx(0.5 * (1 - OPTIONS["betas"][1] ** 4))
        else:
            second = AdamBC(torch.optim.AdamW(parameters, **OPTIONS))
            second.load_state_dict(state)
            take_steps(second, parameters, [(step, 0.5) for step in (3, 4)])
            assert all(torch.equal(one, other) for one, other in zip(ours, parameters))
            plain = torch.optim.AdamW(parameters, **OPTIONS)
            plain.load_state_dict(second.state_dict())
            take_steps(plain, parameters, [(5, 0.0)])


def test_band_mf_noise_reports_the_variance_of_each_step():
    c = toeplitz_coefficients(4, 12)
    matrix = sum(np.diag(np.full(12 - lag, value), -lag) for lag, value in enumerate(c))
    noise, source, variances = BandMFNoise(c, 8, torch.device("cpu")), GaussianNoise(torch.device("cpu")), []
    for _ in range(12):
        noise.add_(torch.zeros(8), source, 1.0)
        variances.append(noise.variance)
    inverse = np.linalg.inv(matrix)
    assert np.allclose(variances, np.diag(inverse @ inverse.T))


# --- in a run -------------------------------------------------------------------------------------------


@catches("Adam corrected as if noise had no bands", "mechanism.optimizer.AuthorDPOptimizer.noise_variance",
    "1.0 if self.band_noise is None else self.band_noise.variance", "1.0", bands="4")  # fmt: skip
@catches("Adam corrected by noise that was not divided", "mechanism.optimizer.AuthorDPOptimizer.noise_variance",
    " / self.expected_batch_size", "", bands="1")  # fmt: skip
@pytest.mark.parametrize("bands", ["1", "4"])
def test_trainer_sets_the_variance_that_it_releases(tmp_path, bands):
    """In an empty batch the mean square of what is released is the noise variance."""
    privacy = {
        "noise_multiplier": 5.0,
        "noise_bands": bands,
        "adam_noise_correction": True,
        "sample_rate": 0.01,
        "target_delta": 1e-5,
    }
    trainer = make_trainer(tmp_path, privacy=privacy, optim="adamw_torch", learning_rate=0.0, max_steps=8)
    seen = []
    step = AdamBC.step
    AdamBC.step = lambda self, *_: (seen.append(mean_square(self)), step(self))[1]  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        AdamBC.step = step  # type: ignore[method-assign]
    assert len(seen) == 8 and all(found == pytest.approx(variance, rel=0.1) for found, variance in seen)


def mean_square(optimizer) -> tuple[float, float]:
    flat = torch.cat([parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]])
    return float(flat.square().mean()), optimizer.noise_variance


def uses_adam_bc(path, **options) -> bool:
    privacy = options.pop("privacy", {})
    trainer = make_trainer(
        path,
        privacy={"noise_multiplier": 1.0, "sample_rate": 0.3, **privacy},
        **{"optim": "adamw_torch", "max_steps": 4, **options},
    )
    trainer.create_optimizer()
    return isinstance(trainer.dp_optimizer.original_optimizer, AdamBC)


@pytest.mark.integration
def test_trainer_uses_adam_bc_with_bands_or_by_option(tmp_path):
    bands = {"noise_bands": "2"}
    assert uses_adam_bc(tmp_path, privacy=bands) and uses_adam_bc(tmp_path, privacy=bands, optim="adamw_torch_fused")
    assert not uses_adam_bc(tmp_path) and not uses_adam_bc(tmp_path, privacy={**bands, "adam_noise_correction": False})
    assert uses_adam_bc(tmp_path, privacy={"adam_noise_correction": True}) and not uses_adam_bc(
        tmp_path, privacy=bands, optim="sgd"
    )
    with pytest.raises(UserError, match=r"--adam_noise_correction: it needs AdamW, not --optim sgd\. Use --optim adamw_torch"):
        uses_adam_bc(tmp_path, privacy={"adam_noise_correction": True}, optim="sgd")


@pytest.mark.integration
def test_trainer_resumes_with_adam_bc(tmp_path):
    options = {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    privacy = {"noise_multiplier": 1.0, "noise_bands": "2", "sample_rate": 0.3}
    make_trainer(tmp_path, privacy=privacy, **options).train()
    resumed = make_trainer(tmp_path, privacy=privacy, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **options)
    resumed.train()
    states = resumed.dp_optimizer.original_optimizer.state.values()
    assert all(float(state["step"]) == 4 and state["noise_variance"] > 0 for state in states)


@catches("another optimizer replaced by AdamBC", "mechanism.adam_bc.is_plain_adamw",
    "type(optimizer) is torch.optim.AdamW", "True", kind=torch.optim.SGD, options={})  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.AdamW, {"maximize": True})]
)
def test_an_optimizer_that_was_given_is_kept(tmp_path, kind, options):
    for asked in (None, True):
        model, privacy = tiny_gpt2(), {"noise_bands": "2", "adam_noise_correction": asked}
        trainer = make_trainer(
            tmp_path / str(asked), model, make_dataset([1] * 40), privacy=privacy, optim="adamw_torch", max_steps=2
        )
        trainer.optimizer = given = kind(model.parameters(), lr=0.1, **options)
        if asked:
            with pytest.raises(UserError, match=f"adam_noise_correction: it needs AdamW, not .*optim {kind.__name__}"):
                trainer.train()
            continue
        trainer.train()
        assert trainer.dp_optimizer.original_optimizer is given
