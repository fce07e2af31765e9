"""Train like fine-tune-dp.py, in a way that the library does not have. bake_off.py compares them.

    python benchmarks/variants.py VARIANT [options of fine-tune-dp.py]

A variant keeps the guarantee: it trains fewer parameters, changes learning rates, or scales gradients by what was released
before they are clipped. It has none of the library's checks of its own, so use it for comparisons only.
"""

import importlib.util
import sys
from typing import Any

import torch
from common import ROOT

from author_dp import cli
from author_dp.clipping import ENGINES
from author_dp.clipping.grad_sample import GradSampleClipping
from author_dp.data.storage import cleanup_temp_dirs
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.training import setup

B_RATE_FACTOR = 4


def load_script() -> Any:
    """Return fine-tune-dp.py as a module."""
    spec = importlib.util.spec_from_file_location("fine_tune_dp", ROOT / "fine-tune-dp.py")
    script = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[spec.name] = script  # type: ignore[union-attr]
    spec.loader.exec_module(script)  # type: ignore[union-attr]
    return script


def freeze_a(script: Any) -> None:
    """FFA-LoRA (Sun et al. 2024, arXiv 2403.12313, section 4): A stays as it was drawn, and B alone is trained."""
    load_model = script.load_model

    def load_frozen(*args: Any) -> tuple[Any, Any]:
        model, tokenizer = load_model(*args)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return model, tokenizer

    script.load_model = load_frozen


def raise_rate_of_b(script: Any) -> None:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B's learning rate is B_RATE_FACTOR times A's."""

    class Trainer(script.DPTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = super().create_optimizer(*args, **kwargs)
            of_b = {parameter for name, parameter in self.model.named_parameters() if "lora_B" in name}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if parameter in of_b]
                group["params"] = [parameter for parameter in group["params"] if parameter not in of_b]
                optimizer.param_groups.append({**group, "params": moved, "lr": B_RATE_FACTOR * group["lr"]})
            return optimizer

    script.DPTrainer = Trainer


class ScaledClipping(GradSampleClipping):
    """Clip the gradients of authors times `parameter.scale`, where there is one."""

    def _per_sample(self, name: str, parameter: Any, samples: int) -> torch.Tensor:
        return super()._per_sample(name, parameter, samples) * getattr(parameter, "scale", 1.0)


class ScaledOptimizer(AuthorDPOptimizer):
    """Divide what is released by the scale with which it was clipped, and set the scale for the next step.

    The scale of a coordinate is 1 / (sqrt(v) + the noise of a step), with Adam's v, which released gradients made; its root mean
    square over all coordinates is 1. The noise of a step keeps a small v, by chance, from becoming a huge scale.
    """

    def set_gradients(self) -> None:
        super().set_gradients()
        for parameter in self.params:
            parameter.grad.div_(getattr(parameter, "scale", 1.0))

    def step(self, closure: Any = None) -> Any:
        result, noise = super().step(closure), self.noise_variance() ** 0.5
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                square = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                parameter.scale = 1 / (square.sqrt() + noise)
        mean = sum(float(p.scale.square().sum()) for p in self.params) / sum(p.numel() for p in self.params)
        for parameter in self.params:
            parameter.scale /= mean**0.5
        return result


def scale_then_privatize(script: Any) -> None:
    """Ganesh, McMahan and Thakurta 2025, arXiv 2507.01129; give --clipping grad_sample --adam_noise_correction False."""
    ENGINES["grad_sample"] = ScaledClipping
    setup.AuthorDPOptimizer = ScaledOptimizer  # type: ignore[misc]


VARIANTS = {"freeze_a": freeze_a, "raise_rate_of_b": raise_rate_of_b, "scale_then_privatize": scale_then_privatize}


if __name__ == "__main__":
    script = load_script()
    VARIANTS[sys.argv.pop(1)](script)
    cli.run(script.main, "benchmarks/variants.py", cleanup_temp_dirs)
