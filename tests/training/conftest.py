"""Small tasks and networks that every training test can afford."""

from __future__ import annotations

import pytest
from training_reference import Recipe


@pytest.fixture
def recipe() -> Recipe:
    """In float64."""
    return Recipe()
