"""What tests of captures share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from catapult_ext.ops import cuda


@pytest.fixture
def exact_and_empty() -> Any:
    """No TF32, and a status word that notes nothing from before."""
    found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cuda.status(torch.device("cuda", torch.cuda.current_device())).zero_()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found
