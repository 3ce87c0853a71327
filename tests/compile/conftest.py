"""What every test of compiled models runs under."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep pytest's log handler off torch's traces: each of them prints whole graphs."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "addHandler", lambda _: None)


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    """Nothing is compiled yet, nothing counted; gradients are off."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
