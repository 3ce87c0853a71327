"""Threads that run one model: what forward sets on its modules for a call, that call alone sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from dit_cache_fx.capture.turns import Turns
from tests.runtime.test_threads import PATIENCE, begun, together
from tests.toys import Block, ToyDiT, make, toy_inputs

SCALES = (None, 0.5, 2.0)


class ScaledBlock(Block):
    """Reads its scale once before and once after the other threads have had time to set it."""

    meets: threading.Barrier | None = None
    met = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        before = self.scale
        _meet()
        return super().forward(h, c) * before * self.scale


@torch.compiler.disable
def _meet() -> None:
    if ScaledBlock.meets is not None:
        with suppress(threading.BrokenBarrierError):
            ScaledBlock.meets.wait()
            ScaledBlock.met += 1


class ScaledDiT(ToyDiT):
    """Gives its blocks the scale of a call, as pipelines give LoRA layers theirs."""

    def block(self) -> nn.Module:
        return ScaledBlock()

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, text: Tensor, scale: float | None = None
    ) -> Any:
        if scale is None:
            return super().forward(x, timestep, text)
        before = [block.scale for block in self.blocks]
        try:
            for block in self.blocks:
                block.scale = scale
            return super().forward(x, timestep, text)
        finally:
            for block, value in zip(self.blocks, before, strict=True):
                block.scale = value


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def eager(cached: CachedModel) -> Any:
    return cached


def steps(cached: CachedModel) -> Any:
    cached.compile_steps(backend="eager")
    return cached


def one_graph(cached: CachedModel) -> Any:
    return torch.compile(cached, backend="eager")


def call(model: Any, scale: float | None) -> Tensor:
    result: Tensor = model(**toy_inputs(900.0), scale=scale)
    return result


def meeting(monkeypatch: pytest.MonkeyPatch, threads: int, seconds: float) -> None:
    """From now on the blocks of so many threads wait for each other, for some time."""
    monkeypatch.setattr(ScaledBlock, "met", 0)
    monkeypatch.setattr(ScaledBlock, "meets", threading.Barrier(threads, timeout=seconds))


@pytest.mark.parametrize(
    ("scales", "way"),
    [
        pytest.param(
            scales,
            way,
            id=f"{scales}-{way.__name__}",
            marks=() if way is eager or scales is SCALES else pytest.mark.exhaustive,
        )
        for scales in ((0.5, 2.0), (None, 2.0), SCALES)
        for way in (eager, steps, one_graph)
    ],
)
def test_no_thread_sees_the_scale_of_another(
    way: Callable[[CachedModel], Any],
    scales: tuple[float | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(ScaledDiT)
    ready = way(dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 1}))
    want = {scale: call(model, scale) for scale in SCALES}
    for scale in SCALES:
        call(ready, scale)
    meeting(monkeypatch, 2, seconds=0.2)
    got = together([partial(call, ready, scale) for scale in scales])
    assert all(torch.equal(g, want[s]) for g, s in zip(got, scales, strict=True))
    assert [block.scale for block in model.blocks] == [1.0] * 3


@pytest.mark.parametrize(("scale", "alone"), [(None, False), (0.5, True)])
def test_a_graph_that_sets_a_scale_runs_alone(scale: float | None, alone: bool) -> None:
    model, inside = make(ScaledDiT), list[bool]()
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 1})
    turns = cached._engine.subject.turns
    model.blocks[0].register_forward_pre_hook(lambda *_: inside.append(bool(turns._alone)))
    call(cached, scale)
    inside.clear()
    cached(**toy_inputs(800.0), scale=scale)
    assert inside == [alone]


def test_a_capture_that_sets_a_scale_waits_for_graphs_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known to set scales, a model is captured alone."""
    model = make(ScaledDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 1})
    want = {scale: call(model, scale) for scale in (*SCALES, 3.0)}
    for scale in SCALES:
        call(cached, scale)
    meeting(monkeypatch, 2, seconds=0.2)
    got = together([partial(call, cached, scale) for scale in (None, 3.0)])
    assert torch.equal(got[0], want[None])
    assert torch.equal(got[1], want[3.0])


def test_graphs_that_set_nothing_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(ScaledDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 1})
    want = call(cached, None)
    meeting(monkeypatch, 2, seconds=PATIENCE)
    got = together([partial(call, cached, None)] * 2)
    assert ScaledBlock.met == 2 * len(model.blocks)
    assert all(torch.equal(g, want) for g in got)


# --- turns ---------------------------------------------------------------------------------------


def test_a_thread_enters_again() -> None:
    turns = Turns()
    with turns.alone(), turns.beside(), turns.alone(), turns.beside():
        pass
    with turns.beside(), turns.beside():
        pass
    with turns.alone():
        pass


@pytest.mark.parametrize("mine", ["alone", "beside"])
@pytest.mark.parametrize("theirs", ["alone", "beside"])
def test_who_waits_for_whom(mine: str, theirs: str) -> None:
    turns, inside = Turns(), threading.Event()

    def other() -> None:
        with getattr(turns, theirs)():
            inside.set()

    with getattr(turns, mine)():
        running = begun(other)
        assert inside.wait(PATIENCE if (mine, theirs) == ("beside", "beside") else 0.1) == (
            (mine, theirs) == ("beside", "beside")
        )
    running.result(PATIENCE)


def test_who_wants_to_go_alone_is_not_passed_by_others() -> None:
    turns, order = Turns(), list[str]()

    def enters(how: str) -> None:
        with getattr(turns, how)():
            order.append(how)

    with turns.beside():
        first = begun(partial(enters, "alone"))
        while not turns._waiting:
            pass
        second = begun(partial(enters, "beside"))
        with turns.beside():  # this thread is inside: it need not wait
            pass
        assert order == []
    for running in (first, second):
        running.result(PATIENCE)
    assert order == ["alone", "beside"]


def test_one_that_raises_leaves() -> None:
    turns = Turns()
    for how in (turns.alone, turns.beside):
        with pytest.raises(ZeroDivisionError), how():
            raise ZeroDivisionError
    begun(lambda: turns.alone().__enter__()).result(PATIENCE)
