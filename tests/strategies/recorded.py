"""A recorded run of a tiny model: the calls of one generation, and what the uncached model made.

The samples move on a line with uneven steps, so that a rule computes on some and not on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.toys import ToyDiT, make, toy_inputs

STEPS = 24


def model() -> nn.Module:
    return make(ToyDiT, depth=4)


def calls(steps: int = STEPS, span: float = 1000.0) -> list[dict[str, Any]]:
    """One sample moved towards another, faster in the middle; the timestep moves by `span`."""
    ends = [toy_inputs(0.0, seed=seed)["x"] for seed in (0, 1)]
    made = []
    for i in range(steps):
        way = 3 * (i / steps) ** 2 - 2 * (i / steps) ** 3
        inputs = toy_inputs(1000.0 - span * i / steps)
        made.append(inputs | {"x": (1 - way) * ends[0] + way * ends[1]})
    return made


def actions(cached: Any) -> str:
    """C for each computed step, r for any other."""
    timeline = cached.cache_report().timeline
    return "".join("C" if record.action == "computed" else "r" for record in timeline)


def run(cached: Callable[..., Any], given: list[dict[str, Any]] | None = None) -> list[Tensor]:
    return [cached(**inputs) for inputs in (calls() if given is None else given)]


def decided(strategy: str, **options: Any) -> str:
    """What the cached model did on the recorded run."""
    cached: CachedModel = dit_cache_fx.apply(model(), strategy, **options)
    run(cached)
    return actions(cached)


def streams(depth: int, given: list[dict[str, Any]] | None = None) -> list[tuple[Tensor, Tensor]]:
    """On each step of the uncached model: the input of its first block, the output of another."""
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}
    plain = model()
    first, last = plain.blocks[0], plain.blocks[depth - 1]  # type: ignore[index]
    first.register_forward_pre_hook(lambda _, args: seen["in"].append(args[0].clone()))
    last.register_forward_hook(lambda *call: seen["out"].append(call[-1].clone()))
    run(plain, given)
    return list(zip(seen["in"], seen["out"], strict=True))


def samples_and_outputs() -> list[tuple[Tensor, Tensor]]:
    plain = model()
    return [(inputs["x"], plain(**inputs)) for inputs in calls()]


def mean(tensor: Tensor) -> float:
    return tensor.abs().mean().item()


def letters(computed: list[bool]) -> str:
    return "".join("C" if c else "r" for c in computed)
