"""Masked selections that a reused step or a rule needs: no size in a graph depends on data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.compile.compiling import STEPS, Counting, assert_same, breaks, no_recompile
from tests.compile.test_apart import TiedBlock
from tests.runtime.batch.serving import Serving
from tests.toys import DIM, TOY, ToyDiT, actions, make, new, toy_inputs
from tests.zoo.case import Case


def selected(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[m] for row, m in zip(rows, mask, strict=True)])


class ForAllDiT(ToyDiT):
    """The blocks and the layers behind them read the selected text."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        c = self.condition(timestep, selected(text, mask))
        return self.head(self.trunk(self.embed(x), c) * (1 + c[:, None]))


class BehindDiT(ToyDiT):
    """Only the layers behind the blocks read the selected text."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        text = self.text_in(selected(text, mask)).mean(dim=1, keepdim=True)
        return self.head(self.trunk(self.embed(x), self.time(timestep)) + text)


class BeforeDiT(ToyDiT):
    """The first block's input depends on the selected text, and so does a rule's signal."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        text = self.text_in(selected(text, mask)).mean(dim=1, keepdim=True)
        return self.head(self.trunk(self.embed(x) + text, self.time(timestep)) + text)


class OfBlocksDiT(ToyDiT):
    """The mask selects tokens of the last block's result."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        h = self.trunk(self.embed(x), self.condition(timestep, text))
        keep = torch.cat([mask, mask], dim=1)[:, : h.shape[1]]
        out = torch.zeros_like(h)
        out[keep] = h[keep]
        return self.head(out + selected(h, keep).mean(dim=1, keepdim=True))


class HalvesDiT(ToyDiT):
    """The mask selects of one half of the text's embedding; the blocks read the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.text_in = new(nn.Linear, DIM, 2 * DIM)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        first, second = self.text_in(text).chunk(2, dim=-1)
        x = self.embed(x) + second.mean(dim=1, keepdim=True)
        h = self.trunk(x, self.time(timestep))
        return self.head(h + selected(first, mask).mean(dim=1, keepdim=True))


SCHEDULE = ("taylorcache", {"no_cache_steps": STEPS})
RULE = ("teacache", {"rel_l1_thresh": 2.0, "signal": "input"})
FIRST_BLOCK = ("firstblockcache", {"threshold": 2.0, "max_reused_in_a_row": 2})


def in_steps(cached: CachedModel, backend: Any, **options: Any) -> Callable[..., Any]:
    cached.compile_steps(backend=backend, **options)
    return cached


