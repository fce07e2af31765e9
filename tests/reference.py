"""Reference implementation of the mechanism: slow, plain, and without code in common with the real one."""

import torch


def author_gradient(model: torch.nn.Module, samples: list) -> list[torch.Tensor]:
    """Return the gradient of the mean loss over one author's target tokens, by autograd on one unpadded sample at a time."""
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
    """Return the flat sum over authors of g_a * min(1, C / ||g_a||)."""
    was_training = model.training
    model.eval()
    total = 0
    for samples in authors:
        gradient = torch.cat([g.flatten() for g in author_gradient(model, samples)])
        total = total + gradient * min(1.0, clip_norm / gradient.norm().item())
    model.train(was_training)
    return total
