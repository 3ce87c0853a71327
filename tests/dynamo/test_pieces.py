"""Where Dynamo splits a model, the trunk is found in the piece that has it, or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import Backend, DitCacheWarning
from tests.dynamo.test_backend import STEPS, TIMES, actions, compare, warned
from tests.toys import Block, ByHand, ToyDiT, make, toy_inputs


class Refiner(nn.Module):
    """A module with blocks of its own, which do not see the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, text: Tensor, timestep: Tensor) -> Tensor:
        for block in self.refiner_blocks:
            text = block(text, timestep[:, None].expand(-1, text.shape[-1]))
        return text


class RefinedDiT(ToyDiT):
    """The text is refined in one piece, the trunk is in another."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = Refiner()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        text = self.refiner(text, timestep)
        torch._dynamo.graph_break()
        c = self.condition(timestep, text)
        return self.gain * self.head(self.trunk(self.embed(x), c))


class BreakingBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(h, c)


class BrokenTrunkDiT(RefinedDiT):
    """The refiner is a piece, and each block of the trunk breaks."""

    def block(self) -> nn.Module:
        return BreakingBlock()


class BareTrunkDiT(RefinedDiT):
    """Dynamo gives up the whole forward: the refiner is compiled as a function of its own."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        for kind in ("text", "trunk"):
            torch._dynamo.graph_break()
            if kind == "text":
                c = self.condition(timestep, self.refiner(text, timestep))
        h = self.embed(x)
        for block in self.blocks:
            torch._dynamo.graph_break()
            h = block(h, c)
        return self.gain * self.head(h)


def cache_of(**options: Any) -> Backend:
    return dit_cache_fx.backend("deepcache", inner="eager", no_cache_steps=STEPS, **options)


def test_the_trunk_is_cached_in_the_piece_that_has_it(recwarn: pytest.WarningsRecorder) -> None:
    cache = cache_of()
    model = torch.compile(make(RefinedDiT), backend=cache)
    for prompt in range(2):
        compare(model, ByHand(make(RefinedDiT), ["blocks"]), prompt=prompt)
        assert actions(cache) == "CCrrCr"
    assert cache.cache_report().blocks == {"blocks": 3}
    assert not [w for w in recwarn if issubclass(w.category, DitCacheWarning)]


@pytest.mark.parametrize("name", ["blocks", "double_blocks"])
def test_blocks_of_it_that_are_never_cached(name: str) -> None:
    cache = cache_of(no_cache_block_id={name: {1}})
    model = torch.compile(make(RefinedDiT), backend=cache)
    compare(model, ByHand(make(RefinedDiT), ["blocks"], never=["blocks.1"]))
    assert cache.cache_report().cached_blocks == {"blocks": (0, 2)}


def test_a_list_of_another_piece_is_no_wrong_name() -> None:
    cache = cache_of(no_cache_block_id={"refiner.refiner_blocks": {0}})
    model = torch.compile(make(RefinedDiT), backend=cache)
    compare(model, ByHand(make(RefinedDiT), ["blocks"]))


class OwnMethodDiT(BareTrunkDiT):
    """The same; the first function that is compiled is a method of the model itself."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.halved(x)
        return super().forward(x, timestep, text)

    def halved(self, x: Tensor) -> Tensor:
        return x / 2


def assert_as_inside(inside: nn.Module, cache: Backend) -> None:
    """Check a generation with this backend: each call is the model's own."""
    model = torch.compile(inside, backend=cache)
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        assert torch.equal(model(**inputs), inside(**inputs))


@pytest.mark.parametrize("kind", [BrokenTrunkDiT, BareTrunkDiT, OwnMethodDiT])
@pytest.mark.parametrize("never", [None, {"blocks": {1}}])
def test_a_refiner_is_no_trunk_where_the_trunk_is_split(
    kind: Callable[..., nn.Module], never: Any
) -> None:
    inside, cache = make(kind), cache_of(no_cache_block_id=never)
    generation = partial(assert_as_inside, inside, cache)
    warned(generation, r"Dynamo splits the model .* dit_cache_fx.apply\(")
    assert not cache.cache_report().captures


def broken(text: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return text * 2


class InAnArgumentDiT(ToyDiT):
    """A break in an argument: the next piece has the timestep and a method as values on a stack."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(timestep, broken(text))
        return self.gain * self.head(self.trunk(self.embed(x), c))


def test_a_trunk_whose_timestep_is_lost_is_not_left_uncached_silently() -> None:
    generation = partial(assert_as_inside, make(InAnArgumentDiT), cache_of())
    warned(generation, r"Dynamo splits the model .* the timestep is no tensor input")


class TwoSamplesDiT(ToyDiT):
    """Two lists, each for one of two inputs of the sample's shape; then the trunk has both.

    The list of the second input is as large as that of the first, and called before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reference_blocks = nn.ModuleList([Block() for _ in self.blocks])

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, reference: Tensor) -> Any:  # type: ignore[override]
        c = self.condition(timestep, text)
        other = self.embed(reference)
        for block in self.reference_blocks:
            other = block(other, c)
        return self.gain * self.head(self.trunk(self.embed(x), c) + other)


def test_of_inputs_alike_the_first_argument_is_the_sample() -> None:
    def inputs(time: float, seed: int) -> dict[str, Any]:
        return {**toy_inputs(time, seed=seed), "reference": toy_inputs(0.0, seed=99)["x"]}

    cache = cache_of()
    model = torch.compile(make(TwoSamplesDiT), backend=cache)
    cached = dit_cache_fx.apply(make(TwoSamplesDiT), "deepcache", no_cache_steps=STEPS)
    for step, time in enumerate(TIMES):
        assert torch.equal(model(**inputs(time, step)), cached(**inputs(time, step)))
    assert cache.cache_report().blocks == cached.cache_report().blocks == {"blocks": 3}
