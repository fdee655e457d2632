"""The kernels run on a device where there is one, else in Triton's interpreter on CPU tensors: the same tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _mended(interpreted_bf16: None) -> None:
    """Every test here multiplies bfloat16 rightly."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
