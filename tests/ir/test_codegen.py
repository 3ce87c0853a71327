"""The code of a graph looks every module on the way to others up once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

import dit_cache_fx
from dit_cache_fx.ir.codegen import customize_code
from dit_cache_fx.ir.graph_module import graph_module
from tests.toys import DIM, TOY, ToyDiT, actions, generation, make


class Counting(nn.Module):
    """Counts lookups of its attributes, as models with a lookup of their own see them."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        for name, child in children.items():
            setattr(self, name, child)

    def __getattr__(self, name: str) -> Any:
        self.seen[name] += 1
        return super().__getattr__(name)


def model() -> Counting:
    embed = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})
    return Counting(embed=embed, head=nn.Linear(2, 2), scale=nn.Linear(2, 2))


def chain(*targets: str, also: str | None = None) -> fx.Graph:
    """A graph that calls these modules, one on the result of the other."""
    graph = fx.Graph()
    value = graph.placeholder("x" if also is None else also)
    for target in targets:
        value = graph.call_module(target, (value,))
    graph.output(value)
    return graph


def body(root: nn.Module, graph: fx.Graph) -> list[str]:
    code = graph_module(root, {}, graph, "Graph").code
    return [line.strip().partition(";")[0] for line in code.strip().splitlines()[1:-1]]


TARGETS = ("model.embed.inner.0", "model.embed.inner.1", "model.embed.inner.2", "model.head")


def test_each_is_looked_up_once() -> None:
    root = model()
    gm = graph_module(root, {}, chain(*TARGETS), "Graph")
    root.seen.clear()
    x = torch.ones(1, 2)
    want: Tensor = root.head(root.embed["inner"](x))
    assert torch.equal(gm(x), want)
    root.seen.clear()
    gm(x)
    assert root.seen["embed"] == root.seen["head"] == 1


def test_of_two_paths_for_the_same_modules_the_longer_has_a_name() -> None:
    assert body(model(), chain(*TARGETS)) == [
        "model = self.model",
        "model_embed_inner = model.embed.inner",
        'model_embed_inner_0 = getattr(model_embed_inner, "0")(x)',
        'model_embed_inner_1 = getattr(model_embed_inner, "1")(model_embed_inner_0)',
        'model_embed_inner_2 = getattr(model_embed_inner, "2")(model_embed_inner_1)',
        "model_head = model.head(model_embed_inner_2)",
    ]


def test_a_single_module_is_called_as_it_is() -> None:
    assert body(model(), chain("model.head")) == ["model_head = self.model.head(x)"]


def test_a_name_that_is_taken() -> None:
    lines = body(model(), chain("model.head", "model.scale", also="model"))
    assert lines == [
        "model_ = self.model",
        "model_head = model_.head(model)",
        "model_scale = model_.scale(model_head)",
    ]


def test_a_name_that_is_no_identifier() -> None:
    root = model()
    root.add_module("a-b", nn.ModuleDict({"1": nn.Identity(), "class": nn.Tanh()}))
    gm = graph_module(root, {}, chain("model.a-b.1", "model.a-b.class"), "Graph")
    assert torch.equal(gm(torch.ones(1)), torch.ones(1).tanh())


class KeywordDiT(ToyDiT):
    """Embeds its class by a layer of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleDict({"class": nn.Linear(DIM, DIM), "a-b": nn.Linear(DIM, DIM)})

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        embedded: Tensor = self.embedders["class"](super().condition(timestep, text))
        return embedded + self.embedders["a-b"](embedded)


@torch.no_grad()
def test_a_model_with_such_names() -> None:
    model = make(KeywordDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 3})
    for computes, inputs in generation(TOY, {0, 3}):
        assert torch.equal(cached(**inputs), model(**inputs)) == computes
    assert actions(cached) == "CrrCrr"


def test_a_parameter_beside_a_module() -> None:
    graph = fx.Graph()
    weight = graph.get_attr("model.head.weight")
    graph.output(graph.call_function(torch.add, (graph.call_module("model.scale", (weight,)), 1)))
    assert body(model(), graph)[:3] == [
        "model = self.model",
        "model_head_weight = model.head.weight",
        "model_scale = model.scale(model_head_weight)",
    ]


def test_twice_is_as_once() -> None:
    """Passes make a graph module of one graph again and again."""
    graph = chain(*TARGETS)
    once = body(model(), graph)
    customize_code(graph)
    assert body(model(), graph) == once


def test_a_module_that_is_replaced_is_called() -> None:
    root = model()
    gm = graph_module(root, {}, chain(*TARGETS), "Graph")
    gm(torch.ones(1, 2))
    root.head, root.embed["inner"][1] = nn.Identity(), nn.Tanh()
    assert torch.equal(gm(torch.ones(1, 2)), root.embed["inner"](torch.ones(1, 2)))
