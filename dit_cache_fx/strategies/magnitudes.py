"""MagCache's schedule from ratios of magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_cache_fx.strategies.schedule import Schedule


@dataclass(frozen=True)
class MagnitudeSteps(Schedule):
    """Computes where the predicted error, summed over reused steps, is too large.

    While the number of steps is unknown, it is that of the ratios.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skip_steps: int
    retention_ratio: float

    needs_num_steps: ClassVar[bool] = False

    def computes(self, step: int, num_steps: int | None) -> bool:
        number = len(self.ratios) if num_steps is None else num_steps
        product, error, reused = 1.0, 0.0, 0
        for index in range(int(self.retention_ratio * number + 0.5), step + 1):
            product, reused = product * self._ratio(index, number), reused + 1
            error += abs(1.0 - product)
            if index == 0 or error > self.threshold or reused > self.max_skip_steps:
                product, error, reused = 1.0, 0.0, 0
        return reused == 0

    def __str__(self) -> str:
        return f"{len(self.ratios)} magnitude ratios"

    def _ratio(self, step: int, num_steps: int) -> float:
        """Return the ratio of a step, or the nearest one if there are more or fewer ratios."""
        count = len(self.ratios)
        if step >= num_steps:
            return 1.0
        return self.ratios[round(step * (count - 1) / (num_steps - 1)) if num_steps > 1 else -1]
