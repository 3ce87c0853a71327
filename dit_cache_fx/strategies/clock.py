"""What a strategy's functions are told of the step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dit_cache_fx.values.tensor_spec import TensorSpec

#: how many items `Clock.gap` has
MOMENTS = 8


class Clock(NamedTuple):
    """The place of a step in its generation, as float64 tensors.

    Attributes:
        distance (`Tensor`):
            No dimensions. From the last computed step to this one, in steps, or along the
            strategy's own axis.
        computed (`Tensor`):
            No dimensions. The number of computed steps before this one.
        gap (`Tensor`):
            Shape `[MOMENTS]` (8), used on a computed step. Item i is the sum of `dt * distance**i`
            over the steps reused since the last computed step, each with its own distance, divided
            by the sum of `dt` over the steps to be reused until the next computed one. All items
            are 0 where no steps were or none will be reused. `dt` is the distance that the timestep
            moves from the step to the next one (1 where the timesteps are not known). For a
            strategy that is `fading` the items are multiplied by `1 - coming / left`, where the
            timestep moves by `coming` up to the next computed step and by `left` up to the end of
            the generation, as far as both are known.
        reach (`Tensor`):
            No dimensions. The distance between the last computed step and the one before it; 0
            where there are not two.
        way (`Tensor`):
            Shape `[2]`. The way of the timestep from the last computed step to this one, and to the
            step behind this one: predictions go at least as far if this step is not computed. Both
            are shares of the way of the whole generation (1/50 a step where nothing is known), and
            0 where there is no last computed step.
    """

    distance: Tensor
    computed: Tensor
    gap: Tensor
    reach: Tensor
    way: Tensor


_SCALAR = TensorSpec(torch.Size([]), torch.float64, torch.device("cpu"))
#: the tensors of a `Clock` by name, as the host makes them
CLOCK: Mapping[str, TensorSpec] = MappingProxyType(
    {
        "distance": _SCALAR,
        "computed": _SCALAR,
        "gap": _SCALAR._replace(shape=torch.Size([MOMENTS])),
        "reach": _SCALAR,
        "way": _SCALAR._replace(shape=torch.Size([2])),
    }
)
