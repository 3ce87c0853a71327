"""A forward argument may have any name: those of the graphs' own operands, too."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx.export import export
from dit_cache_fx.ir.names import cached_name, is_reserved, measured_name, state_name, unreserved
from dit_cache_fx.lowering.clock import ClockState
from dit_cache_fx.strategies import Clock
from tests.compile.compiling import RULE, new_compiler
from tests.dynamo.inner import Inner
from tests.toys import DIM, ToyDiT, actions, make, toy_inputs

__all__ = ["new_compiler"]

STEPS = {0, 2, 3}
NAMES = [
    "distance",
    "computed",
    "forced",
    "fresh",
    "lost",
    "clock",
    "checksum",
    "cached_model_blocks_2_0",
    "state_0",
    "model",
    "run_0",
    "input",
    "lambda",
    "my-key",
]
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "taylorcache": ("taylorcache", {"no_cache_steps": STEPS}),
    "rule": RULE,
}


class NamedDiT(ToyDiT):
    """Takes two more tensors by any name: read before the blocks, and after them."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, **more: Any) -> Any:  # type: ignore[override]
        before, after = more.values()
        c = self.condition(timestep, text + before[:, None])
        return self.head(self.trunk(self.embed(x), c)) + after[:, None]


class PlainDiT(NamedDiT):
    """The same by the names `one` and `two`."""


def calls(*names: str) -> list[dict[str, Any]]:
    found = []
    for step in range(6):
        later = torch.randn(1, DIM, generator=torch.Generator().manual_seed(1))
        more = dict(zip(names, (torch.ones(1, DIM), later), strict=True))
        found.append(toy_inputs(1000.0 - 100 * step) | more)
    return found


@functools.cache
def expected(strategy: str) -> tuple[tuple[Tensor, ...], str]:
    """What the same model gives where the arguments have harmless names."""
    name, options = STRATEGIES[strategy]
    cached = dit_cache_fx.apply(make(PlainDiT), name, **options)
    outputs = [cached(**inputs) for inputs in calls("one", "two")]
    return tuple(outputs), actions(cached)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_eagerly(name: str) -> None:
    strategy = "rule" if name in ("fresh", "state_0") else "taylorcache"
    kind, options = STRATEGIES[strategy]
    want, did = expected(strategy)
    for names in ((name, "other"), ("other", name)):
        cached = dit_cache_fx.apply(make(NamedDiT), kind, **options)
        for output, inputs in zip(want, calls(*names), strict=True):
            assert torch.equal(cached(**inputs), output)
        assert actions(cached) == did
    assert {*did} == {"C", "r"}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("distance", "taylorcache"), ("forced", "rule"), ("cached_model_blocks_2_0", "rule")],
)
def test_any_name_in_one_graph(name: str, strategy: str) -> None:
    kind, options = STRATEGIES[strategy]
    want, did = expected(strategy)
    cached = dit_cache_fx.apply(make(NamedDiT), kind, **options)
    compiled = torch.compile(cached, backend="eager", fullgraph=True)
    for output, inputs in zip(want, calls("other", name), strict=True):
        assert torch.equal(compiled(**inputs), output)
    assert actions(cached) == did


@pytest.mark.parametrize("name", ["computed", "cached_model_blocks_2_0"])
def test_any_name_in_compiled_steps(name: str) -> None:
    want, _ = expected("taylorcache")
    cached = dit_cache_fx.apply(make(NamedDiT), "taylorcache", no_cache_steps=STEPS)
    cached.compile_steps(backend="eager")
    for output, inputs in zip(want, calls("other", name), strict=True):
        assert torch.equal(cached(**inputs), output)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("clock", "taylorcache"),
        ("checksum", "taylorcache"),
        ("forced", "rule"),
        ("state_0", "rule"),
    ],
)
def test_any_name_in_an_exported_program(name: str, strategy: str) -> None:
    kind, options = STRATEGIES[strategy]
    want, _ = expected(strategy)
    named = calls("other", name)
    program = export(
        dit_cache_fx.apply(make(NamedDiT), kind, **options),
        (),
        named[0],
        check_conditioning=False,
    )
    run = program.runner()
    for output, inputs in zip(want, named, strict=True):
        assert torch.equal(run(**inputs), output)


@pytest.mark.parametrize("name", ["distance", "cached_blocks_2", "model"])
def test_any_name_in_dynamos_graph(name: str) -> None:
    def outputs(*names: str) -> list[Tensor]:
        cache = dit_cache_fx.backend("taylorcache", no_cache_steps=STEPS, inner=Inner())
        compiled = torch.compile(make(NamedDiT), backend=cache, fullgraph=True)
        found = [compiled(**inputs) for inputs in calls(*names)]
        assert cache.cache_report().steps_reused == 3
        return found

    want = outputs("one", "two")
    torch._dynamo.reset()
    assert all(map(torch.equal, outputs("other", name), want))


class NestedDiT(ToyDiT):
    """Two ways through containers that come to the same name."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, a: Any, a_b: Any) -> Any:  # type: ignore[override]
        c = self.condition(timestep, text + a["b_c"][:, None])
        return self.head(self.trunk(self.embed(x), c)) + a_b["c"][:, None]


def test_names_that_come_to_the_same() -> None:
    def nested(inputs: dict[str, Any]) -> dict[str, Any]:
        one, two = inputs.pop("one"), inputs.pop("two")
        return inputs | {"a": {"b_c": one}, "a_b": {"c": two}}

    want, _ = expected("taylorcache")
    cached = dit_cache_fx.apply(make(NestedDiT), "taylorcache", no_cache_steps=STEPS)
    for output, inputs in zip(want, map(nested, calls("one", "two")), strict=True):
        assert torch.equal(cached(**inputs), output)


def test_every_operand_of_the_cache_is_reserved() -> None:
    own = {
        *Clock._fields,
        "forced",
        "fresh",
        cached_name("h", 0),
        state_name(2),
        measured_name("h"),
        "clock",
        "checksum",
    }
    assert all(map(is_reserved, own))
    assert not any(map(is_reserved, ("timestep", "x", "model_distance", *ClockState._fields[1:3])))
    assert unreserved("distance") == "model_distance"
    assert unreserved("x") == "x"
