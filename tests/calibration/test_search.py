"""Recordings, what a predictor makes of them, and the search for schedules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_cache_fx import HiCache, NewtonCache, TaylorCache
from dit_cache_fx.calibration.engines import Call
from dit_cache_fx.calibration.probe import MAX_ELEMENTS, probe
from dit_cache_fx.calibration.programme import best_schedules
from dit_cache_fx.calibration.record import MAX_STEPS, Recorder, Trajectory
from dit_cache_fx.calibration.search import improved, neighbours
from dit_cache_fx.calibration.simulate import Recorded, factors
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.generation import Generation
from dit_cache_fx.strategies import Clock, Strategy
from dit_cache_fx.values.tensor_spec import TensorSpec
from tests.calibration.sampling import times

TIMES = tuple(times(10)[:-1])
SPEC = TensorSpec(torch.Size([4]), torch.float64, torch.device("cpu"))


def mask(steps: Sequence[int], number: int = 10) -> Tensor:
    found = torch.zeros(number, dtype=torch.bool)
    found[list(steps)] = True
    return found


def by_runtime(strategy: Strategy, values: Tensor) -> Tensor:
    """The outputs as the runtime makes them, by its own steps and clocks."""
    branch, specs = Branch(), {f"cached_{i}": SPEC for i in range(strategy.slots())}
    course = strategy.course(len(TIMES), TIMES)
    outputs = []
    for index, value in enumerate(values):
        step = Step(strategy, branch, index, specs, course)
        given = step.given([*Clock._fields, *specs])
        clock, held = Clock(*(given[n] for n in Clock._fields)), [given[n] for n in specs]
        if step.computes:
            outputs.append(value)
            held = [spec.zeros() for spec in specs.values()] if index == 0 else held
            step.commit([], [], list(strategy.store(held, value, None, clock)))
        else:
            outputs.append(strategy.reuse(held, None, clock))
    return torch.stack(outputs)


STRATEGIES: list[tuple[Any, dict[str, Any]]] = [
    (TaylorCache, {"max_order": 1}),
    (TaylorCache, {"corrector": 0.5}),
    (TaylorCache, {"corrector": 1.0, "axis": "timestep"}),
    (NewtonCache, {"corrector": 0.5, "axis": "timestep"}),
    (HiCache, {"corrector": 0.5}),
]


@pytest.mark.parametrize(("kind", "options"), STRATEGIES)
def test_factors_are_what_the_runtime_predicts_with(kind: Any, options: dict[str, Any]) -> None:
    schedules = [[0, 1, 2, 5, 9], [0, 4, 8], [0], [*range(10)]]
    values = torch.randn(10, 4, dtype=torch.float64)
    found = factors(
        kind(no_cache_steps={0}, **options), TIMES, torch.stack([*map(mask, schedules)])
    )
    for row, steps in zip(found, schedules, strict=True):
        right = by_runtime(kind(no_cache_steps=set(steps), **options), values)
        assert torch.allclose(row @ values, right, atol=1e-9)


# --- recordings ---------------------------------------------------------------------------------


def recorded(
    samples: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], times: Sequence[float]
) -> Trajectory:
    recorder, generation = Recorder(), Generation()
    for step, (time, sample) in enumerate(zip(times, samples, strict=True)):
        for output in outputs[step]:
            recorder(Call(generation, step, time, sample, output))
    (found,) = recorder.trajectories()
    return found


def euler(guided: bool = False) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Samples and outputs of a flow; guided: with two outputs a step, of which 3 and -2 count."""
    torch.manual_seed(1)
    x, samples, outputs = torch.randn(2, 40), [], []
    for now, then in itertools.pairwise((*TIMES, 0.0)):
        out = [torch.tanh(x + now), torch.cos(3 * x)] if guided else [torch.tanh(x + now)]
        samples.append(x)
        outputs.append(out)
        x = x + (then - now) * (3 * out[0] - 2 * out[1] if guided else out[0])
    return samples, outputs


def test_what_is_recorded_has_the_scalar_products_of_the_outputs() -> None:
    samples, outputs = euler()
    values = recorded(samples, outputs, TIMES).values
    stacked = torch.stack([o[0] for o in outputs]).double()
    right = torch.einsum("kse,mse->skm", stacked, stacked) / 40
    assert torch.allclose(values.transpose(1, 2) @ values, right, atol=1e-9)


def test_the_weights_are_the_moves_of_eulers_method() -> None:
    moves = torch.tensor([*TIMES, 0.0], dtype=torch.float64).diff()
    assert torch.allclose(recorded(*euler(), TIMES).weights, moves, atol=1e-5)


