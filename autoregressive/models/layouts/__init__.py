"""Token layouts, one file a kind; see base.py."""

from autoregressive.models.layouts.base import (
    LAYOUTS,
    DecodeStep,
    Holds,
    Layout,
    Reader,
    Row,
    build_layout,
    register_layout,
)

__all__ = ["LAYOUTS", "DecodeStep", "Holds", "Layout", "Reader", "Row", "build_layout", "register_layout"]
