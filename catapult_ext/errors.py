"""Errors beyond ValueError and TypeError that the package raises."""

from __future__ import annotations

__all__ = ["NonFinite", "UnsupportedModule"]


class NonFinite(ArithmeticError):
    """A NaN or an infinity came up. The trainer turns it into the result "diverged"."""


class UnsupportedModule(ValueError):
    """The model cannot be observed exactly; the message says why and what to do."""
