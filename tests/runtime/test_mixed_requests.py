"""Requests drawn at random, their steps in a random order, one cached model.

Each is denoised with what the model gives, so that a wrong answer shows in all that follow. Every
call must give, bit by bit, what the blocks give or gave in an earlier call of the same request; and
the request as a whole what it gives alone.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.toys import (
    ByHand,
    InPlaceDiT,
    JoinedDiT,
    ToyDiT,
    UShapeDiT,
    make,
    toy_inputs,
)
from tests.zoo import flat

COMPUTED = frozenset(range(0, 20, 3))


@dataclass(frozen=True)
class Plan:
    """One request. `values`: its timesteps from 1 to 0; some come twice.

    `guided`: the steps with guidance, in a call of its own or in one batch. `failing`, `gradients`,
    `autocast`: the steps at which the first attempt raises, at which gradients are on, and from
    which on there is autocast.
    """

    seed: int
    values: tuple[float, ...]
    batched: bool
    guided: frozenset[int]
    failing: frozenset[int]
    gradients: frozenset[int]
    autocast: int

    @staticmethod
    def drawn(seed: int) -> Plan:
        draw = random.Random(seed)
        steps, shift, first = draw.choice((5, 8)), draw.choice((1, 3)), draw.choice((0, 0, 2))
        left = [1 - i / steps for i in range(first, steps)]
        values = [shift * u / (1 + (shift - 1) * u) for u in left]
        some = draw.choice((values, values[:2] + values[1:], [v for v in values for _ in (0, 1)]))
        steps, batched = len(some), draw.random() < 0.5
        guided = frozenset(i for i in range(steps) if draw.random() < 0.7)
        if batched and len(set(some)) < steps:  # another form at the same timestep is no step
            guided = draw.choice((frozenset(), frozenset(range(steps))))
        return Plan(
            seed,
            tuple(some),
            batched,
            guided,
            frozenset(i for i in range(steps) if draw.random() < 0.1),
            frozenset(i for i in range(1, steps) if draw.random() < 0.1),
            draw.choice((99, 99, 3)) if len(set(some)) == steps else 99,
        )

    def calls(self, step: int, x: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
        """The branches of a step."""
        time = 1000 * self.values[step]
        cond, uncond = (toy_inputs(time, prompt=p)["text"] for p in (self.seed, 99))
        named = [("cond", x, cond)]
        if step in self.guided and self.batched:
            named = [("both", x.repeat(2, 1, 1), torch.cat([uncond, cond]))]
        elif step in self.guided:
            named.append(("uncond", x, uncond))
        for name, sample, text in named:
            timestep = torch.full([len(sample)], time)
            yield name, {"x": sample, "timestep": timestep, "text": text}


class Fails:
    """A hook that raises when it is wanted to."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, *_: Any) -> None:
        if self.wanted:
            self.wanted = False
            raise ZeroDivisionError


def denoised(
    cached: CachedModel, plan: Plan, told: Callable[[CachedModel, Plan], Any], fails: Fails
) -> Iterator[Tensor]:
    """Each step's sample. `told`: gives the context that tells the request's calls."""
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(plan.seed))
    by_hand, within = ByHand(cached._model, ["blocks"]), told(cached, plan)
    for step, value in enumerate(plan.values):
        outputs = []
        for name, inputs in plan.calls(step, x):
            with ExitStack() as stack:
                stack.enter_context(within())
                stack.enter_context(cached.cache_context(name))
                if step >= plan.autocast:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                outputs.append(_answer(cached, plan, step, name, inputs, by_hand, fails))
        following = plan.values[step + 1] if step + 1 < len(plan.values) else 0.0
        x = x + (following - value - 0.01) * outputs[0][:1].tanh()
        yield x


def _answer(
    cached: CachedModel,
    plan: Plan,
    step: int,
    name: str,
    inputs: dict[str, Any],
    by_hand: ByHand,
    fails: Fails,
) -> Tensor:
    if step in plan.gradients:
        with torch.enable_grad():
            return cached(**inputs).detach()
    if step in plan.failing:
        fails.wanted = True
        try:
            return _checked(cached, step, name, inputs, by_hand, plan)
        except ZeroDivisionError:
            pass
        finally:  # no block runs on a reused step
            fails.wanted = False
    return _checked(cached, step, name, inputs, by_hand, plan)


def _checked(
    cached: CachedModel, step: int, name: str, inputs: dict[str, Any], by_hand: ByHand, plan: Plan
) -> Tensor:
    output = cached(**inputs)
    action = cached.cache_report().timeline[-1].action
    branch = (name, step >= plan.autocast)
    want = by_hand(action == "computed", branch=branch, **inputs)
    assert torch.equal(flat(output), flat(want)), (plan, step, name)
    return flat(output).reshape(inputs["x"].shape).float()


def in_session(cached: CachedModel, plan: Plan) -> Any:
    session = cached.new_session()
    return lambda: session


def in_context(cached: CachedModel, plan: Plan) -> Any:
    return lambda: cached.cache_context(f"request {plan.seed}")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (ToyDiT, in_session),
        (ToyDiT, in_context),
        (JoinedDiT, in_context),
        (UShapeDiT, in_session),
        (InPlaceDiT, in_session),
    ],
)
def test_each_gets_what_it_gets_alone(kind: Any, told: Any, seed: int) -> None:
    model = make(kind)
    fails = Fails()
    model.get_submodule("blocks.1").register_forward_pre_hook(fails)
    draw = random.Random(seed)
    plans = [Plan.drawn(draw.randrange(10**6)) for _ in range(3)]

    def cache() -> CachedModel:
        return dit_cache_fx.apply(model, "deepcache", no_cache_steps=COMPUTED)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not cached: gradients", dit_cache_fx.DitCacheWarning)
        alone = [list(denoised(cache(), plan, told, fails)) for plan in plans]
        cached = cache()
        under_way = [denoised(cached, plan, told, fails) for plan in plans]
        got: list[list[Tensor]] = [[] for _ in plans]
        while any(len(g) < len(a) for g, a in zip(got, alone, strict=True)):
            place = draw.randrange(len(plans))
            got[place] += [x for x in [next(under_way[place], None)] if x is not None]
    for mine, want, plan in zip(got, alone, plans, strict=True):
        assert all(map(torch.equal, mine, want)), plan
    assert cached.cache_report().calls_reused > 0