def test_the_branches_of_guidance_count_as_the_sampler_counts_them() -> None:
    samples, outputs = euler(guided=True)
    found = recorded(samples, outputs, TIMES)
    stacked = torch.stack([3 * a - 2 * b for a, b in outputs]).double()
    right = torch.einsum("kse,mse->skm", stacked, stacked) / 40
    assert torch.allclose(found.values.transpose(1, 2) @ found.values, right, atol=1e-4)
    batched = [torch.cat([s, s]) for s in samples]
    rows = recorded(batched, [[torch.cat(o)] for o in outputs], TIMES)
    assert torch.allclose(rows.values.transpose(1, 2) @ rows.values, right, atol=1e-4)


def test_the_weights_of_a_sampler_that_scales_its_sample() -> None:
    """`x' = a x + b v`: an error in v is scaled by the a of all steps behind."""
    torch.manual_seed(2)
    x, samples, outputs = torch.randn(1, 60), [], []
    scales, gains = [0.9, 1.1, 0.8, 1.2], [0.5, -0.3, 0.2, 0.1]
    for a, b in zip(scales, gains, strict=True):
        out = torch.sin(3 * x)
        samples.append(x)
        outputs.append([out])
        x = a * x + b * out
    weights = recorded(samples, outputs, [4.0, 3.0, 2.0, 1.0]).weights
    right = torch.tensor([0.5 * 1.1 * 0.8, -0.3 * 0.8, 0.2], dtype=torch.float64)
    assert torch.allclose(weights[:3], right, atol=1e-5)  # the last step's change is not seen


def test_outputs_of_another_size_than_the_sample_go_by_the_timesteps() -> None:
    samples, outputs = euler()
    wide = [torch.cat([s, s], dim=1) for s in samples]
    moves = torch.tensor([*TIMES, 0.0], dtype=torch.float64).diff()
    assert torch.equal(recorded(wide, outputs, TIMES).weights, moves)


def test_what_is_held_of_a_generation_is_bounded() -> None:
    assert probe(torch.randn(2, 3 * MAX_ELEMENTS)).numel() <= MAX_ELEMENTS
    assert torch.equal(probe(torch.ones(2, 3, 4)), torch.ones(2, 12))
    recorder, generation = Recorder(), Generation()
    for step in range(MAX_STEPS + 20):
        recorder(Call(generation, step, -float(step), torch.ones(1, 4), torch.ones(1, 4)))
    (steps,) = recorder._generations.values()
    assert len(steps.outputs) == MAX_STEPS
    assert len(recorder.timesteps[0]) == MAX_STEPS + 20
    assert recorder.trajectories() == []  # not all of its steps are there


# --- the search ---------------------------------------------------------------------------------


def curve(samples: int = 2) -> Recorded:
    """Outputs that bend most at the end."""
    t = torch.tensor(TIMES, dtype=torch.float64)
    values = torch.stack(
        [torch.stack([t**3, torch.exp(-(4 + i) * t)]).T for i in range(samples)], 1
    )
    return Recorded(TIMES, values, torch.tensor([*TIMES, 0.0], dtype=torch.float64).diff())


def cost(found: Recorded, axis: Tensor, steps: Sequence[int]) -> float:
    """By hand: lines through the last two computed values, each gap's error squared."""
    bends = found.values.diff(n=2, dim=0).square().sum(2).mean(0)
    total, ends = 0.0, [*steps, len(TIMES)]
    for place, (now, then) in enumerate(itertools.pairwise(ends)):
        error = torch.zeros_like(found.values[0])
        for k in range(now + 1, then):
            slope = torch.zeros_like(error)
            if place:
                before = ends[place - 1]
                slope = (found.values[now] - found.values[before]) / (axis[now] - axis[before])
            predicted = found.values[now] + slope * (axis[k] - axis[now])
            error += found.weights[k] * (predicted - found.values[k])
        total += float((error.square().sum(1) / bends).mean())
    return total


@pytest.mark.parametrize("by_timestep", [False, True])
def test_the_programme_finds_the_best_of_all_schedules(by_timestep: bool) -> None:
    found = curve()
    axis = torch.tensor(TIMES if by_timestep else range(10), dtype=torch.float64)
    best = best_schedules(found, axis, (1, 3, 5))
    for count in (1, 3, 5):
        rest = itertools.combinations(range(1, 10), count - 1)
        right = min(((0, *steps) for steps in rest), key=lambda steps: cost(found, axis, steps))
        assert best[count] == set(right)


def test_small_moves_only_gain() -> None:
    found, strategy = curve(), TaylorCache(no_cache_steps={0}, corrector=0.5)
    start = mask([0, 1, 2, 3])
    before = float(found.score(strategy, start[None])[0])
    better, score = improved(found, strategy, start)
    assert score > before + 3
    assert int(better.sum()) == 4
    assert bool(better[0])
    assert float(found.score(strategy, neighbours(better)).max()) < score + 0.011


def test_every_step_computed_is_best() -> None:
    strategy = TaylorCache(no_cache_steps={0})
    scores = curve().score(strategy, torch.stack([mask(range(10)), mask([0, 5])]))
    assert scores[0] > 250 > scores[1]