def in_one(cached: CachedModel, backend: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(cached, backend=backend, **options)


WAYS = {"compile_steps": in_steps, "compile": in_one}


def calls(prompt: int, valid: int) -> list[dict[str, Any]]:
    """A generation of six steps with so many valid tokens."""
    mask = (torch.arange(4)[None] < valid).expand(2, 4)
    return [
        toy_inputs(1000.0 - 100 * step, seed=step, prompt=prompt, batch=2) | {"mask": mask}
        for step in range(6)
    ]


def graphs_after(
    kind: type[ToyDiT],
    strategy: tuple[str, dict[str, Any]],
    way: str,
    lengths: Sequence[int],
    backend: Counting,
    **options: Any,
) -> list[int]:
    """The number of graphs after each generation, each equal to the eager cached model."""
    name, given = strategy
    model = make(kind)
    eager, cached = (dit_cache_fx.apply(model, name, **given) for _ in range(2))
    run = WAYS[way](cached, backend, **options)
    counts = []
    for prompt, valid in enumerate(lengths):
        assert_same(run, eager, calls(prompt, valid))
        assert actions(cached) == actions(eager)
        assert {*actions(cached)} == {"C", "r"}
        counts.append(backend.count)
    assert breaks() == 0
    return counts


#: graphs of compile_steps, and of torch.compile (a rule that runs blocks has a graph of its own)
EXPECTED = {
    (ForAllDiT, "schedule"): (2, 1),
    (ForAllDiT, "rule"): (3, 1),
    (ForAllDiT, "first block"): (3, 2),
    (BehindDiT, "schedule"): (2, 1),
    (BeforeDiT, "rule"): (2, 1),  # all that the rule needs runs before its graph
    (BeforeDiT, "first block"): (3, 2),
    (OfBlocksDiT, "schedule"): (2, 1),
    (HalvesDiT, "schedule"): (2, 1),
}
STRATEGIES = {"schedule": SCHEDULE, "rule": RULE, "first block": FIRST_BLOCK}


@pytest.mark.parametrize(("way", "fullgraph"), [("compile_steps", True), ("compile", False)])
@pytest.mark.parametrize(("kind", "strategy"), [*EXPECTED])
def test_each_graph_is_compiled_once(
    kind: type[ToyDiT], strategy: str, way: str, fullgraph: bool
) -> None:
    backend = Counting()
    with no_recompile():
        counts = graphs_after(kind, STRATEGIES[strategy], way, (3, 3), backend, fullgraph=fullgraph)
    want = EXPECTED[kind, strategy][[*WAYS].index(way)]
    assert counts == [want, want]
    assert not [target for target in targets(backend) if "nonzero" in target]


@pytest.mark.parametrize(("way", "fullgraph"), [("compile_steps", False), ("compile", True)])
@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_with_and_without_fullgraph_the_graphs_are_the_same(
    strategy: str, way: str, fullgraph: bool
) -> None:
    counts = graphs_after(
        ForAllDiT, STRATEGIES[strategy], way, (3,), Counting(), fullgraph=fullgraph
    )
    assert counts == [EXPECTED[ForAllDiT, strategy][[*WAYS].index(way)]]


@pytest.mark.parametrize("way", [*WAYS])
@pytest.mark.parametrize("kind", [ForAllDiT, OfBlocksDiT])
def test_another_number_of_selected_rows(kind: type[ToyDiT], way: str) -> None:
    """Graphs that read them in full are compiled once more, with this size left open."""
    first = 1 if way == "compile" else 2
    then = 2 * first if kind is OfBlocksDiT else first
    assert graphs_after(kind, SCHEDULE, way, (3, 2, 4), Counting()) == [first, then, then]


@pytest.mark.parametrize("way", [*WAYS])
def test_after_aot_autograd(way: str) -> None:
    want = EXPECTED[ForAllDiT, "rule"][[*WAYS].index(way)]
    counts = graphs_after(ForAllDiT, RULE, way, (3, 2), Counting("aot_eager"), fullgraph=True)
    assert counts == [want, want]


def targets(backend: Counting) -> list[str]:
    """What the nodes of all graphs call, branches included."""
    modules = [m for gm in backend.graphs for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [str(node.target) for gm in modules for node in gm.graph.nodes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning:torch")
@pytest.mark.parametrize("way", ["compile_steps"])
def test_inductor(way: str) -> None:
    model = make(ForAllDiT)
    eager, cached = (dit_cache_fx.apply(model, "teacache", no_cache_steps=STEPS) for _ in range(2))
    run = WAYS[way](cached, "inductor", fullgraph=True)
    for prompt, valid in enumerate((3, 3, 2)):
        for inputs in calls(prompt, valid):
            torch.testing.assert_close(run(**inputs), eager(**inputs), rtol=1e-4, atol=1e-4)
        assert actions(cached) == actions(eager)
    assert breaks() == 0


# --- which part runs when -------------------------------------------------------------------------


class Counted(nn.Linear):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)
        self.calls: list[int] = []

    def forward(self, given: Tensor) -> Tensor:
        self.calls.append(given.shape[1])
        return super().forward(given)


class RefinedDiT(ToyDiT):
    """The blocks read the refined text; the layers behind them read the text itself."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner, self.caption = Counted(), Counted()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        text = selected(text, mask)
        c = self.time(timestep) + self.refiner(text).mean(dim=1)
        h = self.trunk(self.embed(x), c)
        return self.head(h + self.caption(text).mean(dim=1, keepdim=True))


@pytest.mark.parametrize("way", [*WAYS])
def test_a_reused_step_does_not_run_what_only_computed_steps_read(way: str) -> None:
    model = make(RefinedDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 3})
    run = WAYS[way](cached, "eager", fullgraph=True)
    for inputs in calls(0, 3):
        run(**inputs)
    refiner: Any = model.refiner
    caption: Any = model.caption
    refiner.calls.clear()
    caption.calls.clear()
    for step, inputs in enumerate(calls(1, 2)):
        run(**inputs)
        assert len(refiner.calls) == (1 if step < 3 else 2)
    assert actions(cached) == "CrrCrr"
    assert {*refiner.calls, *caption.calls} == {2}


# --- in a user's own compiled function ------------------------------------------------------------


def doubled(cached: CachedModel) -> Callable[..., Tensor]:
    return lambda **inputs: 2 * cached(**inputs)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(ForAllDiT, "schedule"), (BeforeDiT, "rule"), (OfBlocksDiT, "rule")],
)
def test_as_part_of_one_graph_it_is_for_one_size(strategy: str, kind: type[ToyDiT]) -> None:
    name, options = STRATEGIES[strategy]
    model, backend = make(kind), Counting()
    eager, cached = (dit_cache_fx.apply(model, name, **options) for _ in range(2))
    cached(**calls(0, 3)[0])
    run = torch.compile(doubled(cached), backend=backend, fullgraph=True)
    for prompt in (0, 1):
        assert_same(run, doubled(eager), calls(prompt, 3))
    assert breaks() == 0
    with pytest.raises(RuntimeError, match="for other data"):
        run(**calls(1, 2)[0])


@pytest.mark.parametrize("kind", [ForAllDiT, OfBlocksDiT])
def test_without_fullgraph_it_is_compiled_by_itself(kind: type[ToyDiT]) -> None:
    model = make(kind)
    eager, cached = (dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS) for _ in range(2))
    cached(**calls(0, 3)[0])
    backend = Counting()
    run = torch.compile(doubled(cached), backend=backend)
    for prompt, valid in enumerate((3, 2)):
        assert_same(run, doubled(eager), calls(prompt, valid))
        assert actions(cached) == actions(eager) == "CrCCrr"
    assert backend.calls(torch.ops.higher_order.cond) == 1


# --- together with other things -------------------------------------------------------------------


class TiedForAllDiT(ForAllDiT):
    def block(self) -> nn.Module:
        return TiedBlock()


@pytest.mark.parametrize("strategy", ["schedule", "first block"])
def test_where_one_graph_cannot_be_compiled(strategy: str) -> None:
    """Weights that are views of one tensor: then there is one graph for each kind of step."""
    backend = Counting("aot_eager")
    graphs_after(TiedForAllDiT, STRATEGIES[strategy], "compile", (3, 3), backend, fullgraph=True)
    assert not [target for target in targets(backend) if "nonzero" in target]


def masked_toy(timestep: float, **how: Any) -> dict[str, Any]:
    inputs = toy_inputs(timestep, **how)
    return inputs | {"mask": (torch.arange(4) < 3)[None].expand(inputs["x"].shape[0], 4)}


MASKED_TOY = Case(
    "ForAllDiT", lambda: make(ForAllDiT), masked_toy, TOY.timesteps, ("blocks",), "timestep"
)


@pytest.mark.parametrize("strategy", ["schedule", "first block"])
@pytest.mark.parametrize("way", [*WAYS])
def test_in_batches_of_sessions(way: str, strategy: str) -> None:
    name, options = STRATEGIES[strategy]
    serving = Serving(
        make(ForAllDiT),
        name,
        requests=3,
        case=MASKED_TOY,
        options=options,
        ready=lambda cached: WAYS[way](cached, "eager", fullgraph=True),
    )
    serving.staggered(ticks=8)
    assert min(serving.same_counts()) > 0
