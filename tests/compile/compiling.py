"""How the tests compile a cached model, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from tests.zoo import Case, flat

#: computed steps of a generation of six
STEPS = frozenset({0, 2, 3})
#: each strategy with a schedule, and TeaCache's own rule. The samples of two steps have nothing in
#: common, so that the threshold is crossed at every second or third step
SCHEDULED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepcache": ("deepcache", {"no_cache_steps": STEPS}),
    "teacache": ("teacache", {"no_cache_steps": STEPS}),
    "taylorcache": ("taylorcache", {"no_cache_steps": STEPS}),
}
RULE: tuple[str, dict[str, Any]] = ("teacache", {"rel_l1_thresh": 2.0, "signal": "input"})
STRATEGIES = SCHEDULED | {"rule": RULE}


class Counting:
    """A backend of `torch.compile` that keeps the graphs it is given."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner = inner
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return lookup_backend(self.inner)(gm, inputs)

    @property
    def count(self) -> int:
        return len(self.graphs)

    def calls(self, target: Any) -> int:
        """How often the newest graph, branches included, has a node of this target."""
        modules = [m for m in self.graphs[-1].modules() if isinstance(m, fx.GraphModule)]
        return sum(n.target is target for m in modules for n in m.graph.nodes)


def compiled(model: nn.Module, backend: Any, **options: Any) -> Any:
    """`torch.compile` in one graph."""
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def no_recompile() -> AbstractContextManager[None]:
    """Within it, whatever is compiled a second time raises."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def breaks() -> int:
    """Graph breaks so far."""
    return sum(counters["graph_break"].values())


def calls_of(case: Case, steps: int = 6, **options: Any) -> list[dict[str, Any]]:
    """The calls of one generation: another sample at each step."""
    return [case.inputs(t, seed=i, **options) for i, t in enumerate(case.timesteps(steps))]


def assert_same(
    got: Callable[..., Any], want: Callable[..., Any], calls: Iterable[Mapping[str, Any]]
) -> None:
    """Both give the same for each of the calls, bit by bit."""
    for index, inputs in enumerate(calls):
        a, b = flat(got(**inputs)), flat(want(**inputs))
        assert torch.equal(a, b), f"call {index}: {(a - b).abs().max()} of {b.abs().max()}"


@pytest.fixture(autouse=True)
def new_compiler() -> Iterator[None]:
    """Nothing is compiled yet, nothing counted; gradients are off."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
