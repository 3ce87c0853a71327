"""`Strategy`: base class of the strategies, a few pure functions on tensors plus options.

A strategy never sees a model or a graph. The passes trace `store`, `measure` and `reuse` into the
compute and the reuse side of each cached run. If the strategy has a rule of its own for when to
compute, the runtime calls `should_compute`, or the one graph contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.ranks import ranks_of
from dit_cache_fx.strategies.across_ranks import AcrossRanks
from dit_cache_fx.strategies.checks import (
    check_num_steps,
    check_ratio,
    checked_block_ids,
    checked_steps,
)
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.course import Course
from dit_cache_fx.strategies.even import EvenSteps, EvenTimesteps
from dit_cache_fx.strategies.old_names import name_both_ways
from dit_cache_fx.strategies.presets import named_schedule
from dit_cache_fx.strategies.rule import Rule
from dit_cache_fx.strategies.schedule import ListedSteps, Schedule
from dit_cache_fx.strategies.timesteps import Timesteps, checked_timesteps

#: the number of steps in a generation, or a function that returns it
NumSteps = int | Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Strategy(Rule, AcrossRanks):
    """Base class of the strategies. A subclass defines `store` and `reuse`.

    One of the first four options selects the steps to compute in full; the first step of a
    generation always computes. A strategy with a rule of its own needs none of them: the steps that
    they select compute in addition to those that the rule chooses. On every other step the
    strategy's `reuse` replaces the cached blocks.

    Args:
        no_cache_steps (`Iterable[int]`, *optional*):
            The indices of the steps to compute, counted from 0 in each generation.
        compute_ratio (`float`, *optional*):
            The share of the steps to compute, above 0 and at most 1, evenly spaced by index.
        schedule (`str | Schedule`, *optional*):
            A preset ("quality", "balanced" or "fast"), or a `Schedule` object.
        computed_steps (`int`, *optional*):
            The number of steps to compute, from 1, evenly spaced in timestep: short for
            `schedule=EvenTimesteps(computed_steps)`.
        num_steps (`int | Callable[[], int]`, *optional*):
            The number of steps in a generation, from 1, or a function that returns it and is called
            at the first call of each generation. When None, as many as the generation before had.
        timesteps (`Iterable[float] | Callable[[], Iterable[float]]`, *optional*):
            The timesteps of the calls of a generation, in order: a flat sequence, tensor or array
            of finite numbers, in any unit that models take (0 to 1000, 0 to 1), or a function that
            returns them and is called at the first call of each generation, for example
            `lambda: pipe.scheduler.timesteps`. When None, those of the generation before.
        no_cache_block_id (`Mapping[str, Iterable[int]]`, *optional*):
            The blocks that run on every step: for each block list, their indices. Use the model's
            name of the list; "double_blocks" and "single_blocks" are the first and the second list.
        process_group (`ProcessGroup | DeviceMesh`, *optional*):
            The processes that run the model together (by context, tensor or data parallelism),
            which must decide alike. When None, they are found if the model's weights or the
            tensors of a call are DTensors, and from the parallel configuration of diffusers.

    Raises:
        OptionError: An option has a value that cannot work, two options select the steps, or none
            does.

    Example:
        >>> options = dict(compute_ratio=0.5, no_cache_block_id={"double_blocks": {0}})
        >>> cached = dit_cache_fx.apply(model, "deepcache", **options)
    """

    no_cache_steps: frozenset[int] | None = None
    compute_ratio: float | None = None
    schedule: str | Schedule | None = None
    computed_steps: int | None = None
    num_steps: NumSteps | None = None
    timesteps: Timesteps | None = None
    no_cache_block_id: Mapping[str, Iterable[int]] | None = None
    process_group: Any = None

    #: its name for `apply(model, strategy=...)`
    name: ClassVar[str] = ""
    #: the name in reports for a step that is not computed
    action: ClassVar[str] = "reused"
    #: whether `store`, `reuse` and `measure` get the run's input
    reads_run_input: ClassVar[bool] = False
    #: whether other streams than the sample's (text rows) have a run input too
    every_stream: ClassVar[bool] = False
    #: whether `Clock.gap` fades towards the end of a generation
    fading: ClassVar[bool] = False
    #: whether one run from the sample to the output is cached, instead of runs of blocks
    whole_model: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name_both_ways(cls)

    def __post_init__(self) -> None:
        steps = checked_steps(self.no_cache_steps)
        ids = checked_block_ids(self.no_cache_block_id)
        object.__setattr__(self, "no_cache_steps", steps)
        object.__setattr__(self, "process_group", ranks_of(self.process_group))
        object.__setattr__(self, "no_cache_block_id", ids)
        self._check_schedule()
        self._check_length()

    @cached_property
    def plan(self) -> Schedule | None:
        """The schedule, however it was given; None if the rule alone decides."""
        if self.no_cache_steps is not None:
            return ListedSteps(self.no_cache_steps)
        if self.compute_ratio is not None:
            return EvenSteps(self.compute_ratio)
        if self.computed_steps is not None:
            return EvenTimesteps(self.computed_steps)
        return None if self.schedule is None else named_schedule(self.schedule)

    def course(
        self, num_steps: int | None = None, timesteps: tuple[float, ...] | None = None
    ) -> Course:
        """Return the steps of a generation, as far as they are known.

        Args:
            num_steps (`int`, *optional*):
                The number of steps.
            timesteps (`tuple[float, ...]`, *optional*):
                The timesteps of its calls.
        """
        course = Course(self.plan, num_steps, timesteps)
        return replace(
            course, ruled=self.has_rule, by_timestep=self.by_timestep, fading=self.fading
        )

    def scheduled(self, step: int, num_steps: int | None = None) -> bool:
        """Return whether a step computes whatever the rule decides.

        Args:
            step (`int`):
                The step, counted from 0.
            num_steps (`int`, *optional*):
                The number of steps in the generation. It may turn out too small.
        """
        return self.course(num_steps).computes(step)

    @property
    def by_timestep(self) -> bool:
        """Whether distances are differences of timesteps instead of numbers of steps."""
        return False

    @property
    def needs_timesteps(self) -> bool:
        """Whether the strategy benefits from knowing a generation's timesteps in advance."""
        return self.by_timestep or (self.plan is not None and self.plan.needs_timesteps)

    # --- what to keep and what to give back ------------------------------------------------

    def slots(self) -> int:
        """Return the number of tensors held for each value that leaves a cached run."""
        return 1

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        """Return the tensors to cache, on a computed step.

        There are `slots()` of them, each with the shape and dtype of `value`. This function and
        `reuse` are traced once: do not change the arguments in place, and do not branch in Python
        on the value of a tensor. Otherwise the first call raises `VerifyError`.

        Args:
            cached (`Sequence[Tensor]`):
                The `slots()` tensors cached so far; zeros on the first computed step of a
                generation.
            value (`Tensor`):
                The computed value that leaves the cached run, usually `[batch, tokens, channels]`.
            run_input (`Tensor | None`):
                The same stream before the run, in the shape and dtype of `value`; None if the run
                has no such input. Only passed if the class sets `reads_run_input`.
            clock (`Clock`):
                The position of the step in its generation.
        """
        raise NotImplementedError

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        """Return the value that replaces the computed one, of the same shape and dtype.

        Args:
            cached (`Sequence[Tensor]`):
                The tensors that `store` returned on the newest computed step.
            run_input (`Tensor | None`):
                The same stream before the run, on this step; as in `store`.
            clock (`Clock`):
                The position of the step in its generation.
        """
        raise NotImplementedError

    def stream_name(self) -> str:
        """Return the block argument that carries the stream; without it the graph decides."""
        return ""

    def measure(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> Tensor | None:
        """Measure `value` on a computed step, for the rule and for reports.

        Returns a tensor of one dimension, or None if nothing is measured.

        Args:
            cached (`Sequence[Tensor]`):
                The tensors cached since the computed step before this one.
            value (`Tensor`):
                The computed value, as in `store`.
            run_input (`Tensor | None`):
                The same stream before the run, as in `store`.
            clock (`Clock`):
                The position of the step in its generation.
        """
        return None

    def always_runs(self, position: int, blocks: int) -> bool:
        """Return whether a block runs on every step.

        Args:
            position (`int`):
                The index of the block among all calls of blocks, from 0.
            blocks (`int`):
                The number of all calls of blocks.
        """
        return False

    # --- options that cannot work ----------------------------------------------------------

    def _check_schedule(self) -> None:
        ways = ("no_cache_steps", "compute_ratio", "schedule", "computed_steps")
        given = [name for name in ways if getattr(self, name) is not None]
        if not given and not self.has_rule and self.plan is None:
            raise OptionError(
                "no_cache_steps",
                None,
                (
                    "the indices of the steps to compute in full, for example "
                    "interval_schedule(50, 11, 45, 4) or range(0, 50, 2), or instead "
                    "compute_ratio=0.5 or schedule='balanced'"
                )
                + self._rule_hint(),
            )
        if len(given) > 1:
            value = getattr(self, given[1])
            raise OptionError(given[1], value, f"{given[0]} is given too: pass one of {list(ways)}")
        if self.compute_ratio is not None:
            check_ratio("compute_ratio", self.compute_ratio)
        if self.schedule is not None:
            named_schedule(self.schedule)
        if self.computed_steps is not None:
            EvenTimesteps(self.computed_steps)

    def _check_length(self) -> None:
        """Check `num_steps` and `timesteps` against each other, if both are numbers."""
        if self.timesteps is not None and not callable(self.timesteps):
            object.__setattr__(self, "timesteps", checked_timesteps(self.timesteps))
        if self.num_steps is not None and not callable(self.num_steps):
            check_num_steps(self.num_steps)
        number = None if callable(self.num_steps) else self.num_steps
        if isinstance(self.timesteps, tuple):
            if number not in (None, len(self.timesteps)):
                expected = f"there are {len(self.timesteps)} timesteps: pass only one of both"
                raise OptionError("num_steps", number, expected)
            number = len(self.timesteps)
        if self.plan is not None and number is not None:
            self.plan.check(number)
