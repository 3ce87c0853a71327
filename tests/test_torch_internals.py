"""`dit_cache_fx/_torch.py` is the one place that reaches into torch: this says when torch moves."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dit_cache_fx
from dit_cache_fx._torch import (
    Emitter,
    emit_node,
    opaque,
    trace_functional,
    trace_shapes,
    trace_text,
)
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.specs import TensorSpec

PACKAGE = Path(dit_cache_fx.__file__).parent


def double(tensor: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a node's target, never run")


class Doubling:
    """An opaque call that doubles a tensor."""

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensors[0] * 2]

    def emit(self, graph: Emitter, inputs: Sequence[Any]) -> Sequence[Any]:
        return [graph.call(double, tuple(inputs), {}, "double")]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_opaque_call_is_one_node_under_make_fx_and_functionalize(mode: Any) -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        (y,) = opaque(Doubling(), [x + 1])
        y += 1
        return [y]

    x = torch.ones(3)
    with mode():
        gm = trace_functional(function, [x])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.add.Tensor, double, torch.ops.aten.add.Tensor]


def test_opaque_call_runs_outside_of_tracing() -> None:
    assert torch.equal(opaque(Doubling(), [torch.ones(2)])[0], torch.full((2,), 2.0))
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(opaque(Doubling(), [x])[0], torch.full((2,), 2.0))


def test_functional_trace_has_no_in_place_operators() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone()
        y[:, 1:] += 1
        return [y.relu_()]

    gm = trace_functional(function, [torch.ones(2, 3)])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if t._schema.is_mutable]
    assert torch.equal(gm(torch.ones(2, 3))[0], torch.tensor([[1.0, 2, 2], [1, 2, 2]]))


class Reads(TorchDispatchMode):
    """Adds a node beside every addition."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:
            assert emit_node(read, (args[0],), {}, "read")
        return func(*args, **(kwargs or {}))


@fx.has_side_effect
def read(tensor: torch.Tensor) -> None:
    raise AssertionError("a node's target, never run")


def test_emit_node_adds_a_reader_of_traced_values_only() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        with Reads():
            return [x + 1]

    gm = trace_functional(function, [torch.ones(2)])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [read, torch.ops.aten.add.Tensor]
    assert not emit_node(read, (torch.ones(2),), {}, "read")


def test_trace_shapes_needs_no_data() -> None:
    spec = TensorSpec(torch.Size([10**6, 10**6]), torch.float32, torch.device("cpu"))
    graph = trace_shapes(lambda x: [x * 2], [spec]).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor]


def test_module_calls_pass_through_module_call() -> None:
    layer, seen = nn.Linear(2, 2), []

    def handle(module: nn.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        seen.append(name)
        return call(module, *args, **kwargs)

    original = nn.Module.__call__
    with intercepted({layer: "layer"}, handle):
        nn.Sequential(layer)(torch.ones(1, 2))
    assert seen == ["layer"]
    assert nn.Module.__call__ is original


def test_module_call_is_restored_after_an_error() -> None:
    original = nn.Module.__call__
    with pytest.raises(ZeroDivisionError), intercepted({}, lambda *_: None):
        raise ZeroDivisionError
    assert nn.Module.__call__ is original


class Listener(logging.Handler):
    """Keeps what torch's structured trace is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_trace_text_is_an_artifact_of_the_structured_trace() -> None:
    listener, trace_log = Listener(), logging.getLogger("torch.__trace")
    trace_log.addHandler(listener)
    try:
        trace_text("a_graph", lambda: "a text")
    finally:
        trace_log.removeHandler(listener)
    (record,) = listener.records
    assert record.metadata["artifact"] == {"name": "a_graph", "encoding": "string"}
    assert record.payload == "a text"


def test_trace_text_makes_no_text_where_nobody_listens() -> None:
    trace_text("a_graph", lambda: "a text")  # torch's own handler takes itself away
    trace_text("a_graph", lambda: pytest.fail("called"))


def test_no_other_file_imports_private_torch_modules() -> None:
    private = re.compile(
        r"^\s*(from torch\.(_\w+|fx\.experimental|utils\._pytree)|import torch\._)", re.M
    )
    allowed = {PACKAGE / "_torch.py"}
    found = [p.name for p in PACKAGE.rglob("*.py") if private.search(p.read_text())]
    assert found == [p.name for p in allowed]
