"""Trace a strategy's functions; name the function in every error.

The graph is made once, without data, and runs on every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dit_cache_fx._torch import reads_data, trace_shapes
from dit_cache_fx.errors import DitCacheError, VerifyError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.values.identity import version
from dit_cache_fx.values.tensor_spec import TensorSpec

_BRANCH = (
    "reads a value from a tensor (a Python branch on clock or on a tensor, float(), .item()). "
    "Its graph is made once and runs on every step: use torch.where, or arithmetic on tensors"
)

Results = Sequence[torch.Tensor]


def traced(
    strategy: Strategy,
    function: str,
    body: Callable[..., Results],
    given: Mapping[str, TensorSpec],
) -> fx.GraphModule:
    """Return the graph of a strategy's function. `body` calls it with tensors as in `given`.

    Raises `VerifyError` if it reads values, changes its arguments, or fails.
    """

    def watched(*tensors: torch.Tensor) -> Results:
        with unchanged(strategy, function, dict(zip(given, tensors, strict=True))):
            return body(*tensors)

    try:
        gm = trace_shapes(watched, list(given.values()))
        if any(map(_mutates, gm.graph.nodes)):  # of its own tensors
            gm = trace_shapes(torch.func.functionalize(body), list(given.values()))
    except DitCacheError:
        raise
    except reads_data() as error:
        raise refused(strategy, function, _BRANCH) from error
    except Exception as error:
        told = ", ".join(f"{name}: {spec}" for name, spec in given.items())
        what = f"raises {type(error).__name__}: {error}. Its arguments were {told}"
        raise refused(strategy, function, what) from error
    return gm


class unchanged:
    """Raises `VerifyError` at the end if code inside changes the tensors in place."""

    def __init__(
        self, strategy: Strategy, function: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._who = strategy, function
        self._tensors = tensors
        self._versions = {name: version(t) for name, t in tensors.items()}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        changed = [n for n, t in self._tensors.items() if version(t) != self._versions[n]]
        if kind is None and changed:
            what = (
                f"changes {changed[0]} in place; return a new tensor instead (x + 1, not x.add_(1))"
            )
            raise refused(*self._who, what)


def agree(
    strategy: Strategy,
    function: str,
    results: Any,
    right: Sequence[TensorSpec],
    why: str,
) -> None:
    """Raise `VerifyError`, with `why`, if results are not tensors of the `right` specs."""
    if not isinstance(results, (list, tuple)):
        raise refused(strategy, function, f"gave {_named(results)}; expected {why}")
    if len(results) != len(right):
        raise refused(
            strategy, function, f"gave {len(results)} tensors, {len(right)} expected: {why}"
        )
    for place, (result, spec) in enumerate(zip(results, right, strict=True)):
        if not isinstance(result, torch.Tensor) or TensorSpec.of(result) != spec:
            number = f" as tensor {place}" if len(right) > 1 else ""
            what = f"gave {_named(result)}{number}; expected {spec}: {why}"
            raise refused(strategy, function, what)


def refused(strategy: Strategy, function: str, what: str) -> VerifyError:
    """Return the error for a function of a strategy that does `what`."""
    return VerifyError(f"strategy {type(strategy).__name__}: {function} {what}")


def _named(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return str(TensorSpec.of(result))
    return f"{type(result).__name__} {result!r}"[:80]


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
