"""Tangent kernel, spectrum, loss split, critical learning rate and AGOP of a PyTorch model at every step."""

from __future__ import annotations

# _extension comes first: it loads torch, then the compiled module, or says what is wrong.
from catapult_ext import _extension, data, models, ops  # noqa: F401
from catapult_ext._version import __version__
from catapult_ext.build import build_info
from catapult_ext.errors import NonFinite, UnsupportedModule

__all__ = ["NonFinite", "UnsupportedModule", "__version__", "build_info", "data", "models", "ops"]
