"""A step does not make the host wait for the device, or once: to read the timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx.runtime import call_log
from tests.device.places import CUDA, each_device, on
from tests.device.waits import Counted, counted, profiled
from tests.toys import ToyDiT, make, toy_inputs

STEPS, COMPUTED = 8, {0, 2, 5}
#: the second generation is looked at: its graphs are there
WARM = 1

#: where the timestep is, whether the step is told, and how often a step may wait
HOW = {
    "timestep on the CPU": (True, False, 0),
    "cur_timestep": (False, True, 0),
    "timestep on the device": (False, False, 1),
}
each_way = pytest.mark.parametrize(("on_cpu", "told", "allowed"), HOW.values(), ids=HOW)
each_strategy = pytest.mark.parametrize("strategy", ["deepcache", "teacache", "taylorcache"])
compilers: list[dict[str, Any] | None] = [None, {}]
each_form = pytest.mark.parametrize("options", compilers, ids=["eager", "compile_steps"])


class MovingDiT(ToyDiT):
    """It takes a timestep from the CPU."""

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        return super().condition(timestep.to(text.device), text)


def steps(cached: Any, device: str, on_cpu: bool, told: bool) -> list[Callable[[], Tensor]]:
    """The calls of a generation, conditioning of the same tensor."""
    text = on(device, toy_inputs(0.0)["text"])

    def call(step: int) -> Callable[[], Tensor]:
        inputs = toy_inputs(1000.0 - 100 * step, seed=step)
        timestep = inputs["timestep"] if on_cpu else on(device, inputs["timestep"])
        x = on(device, inputs["x"])

        def made() -> Tensor:
            if told:
                cached.cur_timestep = step
            return cached(x, timestep, text)  # type: ignore[no-any-return]

        return made

    return [call(step) for step in range(STEPS)]


def generations(cached: Any, device: str, on_cpu: bool, told: bool) -> list[Counted]:
    """What each step of a warm generation has waited for."""
    with torch.no_grad():
        for _ in range(WARM):
            for call in steps(cached, device, on_cpu, told):
                call()
        return [profiled(call) for call in steps(cached, device, on_cpu, told)]


def cached_on(device: str, strategy: str, options: dict[str, Any] | None) -> Any:
    cached = dit_cache_fx.apply(make(MovingDiT).to(device), strategy, no_cache_steps=COMPUTED)
    if options is not None:
        cached.compile_steps(**options)
    return cached


@pytest.mark.parametrize("device", [CUDA])
@each_form
@each_strategy
@each_way
def test_waits_of_a_step(
    device: str,
    strategy: str,
    on_cpu: bool,
    told: bool,
    allowed: int,
    options: dict[str, Any] | None,
) -> None:
    if on_cpu and options is not None:
        pytest.skip("a compiled graph takes its inputs on one device")
    cached = cached_on(device, strategy, options)
    first, *later = [c.waits for c in generations(cached, device, on_cpu, told)]
    assert first <= 1 + allowed  # the next generation's prompt is another tensor: it is compared
    assert max(later) <= allowed, later


@each_device
@each_strategy
@each_way
def test_how_often_the_timestep_is_read(
    device: str,
    strategy: str,
    on_cpu: bool,
    told: bool,
    allowed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it is on the device each reading is a wait; there may be one in a step."""
    read: list[str] = []
    value_of = call_log.timestep_value

    def reading(timestep: Tensor) -> Any:
        read.append(timestep.device.type)
        return value_of(timestep)

    monkeypatch.setattr(call_log, "timestep_value", reading)
    cached = cached_on(device, strategy, None)
    with torch.no_grad():
        for call in steps(cached, device, on_cpu, told):
            read.clear()
            call()
            assert len(read) == (0 if told else 1)
            assert read.count("cuda") <= allowed


def _not_read(timestep: Tensor) -> None:
    pytest.fail("it is read")


def _as_if_on_a_device(tensor: Tensor) -> bool:
    return False


@each_device
def test_timesteps_of_a_sampler_are_read_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call's is a part of the run's tensor: read with the first one, and not again."""
    monkeypatch.setattr(call_log, "timestep_value", _not_read)
    if device == "cpu":
        monkeypatch.setattr(call_log, "is_on_host", _as_if_on_a_device)
    model = make(ToyDiT).to(device)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=COMPUTED)
    text = on(device, toy_inputs(0.0)["text"])
    for start in (1000.0, 950.0):
        timesteps = torch.linspace(start, 100.0, STEPS, device=device)
        with torch.no_grad():
            for step, timestep in enumerate(timesteps):
                x = on(device, toy_inputs(0.0, seed=step)["x"])
                waits = profiled(lambda x=x, t=timestep: cached(x, t.expand(1), text)).waits
                if start < 1000.0 and step > 0:
                    assert waits == 0
        timeline = cached.cache_report().timeline
        assert [r.timestep for r in timeline] == timesteps.tolist()
        assert [r.step for r in timeline if r.action == "computed"] == sorted(COMPUTED)


def test_the_counter_counts() -> None:
    """On the CPU too: what reads a value, whether or not a device is waited for."""
    tensor = torch.ones(3)

    def twice() -> None:
        tensor.sum().item()
        torch.equal(tensor, tensor + 1)
        tensor + 1

    assert profiled(twice).reads >= 2
    assert profiled(lambda: tensor + 1) == Counted(0, 0)
    events = ["aten::add", "cudaStreamSynchronize", "cudaLaunchKernel", "aten::equal"]
    assert counted(events) == Counted(1, 1)
