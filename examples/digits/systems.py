"""The systems that the demo compares: samplers with fewer steps and cached models."""

from dataclasses import dataclass, field
from typing import Any

import dit_cache_fx
from examples.flow.sampling import Sampler, adams_bashforth2, euler, times


@dataclass(frozen=True)
class System:
    """A sampler with the times of its steps and, if `strategy` is set, the cache of its model."""

    name: str
    sampler: Sampler
    at: list[float]
    strategy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.at) - 1


@dataclass(frozen=True)
class Section:
    """Systems that compute the same number of steps."""

    title: str
    systems: list[System]


CACHED: list[tuple[str, str, dict[str, Any]]] = [
    ("DeepCache", "deepcache", {}),
    ("TeaCache", "teacache", {}),
    ("TaylorCache order 1", "taylorcache", {"max_order": 1}),
    ("TaylorCache order 2", "taylorcache", {"max_order": 2}),
    ("NewtonCache", "newtoncache", {}),
]


@dataclass(frozen=True)
class Comparison:
    """The sampler that the caches approximate: so many Euler steps with a timestep shift."""

    steps: int
    shift: float

    @property
    def at(self) -> list[float]:
        return times(self.steps, self.shift)

    def uncached(self) -> System:
        """What the cached systems approximate."""
        return System(f"Euler, {self.steps} steps, no cache", euler, self.at)

    def reference(self, steps: int) -> System:
        """A near-exact solution of the flow."""
        name = f"Adams-Bashforth 2, {steps} steps"
        return System(name, adams_bashforth2, times(steps, self.shift))

    def section(self, title: str, few: int, **schedule: Any) -> Section:
        """Few-step samplers against every strategy with `few` computed steps."""
        few_times, told = times(few, self.shift), {"timesteps": self.at[:-1], **schedule}
        plain = [
            System("Euler, fewer steps", euler, few_times),
            System("Adams-Bashforth 2, fewer steps", adams_bashforth2, few_times),
        ]
        cached = [
            System(name, euler, self.at, strategy, {**told, **options})
            for name, strategy, options in CACHED
        ]
        return Section(title, plain + cached)

    def by_noise_level(self, few: int) -> Section:
        title = f"{few} of {self.steps} steps computed, even by noise level"
        return self.section(title, few, computed_steps=few)

    def by_index(self, few: int) -> Section:
        title = f"{few} of {self.steps} steps computed, even by index"
        return self.section(title, few, no_cache_steps=even_schedule(self.steps, few))

    def published(self) -> Section:
        """The interval schedule published for 50 steps, (11, 45, 4), stretched."""
        steps = self.steps
        schedule = dit_cache_fx.interval_schedule(steps, round(0.22 * steps), round(0.9 * steps), 4)
        title = f"{len(schedule)} of {steps} steps computed, interval schedule"
        return self.section(title, len(schedule), no_cache_steps=schedule)

    def variants(self, threshold: float, tolerance: float) -> Section:
        """A block that is always computed, and steps that are chosen at run time."""
        told = {"timesteps": self.at[:-1]}
        last_block = {
            "computed_steps": max(1, self.steps // 5),
            "no_cache_block_id": {"blocks": {7}},
        }
        rule = {"rel_l1_thresh": threshold, "coefficients": [1.0, 0.0]}  # the identity
        near = {"tolerance": tolerance}
        systems = [
            ("DeepCache, block 7 not cached", "deepcache", last_block),
            (f"TeaCache, threshold {threshold:g}", "teacache", rule),
            (f"NewtonCache, tolerance {tolerance:g}", "newtoncache", near),
        ]
        return Section(
            "variants: a block that is not cached; steps chosen at run time",
            [System(n, euler, self.at, s, {**told, **options}) for n, s, options in systems],
        )

    def sections(self, threshold: float, tolerance: float) -> list[Section]:
        """Everything in the table below the baseline."""
        half, fifth, seventh = (max(2, self.steps // part) for part in (2, 5, 7))
        return [
            *map(self.by_noise_level, (half, fifth, seventh)),
            self.by_index(fifth),
            self.published(),
            self.variants(threshold, tolerance),
        ]


def even_schedule(steps: int, computed: int) -> set[int]:
    """`computed` steps spread evenly by index, the first and the last among them."""
    return {round(index * (steps - 1) / (computed - 1)) for index in range(computed)}
