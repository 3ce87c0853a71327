"""What a model's own code leaves behind: refused by name, or dropped with one warning."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx.errors import CaptureError, DitCacheWarning
from tests.toys import ToyDiT, make, toy_inputs


def cached_of(kind: Callable[[], nn.Module]) -> Any:
    return dit_cache_fx.apply(make(kind), "deepcache", no_cache_steps=range(9))


def refused(kind: Callable[[], nn.Module], **more: Any) -> str:
    """The text of the error that a first call raises."""
    with torch.no_grad(), pytest.raises(CaptureError) as raised:
        cached_of(kind)(**toy_inputs(900.0), **more)
    return str(raised.value)


# --- attributes of the model ---------------------------------------------------------------------


class NotingDiT(ToyDiT):
    """Leaves its last output for others."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        result = super().forward(x, timestep, text)
        self.last = result.mean()
        return result


class NotingOnBlockDiT(ToyDiT):
    """Leaves it on a block, which may read it in the next call."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        result = super().forward(x, timestep, text)
        self.blocks[1].last = result.mean()
        return result


class CountingDiT(ToyDiT):
    """Counts its calls; the result is that of another one from the eleventh on."""

    count = 0

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.count += 1
        result = super().forward(x, timestep, text)
        return result * 2 if self.count > 10 else result


class SummingDiT(ToyDiT):
    """Adds to what the call before has left."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.before: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        result = super().forward(x, timestep, text)
        before, self.before = self.before, result
        return result if before is None else result + 0.1 * before


class LoggingDiT(ToyDiT):
    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.log: dict[str, list[float]] = {"means": []}

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.log["means"].append(1.0)
        return super().forward(x, timestep, text)


class BufferDiT(ToyDiT):
    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.calls += 1
        return super().forward(x, timestep, text)


class RememberingDiT(ToyDiT):
    """Makes something at its first call and takes it from then on: no state that changes."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.table: Tensor | None = None
        self.known: dict[int, float] = {}

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        self.known.setdefault(x.shape[1], 2.0)
        self.height = x.shape[1]
        return super().forward(x + self.table * self.known[x.shape[1]], timestep, text)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (CountingDiT, "attribute 'count' of the model and reads it"),
        (SummingDiT, "attribute 'before' of the model and reads it"),
        (LoggingDiT, "sets attribute 'log'["),
        (NotingOnBlockDiT, "attribute 'last' of module 'blocks.1'"),
        (BufferDiT, "attribute 'calls' of the model in place"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_state_from_call_to_call_is_refused_by_name(kind: type[nn.Module], named: str) -> None:
    assert named in refused(kind)
    assert "disable()" in refused(kind)


def test_an_attribute_that_nobody_reads_is_dropped_with_one_warning() -> None:
    model = make(NotingDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(9))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(3):
            inputs = toy_inputs(900.0 - index, seed=index, size=index % 2)
            got = cached(**inputs)
            assert torch.equal(got, make(NotingDiT)(**inputs))
    texts = [str(w.message) for w in caught if issubclass(w.category, DitCacheWarning)]
    assert len(texts) == 1
    assert "sets attribute 'last' of the model in each call and never reads it" in texts[0]


def test_what_is_made_once_is_no_state() -> None:
    model, other = make(RememberingDiT), make(RememberingDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(9))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(4):
            inputs = toy_inputs(900.0 - index, seed=index, size=index % 2)
            assert torch.equal(cached(**inputs), other(**inputs))


def test_a_capture_leaves_the_attributes_as_one_call_does() -> None:
    model, other = make(RememberingDiT), make(RememberingDiT)
    with torch.no_grad():
        dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})(**toy_inputs(900.0))
        other(**toy_inputs(900.0))
    assert model.known == other.known
    assert model.table is not None
    assert type(model.table) is Tensor
    assert torch.equal(model.table, other.table)  # type: ignore[arg-type]
    assert type(model) is RememberingDiT


def test_an_unchecked_capture_keeps_the_state_as_it_was() -> None:
    model = make(CountingDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0}, check=False)
    with torch.no_grad():
        cached(**toy_inputs(900.0))
    assert model.count == 1


def with_a_cache_of_its_own(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """As published patches have it: a counter and a residual on the model."""
    c = self.condition(timestep, text)
    h = start = self.embed(x)
    if self.count % 3 == 0:
        h = self.trunk(h, c)
        self.residual = h - start
    else:
        h = h + self.residual
    self.count += 1
    return self.head(h)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_forward_with_a_cache_of_its_own_is_refused(start: int) -> None:
    model = make(ToyDiT)
    model.count, model.residual = start, torch.zeros(())
    model.forward = types.MethodType(with_a_cache_of_its_own, model)  # type: ignore[method-assign]
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    with torch.no_grad(), pytest.raises(CaptureError, match=r"attribute '(count|residual)'"):
        cached(**toy_inputs(900.0))


# --- arguments -----------------------------------------------------------------------------------


class CollectingDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, into: Any = None) -> Any:
        result = super().forward(x, timestep, text)
        if isinstance(into, dict):
            into["mean"] = result.mean()
        elif into is not None:
            into.append(result.mean())
        return result


class CountingInDictDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, info: Any = None) -> Any:
        info["calls"] = info.get("calls", 0) + 1
        return super().forward(x, timestep, text)


class NotingInDictDiT(ToyDiT):
    """Puts a size into a dict, for its blocks."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, info: Any = None) -> Any:
        info["tokens"] = x.shape[1]
        return super().forward(x, timestep, text) * info["tokens"]


class InPlaceInputDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        x.mul_(0.5)
        return super().forward(x, timestep, text)


class InPlaceViewDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        text[:, :1] = 0
        return super().forward(x, timestep, text)


@pytest.mark.parametrize("into", [[], {}], ids=["list", "dict"])
def test_values_put_into_an_argument_are_refused_by_name(into: Any) -> None:
    text = refused(CollectingDiT, into=into)
    assert f"changes its argument 'into' (a {type(into).__name__})" in text


def test_a_counter_in_an_argument_is_refused() -> None:
    assert "argument 'info' (a dict)" in refused(CountingInDictDiT, info={})


def test_plain_notes_in_a_dict_are_the_models_own() -> None:
    cached, model = cached_of(NotingInDictDiT), make(NotingInDictDiT)
    with torch.no_grad():
        for index in range(3):
            inputs = toy_inputs(900.0 - index, seed=index)
            assert torch.equal(cached(**inputs, info={"a": 1}), model(**inputs, info={"a": 1}))


@pytest.mark.parametrize(("kind", "name"), [(InPlaceInputDiT, "x"), (InPlaceViewDiT, "text")])
def test_an_argument_changed_in_place_is_refused_by_name(kind: type[nn.Module], name: str) -> None:
    assert f"changes its argument {name!r} in place" in refused(kind)


# --- results of modules --------------------------------------------------------------------------


class AfterTheLastBlockDiT(ToyDiT):
    """Changes in place what its blocks have given; `view`: a part of it."""

    view = False

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = super().trunk(h, c)
        (h[:, 1:] if self.view else h).add_(1.0)
        return h


class AfterTheLastBlockInPartDiT(AfterTheLastBlockDiT):
    view = True


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [AfterTheLastBlockDiT, AfterTheLastBlockInPartDiT])
@pytest.mark.parametrize("always", [{0}, {2}, {0, 1, 2}], ids=str)
def test_a_blocks_result_that_is_changed_in_place(
    kind: type[nn.Module], always: set[int], check: bool
) -> None:
    model = make(kind)
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, no_cache_block_id={"blocks": always}, check=check
    )
    with torch.no_grad():
        assert torch.equal(cached(**toy_inputs(900.0)), model(**toy_inputs(900.0)))
