"""`Strategy`: base class of the strategies, a few pure functions on tensors plus options.

A strategy never sees a model or a graph. The passes trace `store`, `measure` and `reuse` into the
compute and the reuse side of each cached run. If the strategy has a rule of its own for when to
compute, the runtime calls `should_compute`, or the one graph contains it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.ranks import Ranks, ranks_of
from dit_cache_fx.strategies.clock import Clock
from dit_cache_fx.strategies.course import Course
from dit_cache_fx.strategies.old_names import name_both_ways
from dit_cache_fx.strategies.schedule import (
    EvenSteps,
    EvenTimesteps,
    ListedSteps,
    Schedule,
    check_num_steps,
    check_ratio,
    named_schedule,
)
from dit_cache_fx.strategies.timesteps import Timesteps, checked_timesteps

#: the number of steps in a generation, or a function that returns it
NumSteps = int | Callable[[], int]
#: tensors that a rule passes from step to step
RuleState = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Strategy:
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
    #: whether `reuse` reads the input of the cached run on this step
    reads_start: ClassVar[bool] = False
    #: whether other streams than the sample's (text rows) have an input of their own too
    every_stream: ClassVar[bool] = False
    #: whether its rule handles a signal or a change that is not finite: it computes, and recovers
    #: on the next step; otherwise such a step computes, and the rule's state starts again
    bears_nans: ClassVar[bool] = False
    #: whether `Clock.gap` fades towards the end of a generation
    fading: ClassVar[bool] = False
    #: whether one run from the sample to the output is cached, instead of runs of blocks
    whole_model: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name_both_ways(cls)

    def __post_init__(self) -> None:
        steps, ids = _steps(self.no_cache_steps), _block_ids(self.no_cache_block_id)
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

    # --- on several devices ----------------------------------------------------------------

    @property
    def ranks(self) -> Ranks | None:
        """The processes that must decide alike; None if there is one, or none is known."""
        return self.process_group  # type: ignore[no-any-return]

    def totals(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return sums over all processes.

        Args:
            tensors (`Tensor`):
                Tensors of one shape and dtype.
        """
        if self.ranks is None:
            return tensors
        sums = self.ranks.total(torch.stack([t.double() for t in tensors]))
        return tuple(s.to(t.dtype) for s, t in zip(sums, tensors, strict=True))

    def means(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the mean of each tensor, over all of its parts if each process has one.

        A rule that uses these numbers decides on several devices as it does on one.

        Args:
            tensors (`Tensor`):
                The tensors, or this process's parts of them.
        """
        if self.ranks is None:
            return tuple(t.mean() for t in tensors)
        sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors])
        counts = torch.tensor([t.numel() for t in tensors], dtype=sums.dtype, device=sums.device)
        totals, sizes = self.totals(sums, counts)
        return tuple(m.to(t.dtype) for m, t in zip(totals / sizes, tensors, strict=True))

    def norms(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the norm of each tensor in float64, over all of its parts if each process has one.

        Args:
            tensors (`Tensor`):
                The tensors, or this process's parts of them.
        """
        wide = [t.double() for t in tensors]
        if self.ranks is None:
            return tuple(t.norm() for t in wide)
        return tuple(t.sqrt() for t in self.totals(*((t * t).sum() for t in wide)))

    # --- what to keep and what to give back ------------------------------------------------

    def slots(self) -> int:
        """Return the number of tensors held for each value that leaves a cached run."""
        return 1

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        """Return the tensors to hold, on a computed step.

        There are `slots()` of them, each with the shape and dtype of `value`. This function and
        `reuse` are traced once: do not change the arguments in place, and do not branch in Python
        on the value of a tensor. Otherwise the first call raises `VerifyError`.

        Args:
            held (`Sequence[Tensor]`):
                The `slots()` tensors held so far; zeros on the first computed step of a generation.
            value (`Tensor`):
                The computed value that leaves the cached run, usually `[batch, tokens, channels]`.
            start (`Tensor | None`):
                The same stream before the run, in the shape and dtype of `value`; None if the run
                has no such input. Only passed if the class sets `reads_start`.
            clock (`Clock`):
                The position of the step in its generation.
        """
        raise NotImplementedError

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        """Return the value that replaces the computed one, of the same shape and dtype.

        Args:
            held (`Sequence[Tensor]`):
                The tensors that `store` returned on the newest computed step.
            start (`Tensor | None`):
                The same stream before the run, on this step; as in `store`.
            clock (`Clock`):
                The position of the step in its generation.
        """
        raise NotImplementedError

    def stream_name(self) -> str:
        """Return the block argument that carries the stream; without it the graph decides."""
        return ""

    def measure(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Tensor | None:
        """Measure `value` on a computed step, for the rule and for reports.

        Returns a tensor of one dimension, or None if nothing is measured.

        Args:
            held (`Sequence[Tensor]`):
                The tensors held since the computed step before this one.
            value (`Tensor`):
                The computed value, as in `store`.
            start (`Tensor | None`):
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

    # --- when to compute (optional) --------------------------------------------------------

    @property
    def has_rule(self) -> bool:
        """Return whether `should_compute` takes part in the decision, besides the schedule."""
        return False

    def looks_at(self) -> str | tuple[str, ...]:
        """Return the name of the `signal` that the rule reads, or several names.

        At most one may be a value of the model: the first block's "modulated" input or its "input",
        its "conditioning", the timestep's "embedding", the "residual" (the sum that the always
        running blocks at the model's head add to their stream), or the "sample", the model's noisy
        input.

        The others are fields of `Clock` ("distance", "computed", "way"), and "measured", one row
        for each held value: the result of `measure` on the newest computed step. A rule that reads
        no value of the model runs on the CPU, and nothing is read from the device on a reused step.
        """
        return "modulated"

    def init_state(self, signal: Any) -> RuleState:
        """Return the state of the rule after the first step of a generation.

        Args:
            signal (`Any`):
                The tensor that `looks_at` names; a tuple of tensors if it names several.
        """
        raise NotImplementedError

    def should_compute(
        self, signal: Any, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        """Decide whether this step computes.

        Returns a boolean tensor of no dimensions, and the new state. The state keeps its number of
        tensors, their shapes and dtypes; nothing is changed in place. If the signal or the `metric`
        is not finite, the step computes and the state starts again (unless the class sets
        `bears_nans`).

        Args:
            signal (`Any`):
                The tensor that `looks_at` names; a tuple of tensors if it names several.
            state (`RuleState`):
                The state that the step before returned.
            forced (`Tensor`):
                Whether the step computes in any case: a boolean tensor of no dimensions.
        """
        raise NotImplementedError

    @property
    def threshold(self) -> float | None:
        """The number that the rule compares `metric` with, for reports; None if there is none."""
        return None

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        """Return the number that the rule compared in its last decision, for reports.

        It is a tensor of no dimensions, or None.

        Args:
            state (`RuleState`):
                The state of the rule; empty if it has none.
            measured (`Tensor`, *optional*):
                The result of `measure`, one row for each held value; None if nothing is measured.
        """
        return None

    def _rule_hint(self) -> str:
        return ""

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


_S = TypeVar("_S", bound=Strategy)


def spread_over(strategy: _S, ranks: Ranks | None) -> _S:
    """Return the strategy for a model run by these processes; the user's group has priority."""
    return strategy if ranks is None or strategy.ranks is not None else _with(strategy, ranks)


def without_ranks(strategy: _S) -> _S:
    """Return the strategy for values that need no other process."""
    return strategy if strategy.ranks is None else _with(strategy, None)


def _with(strategy: _S, ranks: Ranks | None) -> _S:
    other = copy.copy(strategy)
    object.__setattr__(other, "process_group", ranks)
    return other


def options_of(strategy: type[Strategy]) -> list[str]:
    """Return the names of a strategy's options."""
    return [f.name for f in fields(strategy)]


def _steps(steps: Any) -> frozenset[int] | None:
    if steps is None:
        return None
    expected = "a collection of step indices: integers from 0"
    try:
        items = [_index(s) for s in steps]
    except TypeError:
        raise OptionError("no_cache_steps", steps, expected) from None
    if any(s < 0 for s in items):
        raise OptionError("no_cache_steps", sorted(items), expected)
    return frozenset(items)


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    return operator.index(value)


def _block_ids(ids: Any) -> dict[str, frozenset[int]] | None:
    if ids is None:
        return None
    expected = (
        "a mapping from the name of a block list to a collection of block indices (integers from 0)"
    )
    try:
        items = {str(k): frozenset(_index(i) for i in v) for k, v in dict(ids).items()}
    except (TypeError, ValueError):
        raise OptionError("no_cache_block_id", ids, expected) from None
    if any(i < 0 for v in items.values() for i in v):
        raise OptionError("no_cache_block_id", ids, expected)
    return items
