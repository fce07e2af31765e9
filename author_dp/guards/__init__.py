"""Checks that refuse what would break the guarantee, before training and in every step."""

from author_dp.guards.options import check_model

__all__ = ["check_model"]
