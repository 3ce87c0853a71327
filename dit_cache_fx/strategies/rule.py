"""`Rule`: the part of a strategy that decides when to compute, if no schedule does.

A rule is a pure function of tensors. The host calls it, or the one graph contains it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

#: tensors that a rule passes from step to step
RuleState = tuple[Tensor, ...]


class Rule:
    """Base of `Strategy`: the methods of a rule. Strategies without a rule inherit them as is."""

    #: whether its rule handles a signal or a change that is not finite: it computes, and recovers
    #: on the next step; otherwise such a step computes, and the rule's state starts again
    bears_nans: ClassVar[bool] = False

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
        for each cached value: the result of `measure` on the newest computed step. A rule that
        reads no value of the model runs on the CPU, and nothing is read from the device on a reused
        step.
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
                The result of `measure`, one row for each cached value; None if nothing is measured.
        """
        return None

    def _rule_hint(self) -> str:
        return ""
