"""Refuse what would break the guarantee, before training and at every step."""

from author_dp.guards.model_check import check_model

__all__ = ["check_model"]
