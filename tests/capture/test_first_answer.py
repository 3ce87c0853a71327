"""The first answer of a graph: from what was recorded, checked, and nothing held after it."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel, CaptureError
from tests.toys import (
    STEPS_OF_SIX,
    TOY,
    Block,
    ByHand,
    ToyDiT,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def deep(model: nn.Module, **options: Any) -> CachedModel:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX, **options)


# --- a first call that raises ------------------------------------------------------------------


class Count:
    """Tells the number of steps, from the second time on."""

    def __init__(self, failures: int = 1) -> None:
        self.failures = failures

    def __call__(self) -> int:
        self.failures -= 1
        if self.failures >= 0:
            raise AttributeError("no num_timesteps yet")
        return 12


class Remembers(Block):
    """A block that says what it returned last, weakly."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        output = super().forward(h, c)
        self.__dict__["last"] = ref(output)
        return output


class RemembersDiT(ToyDiT):
    def block(self) -> nn.Module:
        return Remembers()


def test_nothing_is_held_of_a_first_call_that_raises() -> None:
    model = make(RemembersDiT)
    cached = dit_cache_fx.apply(model, "deepcache", schedule="fast", num_steps=Count())
    with pytest.raises(AttributeError):
        cached(**toy_inputs(900.0))
    gc.collect()
    assert len(cached.cache_report().captures) == 1  # it is checked: the next call finds it
    assert [block.last() for block in model.blocks] == [None] * 3


def test_the_call_after_one_that_raised_is_a_first_call() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", schedule="fast", num_steps=Count(2))
    for step in range(2):
        with pytest.raises(AttributeError):
            cached(**toy_inputs(900.0 - step, seed=step))
    with runs_of(model.blocks) as runs:
        got = cached(**toy_inputs(900.0, seed=7))
    assert runs == [1, 1, 1]  # captured and answered in one run
    assert torch.equal(got, model(**toy_inputs(900.0, seed=7)))
    assert len(cached.cache_report().captures) == 1


def test_a_capture_is_checked_before_anything_else_can_raise() -> None:
    model = make(StrictDiT)
    cached = dit_cache_fx.apply(model, "deepcache", schedule="fast", num_steps=Count())
    for _ in range(2):
        with pytest.raises(CaptureError, match="does not give the model's output for the call"):
            cached(**toy_inputs(900.0))
        assert cached.cache_report().captures == ()


# --- the checks: each finds what the other one cannot ---------------------------------------------


class Counting(nn.Module):
    """A layer that keeps a state: no two answers are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight + self.calls


class Strict(nn.Module):
    """A layer that knows no timesteps but its own: it refuses the made-up ones of a check."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, timestep: Tensor) -> Tensor:
        if timestep.item() != 900.0:
            raise KeyError("no such timestep")
        return timestep * self.weight


class StrictDiT(ToyDiT):
    """Cannot be checked on other inputs; its last layer keeps a state."""

    def __init__(self) -> None:
        super().__init__()
        self.strict = Strict()

    def last(self) -> nn.Module:
        return nn.ModuleDict({"state": Counting(), "linear": nn.Linear(8, 8)})  # type: ignore[return-value]

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(self.strict(timestep), text)
        return self.head["linear"](self.head["state"](self.trunk(self.embed(x), c)))


def test_the_first_answer_is_checked_where_no_other_check_can_be() -> None:
    with pytest.raises(CaptureError, match="does not give the model's output for the call"):
        deep(make(StrictDiT))(**toy_inputs(900.0))


class LabelledDiT(ToyDiT):
    """Reads a value of the text, which made-up texts do not have; counts its calls in Python."""

    calls = 0

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.__dict__["calls"] += 1
        scale = 2.0 if text[0, 0, 0].item() > 100.0 else 1.0
        h = self.trunk(self.embed(x), self.condition(timestep, text))
        return self.head(h * scale * self.__dict__["calls"])


def test_where_other_conditioning_is_another_graph_another_sample_is_checked() -> None:
    """The first set of made-up inputs has another text, so only the second can be used."""
    model = make(LabelledDiT)
    model.__dict__["calls"] = 0
    with pytest.raises(CaptureError, match="the captured graph disagrees with the model"):
        deep(model)(**toy_inputs(900.0))


# --- outputs that change in place after they were recorded ----------------------------------------


class ChangesFirstDiT(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = self.blocks[0](h, c)
        h += 1.0
        for block in self.blocks[1:]:
            h = block(h, c)
        return h


class ChangesLastDiT(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = super().trunk(h, c)
        h[:, 0].mul_(3.0)
        return h


class InPlaceBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h.add_(torch.tanh(self.mix(h) + self.modulation(c)[:, None]))


class InPlaceBlocksDiT(ToyDiT):
    def block(self) -> nn.Module:
        return InPlaceBlock()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [ChangesFirstDiT, ChangesLastDiT, InPlaceBlocksDiT])
@pytest.mark.parametrize("never", [0, 1, 2])
def test_never_cached_blocks_answer_with_what_they_gave(
    kind: type[nn.Module], never: int, check: bool
) -> None:
    model = make(kind)
    cached = deep(model, no_cache_block_id={"blocks": {never}}, check=check)
    by_hand = ByHand(model, ["blocks"], never=[f"blocks.{never}"])
    follows(cached, by_hand, generation(TOY, STEPS_OF_SIX))
    assert len(cached.cache_report().captures) == 1


class ReadsChangedDiT(ToyDiT):
    """Changes a layer's output in place and reads a value out of it."""

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        c = self.text_in(text).mean(dim=1)
        fixed = self.time.linear(torch.ones(1, 2))
        fixed[:, 0] *= 3.0
        return c * (2.0 if fixed[0, 0].item() > 0 else 1.0) + fixed + timestep[:, None] / 1000


def test_what_is_read_of_a_changed_output_is_what_the_model_read() -> None:
    model = make(ReadsChangedDiT)
    cached = deep(model)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS_OF_SIX))
    assert len(cached.cache_report().captures) == 1
