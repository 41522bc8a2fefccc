"""Conditions, one file a kind; see base.py."""

from autoregressive.models.conditions.base import CONDITIONS, Condition, ControlImage, register_condition

__all__ = ["CONDITIONS", "Condition", "ControlImage", "register_condition"]
