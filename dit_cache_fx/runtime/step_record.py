"""`StepRecord`: one call in a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One call in the last generation.

    Attributes:
        step (`int`):
            The step, counted from 0.
        timestep (`float`):
            The timestep of the call.
        branch (`int`):
            The number of the branch among those of the same graph and context.
        action (`str`):
            "computed", "reused" or "predicted".
        why (`str`, defaults to `""`):
            The reason why it computed.
        graph (`int`, defaults to `0`):
            The number of the captured graph.
        context (`str`, *optional*):
            The cache context; nested ones are joined by "/".
        measured (`float`, *optional*):
            The number that the strategy's own rule compared in its decision.

    Example:
        >>> timeline = cached.cache_report().timeline
        >>> [record.step for record in timeline if record.action == "computed"]
        [0, 4, 7, 11]
    """

    step: int
    timestep: float
    branch: int
    action: str
    why: str = ""
    graph: int = 0
    context: str | None = None
    measured: float | None = None

    def __str__(self) -> str:
        where = f"branch {self.branch}" if self.context is None else f"{self.context!r}"
        text = f"step {self.step} (timestep {self.timestep:g}, {where}): {self.action}"
        notes = [self.why] if self.why else []
        notes += [] if self.measured is None else [f"measured {self.measured:.4g}"]
        return f"{text} ({', '.join(notes)})" if notes else text
