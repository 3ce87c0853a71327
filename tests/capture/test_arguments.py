"""What blocks may be given and may give: objects, named tuples, functions, containers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CaptureError
from tests.toys import (
    STEPS_OF_SIX,
    TOY,
    Block,
    ByHand,
    ToyDiT,
    follows,
    generation,
    make,
    toy_inputs,
)
from tests.zoo.case import built

pytestmark = pytest.mark.usefixtures("no_grad")


class Conditions:
    """A plain object that a model makes in each call."""

    def __init__(self, vector: Tensor, scale: float) -> None:
        self.vector = vector
        self.scale = scale


class Slotted:
    __slots__ = ("scale", "vector")

    def __init__(self, vector: Tensor, scale: float) -> None:
        self.vector = vector
        self.scale = scale


@dataclass
class Record:
    vector: Tensor
    scale: float
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.vector * 2


class Pair(NamedTuple):
    vector: Tensor
    scale: float


KINDS: dict[str, Callable[[Tensor, float], Any]] = {
    "object": Conditions,
    "slots": Slotted,
    "dataclass": Record,
    "named tuple": Pair,
    "namespace": lambda vector, scale: SimpleNamespace(vector=vector, scale=scale),
    "nested": lambda vector, scale: SimpleNamespace(
        vector=vector, scale=scale, inner=[Conditions(vector, 2.0)], nothing=None
    ),
}


class ObjectBlock(Block):
    def forward(self, h: Tensor, c: Any) -> Tensor:  # type: ignore[override]
        return super().forward(h, c.vector * c.scale)


class ObjectDiT(ToyDiT):
    """Passes its conditioning to the blocks as an object made in each call."""

    def __init__(self, kind: Callable[[Tensor, float], Any] = Conditions) -> None:
        super().__init__()
        self.kind = kind

    def block(self) -> nn.Module:
        return ObjectBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h, self.kind(c, 0.5))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "strategy", [pytest.param("deepcache", marks=pytest.mark.exhaustive), "teacache"]
)
def test_objects_as_block_arguments(kind: Callable[..., Any], strategy: str) -> None:
    model = built(lambda: ObjectDiT(kind))
    cached = dit_cache_fx.apply(model, strategy, no_cache_steps=STEPS_OF_SIX)
    for prompt in (0, 1):
        calls = generation(TOY, STEPS_OF_SIX, prompt=prompt)
        if strategy == "deepcache":
            follows(cached, ByHand(model, ["blocks"]), calls)
            continue
        for computes, inputs in calls:
            if computes:
                assert torch.equal(cached(**inputs), model(**inputs))
            else:
                assert not torch.equal(cached(**inputs), model(**inputs))


def test_an_object_as_an_argument_of_the_model() -> None:
    class TakesObjectDiT(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, cond: Any) -> Any:  # type: ignore[override]
            return super().forward(x * cond.scale, timestep, cond.vector)

    model = make(TakesObjectDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    plain = generation(TOY, STEPS_OF_SIX)
    calls = [
        (c, {"x": i["x"], "timestep": i["timestep"], "cond": Conditions(i["text"], 0.5)})
        for c, i in plain
    ]
    by_hand = ByHand(model, ["blocks"])
    for computes, inputs in calls:
        assert torch.equal(cached(**inputs), by_hand(computes, **inputs))
    assert len(cached.cache_report().captures) == 1


class Streams(NamedTuple):
    img: Tensor
    txt: Tensor


@dataclass
class StreamRecord:
    img: Tensor
    txt: Tensor


class StreamBlock(Block):
    """Takes and returns both streams in one container."""

    def forward(self, streams: Any, c: Tensor) -> Any:  # type: ignore[override]
        img, txt = (
            (streams["img"], streams["txt"])
            if isinstance(streams, dict)
            else (streams.img, streams.txt)
        )
        joined = super().forward(torch.cat([img, txt], dim=1), c)
        img, txt = img + joined[:, : img.shape[1]], txt + joined[:, img.shape[1] :]
        if isinstance(streams, dict):
            return {"img": img, "txt": txt}
        return type(streams)(img, txt)


class StreamDiT(ToyDiT):
    def __init__(self, kind: Callable[[Tensor, Tensor], Any] = Streams) -> None:
        super().__init__()
        self.kind = kind

    def block(self) -> nn.Module:
        return StreamBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        c = self.condition(timestep, text)
        streams = self.kind(self.embed(x), self.text_in(text))
        for block in self.blocks:
            streams = block(streams, c)
        return self.head(streams["img"] if isinstance(streams, dict) else streams.img)


STREAMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "named tuple": Streams,
    "dataclass": StreamRecord,
    "dict": lambda img, txt: {"img": img, "txt": txt},
}
each_stream = pytest.mark.parametrize("kind", STREAMS.values(), ids=STREAMS)


@each_stream
def test_streams_in_a_container(kind: Callable[..., Any]) -> None:
    model = built(lambda: StreamDiT(kind))
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS_OF_SIX))
    assert cached.cache_report().bytes_held == 6 * 8 * 4  # the image alone


@each_stream
def test_the_residual_is_of_the_image_stream_in_a_container(kind: Callable[..., Any]) -> None:
    model = built(lambda: StreamDiT(kind))
    cached = dit_cache_fx.apply(model, "teacache", no_cache_steps={0})
    first, second = toy_inputs(900.0, seed=0), toy_inputs(800.0, seed=1)
    trunks = []
    for block in (model.blocks[0], model.blocks[-1]):  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, args, out: trunks.append((args[0], out)))
    model(**first)
    read = STREAMS["dict"] if kind is STREAMS["dict"] else None
    image = (lambda s: s["img"]) if read else (lambda s: s.img)
    residual = image(trunks[1][1]) - image(trunks[0][0])
    cached(**first)
    got = cached(**second)
    torch.testing.assert_close(got, model.head(model.embed(second["x"]) + residual))  # type: ignore[operator]


class TalkingBlock(Block):
    """Leaves a value for the next block in a dict that all of them are given."""

    def forward(self, h: Tensor, c: Tensor, notes: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        h = super().forward(h, c)
        notes["last"] = h + notes.get("last", 0)
        return h + 0.1 * notes["last"]


class TalkingDiT(ToyDiT):
    def block(self) -> nn.Module:
        return TalkingBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        notes: dict[str, Tensor] = {}
        for block in self.blocks:
            h = block(h, c, notes)
        return h


def test_blocks_that_write_into_an_argument_are_refused() -> None:
    model = make(TalkingDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    with pytest.raises(CaptureError, match=r"'blocks\.0' puts a value into a container"):
        cached(**toy_inputs(900.0))


class FunctionBlock(Block):
    def forward(self, h: Tensor, change: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(change(h), c)


class FunctionDiT(ToyDiT):
    """Passes a function made in each call, which closes over a number or a tensor."""

    def __init__(self, tensor: bool) -> None:
        super().__init__()
        self.tensor = tensor

    def block(self) -> nn.Module:
        return FunctionBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        factor = c.mean() if self.tensor else 0.5
        for index, block in enumerate(self.blocks):
            change = partial(torch.mul, factor) if index else lambda x: x * factor
            h = block(h, change, c)
        return h


def test_a_function_made_anew_that_does_the_same_is_fine() -> None:
    model = make(FunctionDiT, tensor=False)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS_OF_SIX))


def test_a_function_that_hides_a_tensor_is_refused() -> None:
    model = make(FunctionDiT, tensor=True)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    with pytest.raises(CaptureError, match=r"it calls block blocks\.0 with <function"):
        cached(**toy_inputs(900.0))


class LengthLayer(nn.Module):
    """Has a weight, and answers with a number that it reads from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, mask: Tensor) -> tuple[int, Tensor]:
        return int(mask.sum()), self.weight * 2


class LengthDiT(ToyDiT):
    def __init__(self) -> None:
        super().__init__()
        self.length = LengthLayer()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        length, factor = self.length(mask)
        return super().forward(x * factor, timestep, text[:, :length])


def test_a_number_that_a_layer_reads_is_a_guard() -> None:
    model = make(LengthDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
    by_hand = ByHand(model, ["blocks"])
    for length in (3, 2, 4, 3):
        mask = torch.arange(4) < length
        calls = [(c, i | {"mask": mask}) for c, i in generation(TOY, STEPS_OF_SIX)]
        follows(cached, by_hand, calls)
    assert len(cached.cache_report().captures) == 3


def test_captures_in_two_threads_at_once() -> None:
    before = nn.Module.__call__
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    model = make(ToyDiT)
                    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS_OF_SIX)
                    follows(cached, ByHand(model, ["blocks"]), generation(TOY, STEPS_OF_SIX))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert nn.Module.__call__ is before
