"""The guards of a capture as assertions inside a graph, where no host can capture again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dit_cache_fx.capture.normal_form import Guards
from dit_cache_fx.capture.trace import read_count, read_list, read_shape, read_value
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.program import attributes_of, graph_module

_ATEN = torch.ops.aten


def assertions(guards: Guards) -> fx.GraphModule:
    """A graph of the call's tensors that raises where a guard reads another value.

    Before:

        %read = read_value(aten.item, (%count,), {})        # 3 at capture

    After:

        %holds = holds_value(aten.item, (%count,), {}, 3)
        %_ = aten._assert_async.msg(%holds, "...")
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    expected = iter(guards.expected)
    for node in guards.gm.graph.nodes:
        if node.op == "output":
            continue
        holds = _HOLDS.get(node.target)
        if holds is None:
            new[node] = graph.node_copy(node, new.__getitem__)
            continue
        value = next(expected)
        arguments = fx.map_arg(node.args, new.__getitem__)
        truth = graph.call_function(holds, (*arguments, value))
        text = f"the captured graph is for other data: it read {value!r} ({node.name})"
        graph.call_function(_ATEN._assert_async.msg, (truth, text))
    graph.output(())
    attributes = attributes_of(guards.gm, graph)
    return graph_module(guards.gm.get_submodule("model"), attributes, graph, "Assertions")


def holds_value(operator: Any, args: Any, kwargs: Any, expected: Any) -> torch.Tensor:
    """Whether an operator without a tensor as its result gives `expected`, as a tensor."""
    truth = _TRUTHS.get(operator)
    if truth is None:
        raise CaptureError(f"the value that {operator} reads cannot be checked inside a graph")
    holds: torch.Tensor = truth(*args, **kwargs) == expected
    return holds


def holds_list(tensor: torch.Tensor, expected: Any) -> torch.Tensor:
    """Whether a tensor has these values."""
    return (tensor == torch.tensor(expected, dtype=tensor.dtype, device=tensor.device)).all()


def holds_count(mask: torch.Tensor, expected: torch.Size) -> torch.Tensor:
    """Whether a mask selects as much."""
    return mask.count_nonzero() == expected[0]


def holds_shape(tensor: torch.Tensor, expected: torch.Size) -> torch.Tensor:
    """Sizes that depend on data are checked where they are used."""
    return torch.tensor(True)


_HOLDS: dict[Any, Callable[..., torch.Tensor]] = {
    read_value: holds_value,
    read_list: holds_list,
    read_count: holds_count,
    read_shape: holds_shape,
}

_TRUTHS: dict[Any, Callable[..., torch.Tensor]] = {
    _ATEN.item.default: lambda t: t.reshape([]),
    _ATEN._local_scalar_dense.default: lambda t: t.reshape([]),
    _ATEN.is_nonzero.default: lambda t: t.reshape([]) != 0,
    _ATEN.equal.default: lambda a, b: (a == b).all(),
    _ATEN.allclose.default: lambda a, b, *more, **named: torch.isclose(a, b, *more, **named).all(),
}
