"""What every test runs under."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

#: pytest listens at each logger that does not propagate, and torch writes every graph out as text
#: for its trace as soon as somebody listens
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported by now: it took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Forwards of a few milliseconds only lose by waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """A test that draws numbers draws the same ones whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For the files that call models as samplers do: `pytestmark = usefixtures("no_grad")`."""
    with torch.no_grad():
        yield


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs whose code is generated during the test."""
    graphs: list[fx.Graph] = []
    generate = fx.Graph.python_code

    def noted(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        graphs.append(graph)
        return generate(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", noted)
    return graphs
