"""One call of a cached model: its decision, its graph's operands, and its cached tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from dit_cache_fx.ir.names import is_measured
from dit_cache_fx.lowering import Preamble, prepared
from dit_cache_fx.runtime.tracking.branches import Branch, CachedTensor
from dit_cache_fx.strategies import CLOCK, Clock, Course, RuleState, Strategy
from dit_cache_fx.strategies.decision import begun, decided, device_of, lost_in_any
from dit_cache_fx.strategies.signals import in_one, signal_of
from dit_cache_fx.values.identity import storage_key
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import own_part

#: the reasons why a step computes
FIRST, SCHEDULED, MISSING, RULE = "the first step", "scheduled", "nothing is held", "its rule"

_CLOCK = frozenset(CLOCK)


class Step:
    """A step of one branch. `specs`: of its cached tensors, by name. `course`: of its generation.

    `missed`: steps since the branch's last call. Cached tensors are too old if one of them should
    have computed, or if a rule did not see it.

    Before `commit` nothing is written to the branch: a call that raises has no effect.
    """

    def __init__(
        self,
        strategy: Strategy,
        branch: Branch,
        index: int,
        specs: Mapping[str, TensorSpec],
        course: Course | None = None,
        missed: Iterable[int] = (),
    ) -> None:
        self.index = index
        self._course = course or strategy.course()
        self._strategy = strategy
        self._branch = branch
        self._specs = specs
        self._state: RuleState | None = branch.rule_state
        whole = len(branch.cached) == len(specs) and all(map(CachedTensor.untouched, branch.cached))
        unseen = [i for i in missed if strategy.has_rule or self._course.computes(i)]
        missing = not whole or bool(unseen)
        scheduled = self._course.computes(index)
        self._missing = missing
        self._forced = scheduled or missing
        self.computes = self._forced
        self._why = FIRST if index == 0 else SCHEDULED if scheduled else MISSING

    def follow(self, first: Step) -> None:
        """Take the decision of `first`, the same step of a branch that holds nothing."""
        if first._state is not None:
            self.computes, self._state = first.computes, first._state

    @property
    def why(self) -> str:
        """The reason why it computes; empty if it does not."""
        if not self.computes:
            return ""
        return self._why if self._forced else RULE

    # --- what a graph is given -------------------------------------------------------------------

    def given(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the operands `names` of a variant: the clock, cached tensors (or placeholders)."""
        cached = self._cached() or [spec.placeholder() for spec in self._specs.values()]
        return self._device_clock(names) | dict(zip(self._specs, cached, strict=True))

    def compiled_given(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the operands of a compiled variant, in the strides that it was compiled for.

        The clock is on the device of the cached tensors: CUDA graphs take nothing from the CPU.
        """
        return {**self.cached(names), **self._device_clock(names)}

    def _device_clock(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the clock on the cached tensors' device: a condition on the CPU costs a wait."""
        clock = self.clock(names)
        if not clock:
            return clock
        device = next((spec.device for spec in self._specs.values()), None)
        if device is None or device.type == "cpu":
            return clock
        # without a wait: the host's memory is read before this returns
        return {name: value.to(device, non_blocking=True) for name, value in clock.items()}

    def cached(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the cached tensors among `names`; zeros if there are none."""
        given, own = dict[str, torch.Tensor](), self._cached()
        for place, (name, spec) in enumerate(self._specs.items()):
            if name in names:
                given[name] = own[place] if own else spec.zeros()
        return given

    def one_graph_given(
        self, names: Collection[str], state: Mapping[str, TensorSpec], asks: bool
    ) -> dict[str, torch.Tensor]:
        """Return the operands of the graph with the decision: flags, rule state, clock, tensors.

        Their strides are the same on every step: others would cause a recompilation.
        """
        cached = [t.contiguous() for t in self._cached()]
        cached = cached or [spec.zeros() for spec in self._specs.values()]
        given = {"forced": _flag(self.computes), **self.clock(names)}
        given.update(zip(self._specs, cached, strict=True))
        if asks:
            own = self._state
            remembered = [spec.zeros() for spec in state.values()] if own is None else own
            given["fresh"] = _flag(own is None)
            given.update(zip(state, (t.contiguous() for t in remembered), strict=True))
        return given

    def clock(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of the clock among `names`, on the CPU."""
        if _CLOCK.isdisjoint(names):
            return {}
        made: dict[str, Callable[[], float | list[float]]] = {
            "distance": lambda: self._course.distance(self._last, self.index),
            "computed": lambda: self._computed,
            "gap": lambda: self._course.gap(self._last, self.index),
            "reach": lambda: self._branch.reach if self._computed > 1 else 0.0,
            "way": lambda: self._course.way(self._last, self.index) if self._computed else [0, 0],
        }
        return {
            n: torch.tensor(made[n](), dtype=torch.float64, device="cpu")
            for n in CLOCK
            if n in names
        }

    def _cached(self) -> list[torch.Tensor]:
        """Return the branch's cached tensors, if they can be used."""
        return [] if self._missing else [h.tensor for h in self._branch.cached]

    @property
    def _computed(self) -> int:
        """Return the number of computed steps behind the cached tensors."""
        return 0 if self._missing else self._branch.computed

    @property
    def _last(self) -> int:
        """Return the newest of these steps; this step if there is none."""
        return self._branch.last_computed if self._computed else self.index

    def prepared(
        self, preambles: Mapping[str, Preamble], given: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the results of the preambles of both kinds of steps, by name.

        Nothing reads those of the other kind. They are as large as the branch's newest ones: the
        sizes (of masks) may differ from those of the capture.
        """
        own, known = "compute" if self.computes else "reuse", self._branch.prepared
        results = dict[str, torch.Tensor]()
        for kind, preamble in preambles.items():
            specs = known.get(kind, {})
            if kind == own or specs.keys() != preamble.given.keys():
                made = prepared(preamble, {**given, **self.given(preamble.part.names)})
                known[kind] = {name: TensorSpec.of(tensor) for name, tensor in made.items()}
            else:
                made = {name: spec.empty() for name, spec in specs.items()}
            results.update(made)
        return results

    # --- the strategy's own rule -----------------------------------------------------------------

    def decide(self, value: torch.Tensor | None) -> None:
        """Run the strategy's rule, if it has one. `value`: of the model, if the rule reads one.

        Waits for the device once; without a value, once for each computed step, to read its
        measurement. May be called again if a graph of this step could not be compiled.
        """
        if not self._strategy.has_rule:
            return
        strategy, signal = self._strategy, self._signal(value)
        self._state = self._branch.rule_state
        if self._state is None:
            self.computes, self._state = True, begun(strategy, signal)
            lost = lost_in_any(strategy, signal)
        else:
            forced = torch.tensor(self._forced, device=device_of(signal))
            answer = decided(strategy, signal, self._state, forced)
            flags = torch.stack([answer.computes, answer.doubted, answer.lost])
            self.computes, doubted, lost = flags.tolist()
            self._state = begun(strategy, signal) if doubted else answer.state
        if lost:
            self._state = None

    def decided(self, computes: torch.Tensor, lost: torch.Tensor, *state: torch.Tensor) -> None:
        """Take the decision of a graph that ran the rule: on the CPU, with the rule's new state."""
        self.computes, self._state = bool(computes), None if bool(lost) else state

    def _signal(self, value: torch.Tensor | None) -> Any:
        measured = self._measured_here() if value is None else self.measured()
        value = None if value is None else own_part(value)
        clock = Clock(**self.clock(Clock._fields))
        return signal_of(self._strategy, value, clock, measured)

    def _measured_here(self) -> torch.Tensor | None:
        """Return the measurement on the CPU: read once per step, equal in all processes."""
        if self._branch.measured is None:
            measured, ranks = self.measured(), self._strategy.ranks
            if measured is not None and ranks is not None and self._branch.cached:
                measured = ranks.first(measured)
            self._branch.measured = None if measured is None else measured.to("cpu")
        return self._branch.measured

    def measured(self) -> torch.Tensor | None:
        """Return the newest computed step's measurement, one row per value; None without one."""
        own = [h.tensor for h in self._branch.cached] or [s.zeros() for s in self._specs.values()]
        named = zip(self._specs, own, strict=False)
        return in_one([own_part(tensor) for name, tensor in named if is_measured(name)])

    # --- afterwards ------------------------------------------------------------------------------

    def commit(
        self,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        recorded: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Hold the tensors of a computed step, since the call has succeeded.

        Returns the outputs for the caller, who may change inputs and outputs in place: none of
        their memory is held.
        """
        if self.computes or self._state is not None:
            self._keep(recorded, {storage_key(t) for t in inputs})
        self._branch.rule_state = self._state
        own = {h.key for h in self._branch.cached}
        return [t.clone() if storage_key(t) in own else t for t in outputs]

    def _keep(self, recorded: Sequence[torch.Tensor], foreign: set[int]) -> None:
        if self._state is not None:
            self._state = tuple(_own(CachedTensor.of(t), foreign).tensor for t in self._state)
        if self.computes:
            self._cache([_own(CachedTensor.of(t), foreign) for t in recorded])

    def _cache(self, cached: list[CachedTensor]) -> None:
        branch = self._branch
        again = self._computed > 0 and branch.last_computed == self.index
        if not again:
            branch.reach = self._course.distance(self._last, self.index)
        branch.cached, branch.measured = cached, None
        branch.computed = self._computed + (0 if again else 1)
        branch.last_computed = self.index


def _flag(value: bool) -> torch.Tensor:
    return torch.tensor(value, device="cpu")


def _own(tensor: CachedTensor, foreign: set[int]) -> CachedTensor:
    return tensor.copy() if tensor.key in foreign else tensor
