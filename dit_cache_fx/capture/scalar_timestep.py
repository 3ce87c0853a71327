"""`torch.tensor([t])` and `torch.full(size, t)` where the number `t` has become a tensor.

A timestep given as a number is a tensor of no dimensions in the graph. These two read its value,
which would make it a constant of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dit_cache_fx.values.pytree import flatten


class NumberFactories(TorchFunctionMode):
    """Makes the same tensors by operators of the graph, with the dtypes that numbers give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and flatten(args[0])[0]:
            return _converted(_stacked(args[0]), kwargs)
        if func is torch.full and len(args) == 2 and isinstance(args[1], torch.Tensor):
            return _converted(args[1], kwargs).expand(args[0]).clone()
        return func(*args, **kwargs)


def _stacked(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return torch.stack([_stacked(v) for v in value])
    return torch.tensor(value)


def _converted(value: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    default = torch.get_default_dtype() if value.is_floating_point() else value.dtype
    return value.to(device=kwargs.get("device"), dtype=kwargs.get("dtype") or default)
