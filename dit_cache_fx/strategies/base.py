"""What a strategy is: a few pure functions on tensors, and options.

A strategy never sees a model or a graph. The passes trace `store`, `measure` and `reuse` into the
compute and the reuse side of each cached run. Where the strategy has a rule of its own for when to
compute, the runtime calls `should_compute`, or the one graph has it inside.
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

#: how many steps a generation has, or what tells it
NumSteps = int | Callable[[], int]
#: what a rule remembers from step to step
RuleState = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of the strategies; a subclass defines `store` and `reuse`.

    Which steps are computed in full (a generation's first always is), one of: `no_cache_steps`, the
    steps, counted from the generation's first; `compute_ratio`, a share of them, evenly spaced;
    `computed_steps`, their number, evenly spaced in timestep (`EvenTimesteps`); `schedule`,
    "quality", "balanced" or "fast", or a `Schedule` object.

    `num_steps`: how many steps a generation has, or a function that tells at its first call;
    without it, as many as the one before had. `timesteps`: the timesteps of its calls (a sequence,
    tensor or array), or a function that is asked at its first call, such as
    `lambda: pipe.scheduler.timesteps`; without it, those that the generation before had.

    `no_cache_block_id`: block list -> ids that are never cached; a list is named as the model names
    it, or "double_blocks" / "single_blocks" for the first / second.

    `process_group`: a process group or a `DeviceMesh` of the processes that run the model together
    (by context, tensor or data parallelism), which must decide alike. Found where the model's
    weights or the call's tensors are DTensors, and from the parallel configuration of diffusers.
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
    #: what a step that is not computed is called in reports
    action: ClassVar[str] = "reused"
    #: whether `reuse` reads what the cached run starts from on this step
    reads_start: ClassVar[bool] = False
    #: whether other streams than the sample's (text rows) start from themselves too
    every_stream: ClassVar[bool] = False
    #: whether its rule computes by itself where a signal or a change is no number, and goes on
    #: from the next step; else such a step computes, and the rule's state begins again
    bears_nans: ClassVar[bool] = False
    #: whether `Clock.gap` fades towards a generation's end
    fading: ClassVar[bool] = False
    #: whether one run of everything from the sample to the output is cached, not runs of blocks
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
        """The schedule, in whichever way it was given; None where the rule alone decides."""
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
        """A generation's steps by what is known of it."""
        course = Course(self.plan, num_steps, timesteps)
        return replace(
            course, ruled=self.has_rule, by_timestep=self.by_timestep, fading=self.fading
        )

    def scheduled(self, step: int, num_steps: int | None = None) -> bool:
        """Whether a step is computed in any case; the number of steps may turn out too small."""
        return self.course(num_steps).computes(step)

    @property
    def by_timestep(self) -> bool:
        """Whether distances are differences of timesteps, not numbers of steps."""
        return False

    @property
    def needs_timesteps(self) -> bool:
        """Whether it does better where a generation's timesteps are known beforehand."""
        return self.by_timestep or (self.plan is not None and self.plan.needs_timesteps)

    # --- on several devices ----------------------------------------------------------------

    @property
    def ranks(self) -> Ranks | None:
        """The processes that must decide alike; None where there is one, or none is known."""
        return self.process_group  # type: ignore[no-any-return]

    def totals(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sums over all processes. The tensors are of one shape."""
        if self.ranks is None:
            return tensors
        sums = self.ranks.total(torch.stack([t.double() for t in tensors]))
        return tuple(s.to(t.dtype) for s, t in zip(sums, tensors, strict=True))

    def means(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The mean of each tensor, over all of its parts where each process has one.

        A rule that takes its numbers from here decides on several devices as it does on one.
        """
        if self.ranks is None:
            return tuple(t.mean() for t in tensors)
        sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors])
        counts = torch.tensor([t.numel() for t in tensors], dtype=sums.dtype, device=sums.device)
        totals, sizes = self.totals(sums, counts)
        return tuple(m.to(t.dtype) for m, t in zip(totals / sizes, tensors, strict=True))

    def norms(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The norm of each tensor in float64, in the same way."""
        wide = [t.double() for t in tensors]
        if self.ranks is None:
            return tuple(t.norm() for t in wide)
        return tuple(t.sqrt() for t in self.totals(*((t * t).sum() for t in wide)))

    # --- what to keep and what to give back ------------------------------------------------

    def slots(self) -> int:
        """How many tensors are held for each value that leaves a cached run."""
        return 1

    def store(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Sequence[Tensor]:
        """On a computed step: the `slots()` tensors to hold, of the shape and dtype of `value`.

        This and `reuse` are traced once: no in-place change of what they are given, no Python
        branch on a tensor's value. What breaks this raises `VerifyError` at the first call.

        `held`: what is held so far, zeros in a generation's first computed step. `start`: the
        same stream before the run (None where the run has none of `value`'s shape).
        """
        raise NotImplementedError

    def reuse(self, held: Sequence[Tensor], start: Tensor | None, clock: Clock) -> Tensor:
        """On any other step: the value in the place of the computed one, of its shape and dtype."""
        raise NotImplementedError

    def stream_name(self) -> str:
        """The block argument that carries the stream, tried before it is found from the graph."""
        return ""

    def measure(
        self, held: Sequence[Tensor], value: Tensor, start: Tensor | None, clock: Clock
    ) -> Tensor | None:
        """On a computed step: numbers about `value` for the rule and for reports, of one dimension.

        The arguments are those of `store`: `held` is from the computed step before this one. None
        where nothing is measured.
        """
        return None

    def always_runs(self, position: int, blocks: int) -> bool:
        """Whether a block runs on every step: the one at `position` of all `blocks` calls."""
        return False

    # --- when to compute (optional) --------------------------------------------------------

    @property
    def has_rule(self) -> bool:
        """Whether `should_compute` takes part in the decision (beside `no_cache_steps`)."""
        return False

    def looks_at(self) -> str | tuple[str, ...]:
        """The `signal` of the rule, by name, or several names.

        At most one is a value of the model: the first block's "modulated" input or its "input",
        what conditions it ("conditioning", "embedding"), the "residual" that the blocks which
        always run at the model's head add to their stream, or the "sample" that the model is given.
        Others: those of `Clock` ("distance", "computed"), and "measured", one row for each held
        value: what `measure` gave on the newest computed step. A rule that looks at no value of
        the model is asked on the CPU, and nothing is read from the device on a reused step.
        """
        return "modulated"

    def init_state(self, signal: Any) -> RuleState:
        """The rule's state after a generation's first step."""
        raise NotImplementedError

    def should_compute(
        self, signal: Any, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        """Whether this step computes (a boolean of no dimensions), and the new state.

        `signal`: the tensor that `looks_at` names, a tuple where it names several. `forced`: the
        step computes in any case. The state keeps its number of tensors, their shapes and dtypes;
        nothing is changed in place. Where the signal or the `metric` is no finite number, the step
        computes, and the state begins anew (unless the rule `bears_nans`).
        """
        raise NotImplementedError

    @property
    def threshold(self) -> float | None:
        """What the rule compares `metric` with, for reports; None where it is no such rule."""
        return None

    def metric(self, state: RuleState, measured: Tensor | None = None) -> Tensor | None:
        """What the rule compared when it decided last, of no dimensions, for reports.

        `measured`: as in `looks_at`; None where nothing is measured. `state` is empty where the
        rule has none.
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
                "say which steps are computed in full, for instance "
                "interval_schedule(50, 11, 45, 4) or range(0, 50, 2), or give "
                "compute_ratio=0.5 or schedule='balanced'" + self._rule_hint(),
            )
        if len(given) > 1:
            value = getattr(self, given[1])
            raise OptionError(given[1], value, f"{given[0]} is given too: give one of {list(ways)}")
        if self.compute_ratio is not None:
            check_ratio("compute_ratio", self.compute_ratio)
        if self.schedule is not None:
            named_schedule(self.schedule)
        if self.computed_steps is not None:
            EvenTimesteps(self.computed_steps)

    def _check_length(self) -> None:
        """`num_steps` and `timesteps`, as far as they are given as numbers."""
        if self.timesteps is not None and not callable(self.timesteps):
            object.__setattr__(self, "timesteps", checked_timesteps(self.timesteps))
        if self.num_steps is not None and not callable(self.num_steps):
            check_num_steps(self.num_steps)
        number = None if callable(self.num_steps) else self.num_steps
        if isinstance(self.timesteps, tuple):
            if number not in (None, len(self.timesteps)):
                expected = f"there are {len(self.timesteps)} timesteps: one of both is enough"
                raise OptionError("num_steps", number, expected)
            number = len(self.timesteps)
        if self.plan is not None and number is not None:
            self.plan.check(number)


_S = TypeVar("_S", bound=Strategy)


def spread_over(strategy: _S, ranks: Ranks | None) -> _S:
    """The strategy for a model that these processes run together; what the user named counts."""
    return strategy if ranks is None or strategy.ranks is not None else _with(strategy, ranks)


def without_ranks(strategy: _S) -> _S:
    """The strategy for values that need no other process."""
    return strategy if strategy.ranks is None else _with(strategy, None)


def _with(strategy: _S, ranks: Ranks | None) -> _S:
    other = copy.copy(strategy)
    object.__setattr__(other, "process_group", ranks)
    return other


def options_of(strategy: type[Strategy]) -> list[str]:
    """The names of a strategy's options."""
    return [f.name for f in fields(strategy)]


def _steps(steps: Any) -> frozenset[int] | None:
    if steps is None:
        return None
    expected = "a collection of step indexes: integers from 0"
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
    expected = "a mapping from a block list's name to a collection of block ids (integers from 0)"
    try:
        items = {str(k): frozenset(_index(i) for i in v) for k, v in dict(ids).items()}
    except (TypeError, ValueError):
        raise OptionError("no_cache_block_id", ids, expected) from None
    if any(i < 0 for v in items.values() for i in v):
        raise OptionError("no_cache_block_id", ids, expected)
    return items
