"""The systems that the demo compares: samplers with fewer steps and cached models."""

from dataclasses import dataclass, field
from typing import Any

import dit_cache_fx
from examples.digits.sampling import Sampler, adams_bashforth2, euler


@dataclass(frozen=True)
class System:
    """A sampler with its number of steps and, if `strategy` is set, the cache of its model."""

    name: str
    sampler: Sampler
    steps: int
    strategy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Systems that compute the same number of steps."""

    title: str
    systems: list[System]


def even_schedule(steps: int, computed: int) -> set[int]:
    """`computed` steps spread evenly over range(steps), step 0 among them."""
    return {index * steps // computed for index in range(computed)}


def published_schedule(steps: int) -> set[int]:
    """The interval schedule published for 50 steps, (11, 45, 4), stretched to `steps`."""
    return dit_cache_fx.interval_schedule(steps, round(0.22 * steps), round(0.9 * steps), 4)


def section(title: str, steps: int, schedule: set[int]) -> Section:
    """Few-step samplers against every strategy with the computed steps in `schedule`."""
    few = len(schedule)
    cached = [
        ("DeepCache", "deepcache", {}),
        ("TeaCache", "teacache", {}),
        ("TaylorCache order 1", "taylorcache", {"max_order": 1}),
        ("TaylorCache order 2", "taylorcache", {"max_order": 2}),
    ]
    plain = [
        System("Euler, fewer steps", euler, few),
        System("Adams-Bashforth 2, fewer steps", adams_bashforth2, few),
    ]
    return Section(
        title,
        plain
        + [
            System(name, euler, steps, strategy, {"no_cache_steps": schedule, **options})
            for name, strategy, options in cached
        ],
    )


def uncached(steps: int) -> System:
    """What the cached systems approximate."""
    return System(f"Euler, {steps} steps, no cache", euler, steps)


def reference(steps: int) -> System:
    """A near-exact solution of the flow."""
    return System(f"Adams-Bashforth 2, {steps} steps", adams_bashforth2, steps)


def variants(steps: int, threshold: float) -> Section:
    """Other blocks (the last one is always computed), and other steps (chosen at run time)."""
    schedule = even_schedule(steps, max(1, steps // 5))
    last_block = {"no_cache_steps": schedule, "no_cache_block_id": {"blocks": {7}}}
    rule = {"rel_l1_thresh": threshold, "coefficients": [1.0, 0.0]}  # the identity
    return Section(
        "variants: a block that is not cached; steps chosen at run time",
        [
            System("DeepCache, block 7 not cached", euler, steps, "deepcache", last_block),
            System(f"TeaCache, threshold {threshold:g}", euler, steps, "teacache", rule),
        ],
    )


def sections(steps: int, threshold: float) -> list[Section]:
    """Everything in the table below the baseline."""
    even = [
        section(f"{few} of {steps} steps computed, evenly spaced", steps, even_schedule(steps, few))
        for few in (max(1, steps // part) for part in (2, 5, 7))
    ]
    published = published_schedule(steps)
    title = f"{len(published)} of {steps} steps computed, interval schedule"
    return [*even, section(title, steps, published), variants(steps, threshold)]
