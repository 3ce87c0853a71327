"""Where a test runs: on the CPU, and marked `gpu` on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def on(device: str, inputs: Any) -> Any:
    """The tensors of a call on a device."""
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)
