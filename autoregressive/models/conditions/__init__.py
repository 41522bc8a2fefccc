"""Conditions, one file a kind; see base.py."""

from autoregressive.models.conditions import caption, label  # noqa: F401 - these register themselves
from autoregressive.models.conditions.base import CONDITIONS, Condition, register_condition

__all__ = ["CONDITIONS", "Condition", "register_condition"]
