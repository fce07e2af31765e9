"""The mechanism once more, as slowly and plainly as possible: the judge of the real one. Shares no code with it."""

import torch


def author_gradient(model: torch.nn.Module, samples: list) -> list[torch.Tensor]:
    """Gradient of the mean loss over one author's target tokens, one sample at a time, unpadded, by plain autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    targets = sum(len(sample) - 1 for sample in samples)
    total = [torch.zeros_like(p) for p in parameters]
    for sample in samples:
        ids = torch.as_tensor(sample, dtype=torch.int64)
        log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
        loss = -log_probabilities.gather(1, ids[1:, None]).sum() / targets
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters)):
            sum_ += gradient
    return total


def clipped_sum(model: torch.nn.Module, authors: list[list], clip_norm: float) -> torch.Tensor:
    """Flat sum over authors of g_a * min(1, C / ||g_a||)."""
    was_training = model.training
    model.eval()
    total = 0
    for samples in authors:
        gradient = torch.cat([g.flatten() for g in author_gradient(model, samples)])
        total = total + gradient * min(1.0, clip_norm / gradient.norm().item())
    model.train(was_training)
    return total
