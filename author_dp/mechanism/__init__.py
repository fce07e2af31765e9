"""The differentially private step: sampling, losses, noise and the optimizer."""

from author_dp.mechanism.losses import author_losses

__all__ = ["author_losses"]
