"""How many steps a generation has, as far as that is known."""

from __future__ import annotations

from dit_cache_fx.strategies import NumSteps
from dit_cache_fx.strategies.schedule import check_num_steps


class StepCount:
    """The number of steps: as set on the cached model, else as the option says, else as counted.

    `given`: what is set on the cached model. `counted`: the steps of the newest generation that has
    ended (one that was broken off counts as it ended).
    """

    def __init__(self, option: NumSteps | None) -> None:
        self.option = option
        self.given: int | None = None
        self.counted: int | None = None

    def told(self) -> int | None:
        """As the user says it. Raises `OptionError` where the option's function gives no number."""
        if self.given is not None or not callable(self.option):
            return self.option if self.given is None else self.given  # type: ignore[return-value]
        number = self.option()
        check_num_steps(number, "num_steps()")
        return number

    def expected(self) -> int | None:
        """For a generation that begins now; None where nothing is known."""
        told = self.told()
        return self.counted if told is None else told
