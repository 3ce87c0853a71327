"""Guards of a capture as assertions inside a graph, for programs that cannot capture again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx.capture.data_guards import READS, read_count, read_list, read_value
from dit_cache_fx.capture.normal_form import Guards
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.copying import copy_nodes
from dit_cache_fx.ir.graph_module import attributes_of
from dit_cache_fx.lowering.part import runnable

_ATEN = torch.ops.aten


def assertions(guards: Guards, accepted: Collection[tuple[torch.Size, ...]]) -> fx.GraphModule:
    """Build a graph of the call's tensors that raises if a guard reads another value.

    The sizes of masked selections may be any of those that the graph was checked with (`accepted`).

    Before:

        %read = read_value(aten.item, (%count,), {})        # 3 at capture
        %size = read_count(%mask)                           # 5 at capture, then 7

    After:

        %holds = holds_value(aten.item, (%count,), {}, 3)
        %_ = aten._assert_async.msg(%holds, "...")
        %counts = holds_counts((%mask,), [[5], [7]])
        %_ = aten._assert_async.msg(%counts, "...")
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    expected = iter(guards.expected)
    shapes: list[fx.Node] = []

    def assertion(node: fx.Node) -> fx.Node | None:
        """Replace a read by its assertion; no other node uses its result."""
        if node.target not in READS:
            return None
        value = next(expected)
        if isinstance(value, torch.Size):
            shapes.append(node)
            return node
        arguments = fx.map_arg(node.args, new.__getitem__)
        truth = graph.call_function(_HOLDS[node.target], (*arguments, value))
        return _assert(graph, truth, f"it read {value!r} ({node.name})")

    nodes = guards.gm.graph.nodes
    copy_nodes(graph, [n for n in nodes if n.op != "output"], new, assertion)
    _assert_counts(graph, shapes, new, accepted)
    graph.output(())
    attributes = attributes_of(guards.gm, graph)
    return runnable(guards.gm.get_submodule("model"), attributes, graph, "Assertions")


def _assert(graph: fx.Graph, truth: fx.Node, what: str) -> fx.Node:
    text = f"the captured graph is for other data: {what}"
    return graph.call_function(_ATEN._assert_async.msg, (truth, text))


def _assert_counts(
    graph: fx.Graph,
    shapes: Sequence[fx.Node],
    new: Mapping[fx.Node, fx.Node],
    accepted: Collection[tuple[torch.Size, ...]],
) -> None:
    """Assert the sizes of masked selections; other data-dependent sizes are checked in use."""
    places = [i for i, node in enumerate(shapes) if node.target is read_count]
    if not places:
        return
    masks = tuple(new[shapes[i].args[0]] for i in places)  # type: ignore[index]
    counts = sorted([sizes[i][0] for i in places] for sizes in accepted)
    truth = graph.call_function(holds_counts, (masks, counts))
    _assert(graph, truth, f"its masks selected {counts} rows")


def holds_value(operator: Any, args: Any, kwargs: Any, expected: Any) -> torch.Tensor:
    """Return, as a tensor, whether an operator without a tensor result gives `expected`."""
    truth = _TRUTHS.get(operator)
    if truth is None:
        raise CaptureError(f"the value that {operator} reads cannot be checked inside a graph")
    holds: torch.Tensor = truth(*args, **kwargs) == expected
    return holds


def holds_list(tensor: torch.Tensor, expected: Any) -> torch.Tensor:
    """Return whether a tensor has these values."""
    return (tensor == torch.tensor(expected, dtype=tensor.dtype, device=tensor.device)).all()


def holds_counts(masks: Sequence[torch.Tensor], accepted: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return whether the masks together select as many rows as in one of the accepted calls."""
    device = masks[0].device
    counts = torch.stack([mask.count_nonzero().to(device) for mask in masks])
    return (counts == torch.tensor(accepted, device=device)).all(dim=1).any()


_HOLDS: dict[Any, Callable[..., torch.Tensor]] = {
    read_value: holds_value,
    read_list: holds_list,
}

_TRUTHS: dict[Any, Callable[..., torch.Tensor]] = {
    _ATEN.item.default: lambda t: t.reshape([]),
    _ATEN._local_scalar_dense.default: lambda t: t.reshape([]),
    _ATEN.is_nonzero.default: lambda t: t.reshape([]) != 0,
    _ATEN.equal.default: lambda a, b: (a == b).all(),
    _ATEN.allclose.default: lambda a, b, *more, **named: torch.isclose(a, b, *more, **named).all(),
}
