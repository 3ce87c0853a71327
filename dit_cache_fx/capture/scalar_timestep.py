"""Support `torch.tensor([t])`, `torch.full(size, t)` and similar calls for a number `t`.

A timestep passed as a number is a tensor of no dimensions in the graph. These functions read its
value, which would make it a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dit_cache_fx.values.pytree import flatten


class NumberFactories(TorchFunctionMode):
    """Creates the same tensors by operators of the graph, with the dtypes that numbers give.

    `number`: the timestep as passed, if it was no tensor.
    """

    def __init__(self, number: object = None) -> None:
        super().__init__()
        self._plain = isinstance(number, float) and not hasattr(number, "dtype")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        if form is not None:
            given = form(*args, **kwargs)
            if flatten(given["value"])[0]:
                return self._made(**given)
        return func(*args, **kwargs)

    def _made(
        self,
        value: Any,
        size: Any = None,
        like: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        **_: Any,  # memory formats, and arguments for autograd
    ) -> torch.Tensor:
        tensor = _stacked(value)
        if like is not None:
            dtype, device = dtype or like.dtype, device or like.device
        elif dtype is None and tensor.is_floating_point():
            number = size is not None or (self._plain and tensor.dtype == torch.float64)
            dtype = torch.get_default_dtype() if number else tensor.dtype
        made = tensor.to(device=device, dtype=dtype)
        return made.clone() if size is None else made.expand(size).clone()


def _of(value: Any, **more: Any) -> dict[str, Any]:
    return {"value": value, **more}


def _tensor(data: Any, **more: Any) -> dict[str, Any]:
    return _of(data, **more)


def _as_tensor(data: Any, dtype: Any = None, device: Any = None) -> dict[str, Any]:
    return _of(data, dtype=dtype, device=device)


def _asarray(obj: Any, **more: Any) -> dict[str, Any]:
    return _of(obj, **more)


def _scalar_tensor(s: Any, **more: Any) -> dict[str, Any]:
    dtype = more.pop("dtype", None) or torch.get_default_dtype()
    return _of(s, size=(), dtype=dtype, **more)


def _full(size: Any, fill_value: Any, **more: Any) -> dict[str, Any]:
    return _of(fill_value, size=size, **more)


def _full_like(input: Any, fill_value: Any, **more: Any) -> dict[str, Any]:
    return _of(fill_value, size=input.shape, like=input, **more)


def _new_full(self: Any, size: Any, fill_value: Any, **more: Any) -> dict[str, Any]:
    return _of(fill_value, size=size, like=self, **more)


def _new_tensor(self: Any, data: Any, **more: Any) -> dict[str, Any]:
    return _of(data, like=self, **more)


#: how to read each function's arguments: its value, shape and dtype
_FORMS: Mapping[Any, Callable[..., dict[str, Any]]] = MappingProxyType(
    {
        torch.tensor: _tensor,
        torch.as_tensor: _as_tensor,
        torch.asarray: _asarray,
        torch.scalar_tensor: _scalar_tensor,
        torch.full: _full,
        torch.full_like: _full_like,
        torch.Tensor.new_full: _new_full,
        torch.Tensor.new_tensor: _new_tensor,
    }
)


def _stacked(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)):
        parts = [_stacked(v) for v in value]
        device = next((t.device for t in flatten(value)[0]), None)
        return torch.stack([part.to(device) for part in parts])
    return torch.tensor(value, device="cpu")
