"""`backend()` on graphs that read values out of tensors, or change what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import Backend
from tests.dynamo.test_backend import STEPS, TIMES, actions, compare, warned
from tests.toys import Block, ByHand, ToyDiT, make, toy_inputs


@pytest.fixture(autouse=True)
def reads_in_graphs() -> Iterator[None]:
    """Dynamo breaks the graph at a read, unless it is told not to."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


def cache_of(inner: str = "aot_eager", **options: Any) -> Backend:
    return dit_cache_fx.backend("deepcache", inner=inner, no_cache_steps=STEPS, **options)


class LengthDiT(ToyDiT):
    """Scales by how many words the mask has; the last of them are left out."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        words = mask.sum().item()
        return super().forward(x / words, timestep, text[:, :words])


class BlockOfLength(Block):
    def forward(self, h: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        return super().forward(h * mask.sum().item(), c)


class LengthInBlockDiT(ToyDiT):
    """The same inside of a block."""

    def block(self) -> nn.Module:
        return BlockOfLength()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        h, c = self.embed(x), self.condition(timestep, text)
        for block in self.blocks:
            h = block(h, c, mask)
        return self.gain * self.head(h)


def mask_of(words: int) -> Tensor:
    return torch.arange(4)[None] < words


@pytest.mark.parametrize("kind", [LengthDiT, LengthInBlockDiT])
def test_each_value_that_is_read_has_a_graph(kind: Callable[..., nn.Module]) -> None:
    cache = cache_of()
    model = torch.compile(make(kind), backend=cache, fullgraph=True)
    for words in (3, 2, 3):
        by_hand = ByHand(make(kind), ["blocks"])
        mask = mask_of(words)
        for step, time in enumerate(TIMES):
            inputs = {**toy_inputs(time, seed=step), "mask": mask}
            assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs)), (words, step)
        assert actions(cache) == "CCrrCr"
    assert len(cache.cache_report().captures) == 2


def test_more_values_than_graphs_are_not_cached() -> None:
    inside = make(LengthDiT)
    model = torch.compile(inside, backend=cache_of(), fullgraph=True)

    def calls() -> None:
        for words in range(1, 12):
            inputs = {**toy_inputs(1.0), "mask": torch.arange(12)[None] < words}
            assert torch.equal(model(**inputs), inside(**inputs))

    warned(calls, r"reads more than 8 values from tensors")


class NumberOfTensorDiT(ToyDiT):
    """Reads the timestep, and makes another one of it."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        time = timestep[0].item() / 2
        x = x * (1 + time) + torch.full((1,), time)
        return super().forward(x, torch.tensor([time]), text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_timestep_that_is_read_stays_in_the_graph(dtype: torch.dtype) -> None:
    cache = cache_of()
    model = torch.compile(make(NumberOfTensorDiT), backend=cache, fullgraph=True)
    by_hand = ByHand(make(NumberOfTensorDiT), ["blocks"])
    for step, time in enumerate((60, 50, 40, 30, 20, 10)):
        inputs = toy_inputs(0.0, seed=step)
        inputs["timestep"] = torch.tensor([time], dtype=dtype)
        assert torch.equal(model(**inputs), by_hand(step in STEPS, **inputs)), step
    assert actions(cache) == "CCrrCr"
    assert len(cache.cache_report().captures) == 1


class LongTimeDiT(ToyDiT):
    """The timestep decides a shape."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        rows = torch.arange(int(timestep[0].item())).sum()
        return super().forward(x + rows, timestep, text)


class BlockThatReads(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h * h.abs().max().item(), c)


class ReadingBlocksDiT(ToyDiT):
    """Each block reads a value of what the one before made."""

    def block(self) -> nn.Module:
        return BlockThatReads()


class RandomDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x * torch.rand(1).item(), timestep, text)


class ChangedDiT(ToyDiT):
    """What is read was changed in place."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        first = x[0].clone()
        first[0].mul_(2)
        return super().forward(x * first.sum().item(), timestep, text)


@pytest.mark.parametrize("kind", [LongTimeDiT, ReadingBlocksDiT, RandomDiT, ChangedDiT])
def test_what_cannot_be_read_before_is_not_cached(kind: Callable[..., nn.Module]) -> None:
    inside = make(kind)
    cache = cache_of("eager")
    model = torch.compile(inside, backend=cache, fullgraph=True)

    def calls() -> None:
        for step, time in enumerate((60.0, 50.0, 40.0)):
            inputs = toy_inputs(time, seed=step)
            torch.manual_seed(step)
            got = model(**inputs)
            torch.manual_seed(step)
            assert torch.equal(got, inside(**inputs))

    warned(calls, "not cached: .*(read|traced|values)")
    assert not cache.cache_report().captures


# --- what is given is changed ------------------------------------------------------------------


class CountingDiT(ToyDiT):
    """Counts its calls in a buffer, and in an argument where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, log: Tensor | None = None) -> Any:
        self.calls += 1
        if log is not None:
            log[0] += x.mean()
        return super().forward(x, timestep, text) + self.calls


def test_what_the_model_changes_in_place_is_changed_on_every_step() -> None:
    cache = cache_of()
    inside = make(CountingDiT)
    model = torch.compile(inside, backend=cache, fullgraph=True)
    compare(model, ByHand(inside, ["blocks"]))
    assert inside.calls == len(TIMES)
    assert actions(cache) == "CCrrCr"


def test_an_argument_that_the_model_changes() -> None:
    """It conditions the blocks, and has another value in each call: nothing is reused."""
    cache = cache_of()
    inside, want = make(CountingDiT), make(CountingDiT)
    model = torch.compile(inside, backend=cache, fullgraph=True)
    log, wanted = torch.zeros(2), torch.zeros(2)
    for step, time in enumerate(TIMES):
        inputs = toy_inputs(time, seed=step)
        assert torch.equal(model(**inputs, log=log), want(**inputs, log=wanted)), step
        assert torch.equal(log, wanted), step
    assert log[0] != 0
    assert actions(cache)[-1] == "C"
    assert len(cache.cache_report().captures) == 1


class KeepingBlock(Block):
    def forward(self, h: Tensor, c: Tensor, kept: Tensor) -> Tensor:
        kept.copy_(h)
        return super().forward(h, c)


class KeepingDiT(ToyDiT):
    """Blocks write into a tensor that the model is given."""

    def block(self) -> nn.Module:
        return KeepingBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, kept: Tensor) -> Any:  # type: ignore[override]
        h, c = self.embed(x), self.condition(timestep, text)
        for block in self.blocks:
            h = block(h, c, kept)
        return self.gain * self.head(h)


class KeepingItselfDiT(ToyDiT):
    """The model writes what its blocks made."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, kept: Tensor) -> Any:  # type: ignore[override]
        h = self.trunk(self.embed(x), self.condition(timestep, text))
        kept.copy_(h)
        return self.gain * self.head(h)


@pytest.mark.parametrize("kind", [KeepingDiT, KeepingItselfDiT])
def test_what_blocks_made_is_written_by_no_cached_graph(kind: Callable[..., nn.Module]) -> None:
    inside = make(kind)
    cache = cache_of()
    model = torch.compile(inside, backend=cache, fullgraph=True)

    def calls() -> None:
        for step, time in enumerate(TIMES):
            inputs = toy_inputs(time, seed=step)
            kept, wanted = torch.zeros(1, 6, 8), torch.zeros(1, 6, 8)
            want = inside(**inputs, kept=wanted)
            assert torch.equal(model(**inputs, kept=kept), want)
            assert torch.equal(kept, wanted)

    warned(calls, r"writes .*into a tensor that .* was called with")
    assert not cache.cache_report().captures


def test_a_changed_tensor_in_the_memory_of_another_one_is_left_to_the_model() -> None:
    cache = cache_of("eager")
    inside = make(CountingDiT)
    model = torch.compile(inside, backend=cache, fullgraph=True)
    want = make(CountingDiT)

    def calls() -> None:
        for step, time in enumerate(TIMES):
            inputs, others = toy_inputs(time, seed=step), toy_inputs(time, seed=step)
            got = model(**inputs, log=inputs["x"][0, 0])
            assert torch.equal(got, want(**others, log=others["x"][0, 0])), step
            assert torch.equal(inputs["x"], others["x"])

    warned(calls, "shares memory with another")


# --- calls that run uncached -------------------------------------------------------------------


def test_calls_with_gradients_count_as_steps() -> None:
    inside, cache = make(ToyDiT), cache_of()
    model = torch.compile(inside, backend=cache)
    by_hand = ByHand(inside, ["blocks"])

    def generation() -> None:
        for step, time in enumerate(TIMES):
            inputs = toy_inputs(time, seed=step)
            with torch.set_grad_enabled(step in (2, 3)):
                got = model(**inputs)
            assert got.requires_grad == (step in (2, 3))
            want = by_hand(step in STEPS or step in (2, 3), **inputs)
            if step != 5:
                torch.testing.assert_close(got.detach(), want)

    warned(generation, "gradients are enabled")
    steps = [(r.step, r.action) for r in cache.cache_report().timeline]
    assert steps == [(0, "computed"), (1, "computed"), (4, "computed"), (5, "reused")]


def test_pieces_with_gradients_count_as_steps() -> None:
    class TwoPieces(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
            c = self.condition(timestep, text)
            torch._dynamo.graph_break()
            return self.gain * self.head(self.trunk(self.embed(x), c))

    inside, cache = make(TwoPieces), cache_of("eager")
    model = torch.compile(inside, backend=cache)

    def generation() -> None:
        for step, time in enumerate(TIMES):
            with torch.set_grad_enabled(step in (2, 3)):
                model(**toy_inputs(time, seed=step))

    warned(generation, "gradients are enabled")
    steps = [r.step for r in cache.cache_report().timeline]
    assert steps == [0, 1, 4, 5]


class SelectsDiT(ToyDiT):
    """Leaves out the words that the mask leaves out."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, timestep, text[mask][None])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_with_a_size_from_data_is_compiled_uncached(inner: str) -> None:
    """Only while Dynamo calls the backend is it known that the size may vary."""
    inside, cache = make(SelectsDiT), cache_of(inner)
    model = torch.compile(inside, backend=cache, fullgraph=True)

    def generations() -> None:
        for words in (3, 2):
            for time in TIMES:
                inputs = toy_inputs(time) | {"mask": mask_of(words)}
                assert torch.equal(model(**inputs), inside(**inputs))

    warned(generations, r"a size in it depends on data .* Use dit_cache_fx\.apply\(model, \.\.\.\)")
    assert not cache.cache_report().timeline


def test_training_alone_takes_no_note() -> None:
    cache = cache_of()
    model = torch.compile(make(ToyDiT), backend=cache)

    def training() -> None:
        for time in TIMES:
            with torch.enable_grad():
                model(**toy_inputs(time)).sum().backward()

    warned(training, "gradients are enabled")
    assert not cache.cache_report().timeline
