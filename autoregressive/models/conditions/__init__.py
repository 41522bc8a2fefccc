"""Conditions, one file a kind; see base.py."""

from autoregressive.models.conditions import caption, control, label  # noqa: F401 - these register themselves
from autoregressive.models.conditions.base import CONDITIONS, Condition, register_condition
from autoregressive.models.conditions.control import ControlImage

__all__ = ["CONDITIONS", "Condition", "ControlImage", "register_condition"]
