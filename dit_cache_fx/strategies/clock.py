"""`Clock`: the position of a step, as tensors for a strategy's functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dit_cache_fx.values.tensor_spec import TensorSpec

#: the number of items in `Clock.gap`
MOMENTS = 8


class Clock(NamedTuple):
    """The position of a step in its generation, as float64 tensors.

    Attributes:
        distance (`Tensor`):
            No dimensions. The distance from the last computed step to this one: in steps, or in the
            unit of the strategy's own axis.
        computed (`Tensor`):
            No dimensions. The number of computed steps before this one.
        gap (`Tensor`):
            Shape `[MOMENTS]` (8), used on a computed step. Item i is the sum of `dt * distance**i`
            over the steps reused since the last computed step, each with its own distance, divided
            by the sum of `dt` over the steps to be reused until the next computed one. All items
            are 0 if no steps were or none will be reused. `dt` is the distance that the timestep
            moves from the step to the next one (1 if the timesteps are unknown). For a strategy
            with `fading` the items are multiplied by `1 - coming / left`: the timestep moves by
            `coming` up to the next computed step and by `left` up to the end of the generation, if
            both are known.
        reach (`Tensor`):
            No dimensions. The distance between the last computed step and the one before it; 0 if
            there are fewer than two.
        way (`Tensor`):
            Shape `[2]`. The way of the timestep from the last computed step to this one, and to the
            step after this one: predictions go at least that far if this step is not computed. Both
            are shares of the way of the whole generation (1/50 per step if nothing is known), and 0
            if there is no last computed step.

    Example:
        A strategy that repeats the last value, and damps it with the distance:

        >>> class Damped(dit_cache_fx.Strategy):
        ...     name = "damped"
        ...     def store(self, cached, value, run_input, clock):
        ...         return [value]
        ...     def reuse(self, cached, run_input, clock):
        ...         return (cached[0] * torch.exp(-0.01 * clock.distance)).to(cached[0].dtype)
        >>> cached = dit_cache_fx.apply(model, Damped(compute_ratio=0.5))
    """

    distance: Tensor
    computed: Tensor
    gap: Tensor
    reach: Tensor
    way: Tensor


_SCALAR = TensorSpec(torch.Size([]), torch.float64, torch.device("cpu"))
#: the tensors of a `Clock` by name, as the host creates them
CLOCK: Mapping[str, TensorSpec] = MappingProxyType(
    {
        "distance": _SCALAR,
        "computed": _SCALAR,
        "gap": _SCALAR._replace(shape=torch.Size([MOMENTS])),
        "reach": _SCALAR,
        "way": _SCALAR._replace(shape=torch.Size([2])),
    }
)
