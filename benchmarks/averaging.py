"""Whether an average of the weights is better than the last ones: free of privacy cost (post-processing), but is it of use?

    python benchmarks/averaging.py --model_name demo/model ... --output_dir FOLDER      # the options of fine-tune-dp.py

One run of the script; at its end the evaluation loss of the last weights, of exponential moving averages (decay d, and
(1 + t) / (10 + t) in the first steps t, where that is less), and of uniform averages over the last steps.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dp_utils import DPTrainer  # noqa: E402

DECAYS = (0.8, 0.9, 0.95, 0.98, 0.99)
LAST = (0.1, 0.25, 0.5)  # shares of the steps


class Averages(TrainerCallback):
    """Average the trained weights after each step."""

    def __init__(self, model: torch.nn.Module):
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept: dict[str, list[torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        step, steps = state.global_step, state.max_steps
        for decay in DECAYS:
            self.add(f"moving, {decay}", 1 - min(decay, (1 + step) / (10 + step)))
        for share in LAST:
            before = steps - max(1, int(steps * share))
            if step > before:
                self.add(f"last {share:.0%} of the steps", 1 / (step - before))

    def add(self, name: str, share: float) -> None:
        kept = self.kept.setdefault(name, [weight.detach().clone() for weight in self.weights])
        for average, weight in zip(kept, self.weights):
            average.lerp_(weight.detach(), share)

    def load(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values):
            weight.data.copy_(value)


class AveragingTrainer(DPTrainer):
    def train(self, *args, **kwargs):
        averages = Averages(self.model)
        self.add_callback(averages)
        result = super().train(*args, **kwargs)
        last = [weight.detach().clone() for weight in averages.weights]
        print("\n| weights | evaluation loss |\n|---|---|")
        for name, values in {"the last": last, **averages.kept}.items():
            averages.load(values)
            print(f"| {name} | {self.evaluate()['eval_loss']:.3f} |", flush=True)
        averages.load(last)
        return result


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("script", ROOT / "fine-tune-dp.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["script"] = script  # dataclasses look themselves up there
    spec.loader.exec_module(script)
    script.DPTrainer = AveragingTrainer
    script.main()
