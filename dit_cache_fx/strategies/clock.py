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
    """Where a step stands in its generation; float64 tensors.

    `distance` (of no dimensions): from the last computed step to this one, in steps, or along the
    strategy's own axis. `computed` (of no dimensions): computed steps before this one.

    `gap` ([MOMENTS]), for a computed step: item i is the sum of `dt * distance**i` over the steps
    that were reused since the last computed step, each with its own distance, divided by the sum of
    `dt` over the steps that will be reused up to the next computed one. All are 0 where no steps
    were or none will be. `dt`: how far the timestep moves from the step to the next one (a step is
    1 where timesteps are not known). For a strategy that is `fading` they are multiplied by
    `1 - coming / left`: how far the timestep moves up to the next computed step, and up to the
    generation's end, as far as both are known.

    `reach` (of no dimensions): the distance between the last computed step and the one before it; 0
    where there are no two.

    `way` ([2]): how far the timestep moves from the last computed step to this one, and to the step
    behind this one, which is as far as predictions go at least if this step is not computed; as
    shares of the whole generation's way (1/50 a step where nothing is known). 0 where there is no
    last computed step.
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
