"""Weight-only quantisation by a tensor subclass, as quantisation libraries do it, in small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing


class Int8Weight(Tensor):
    """A matrix held as int8 with a scale for each row; it is multiplied as float32."""

    def __new__(cls, values: Tensor, scales: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, values.shape, dtype=scales.dtype, device=values.device
        )

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    @staticmethod
    def of(weight: Tensor) -> Int8Weight:
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return Int8Weight((weight / scales).round().to(torch.int8), scales)

    def dense(self) -> Tensor:
        return self.values.to(self.scales.dtype) * self.scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(inner["values"], inner["scales"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dense(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            parts = (func(args[0].values), func(args[0].scales))
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(*parts))
        raise NotImplementedError(f"{func} of an int8 weight")


def quantise(model: nn.Module) -> None:
    """Put int8 weights into every linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = Int8Weight.of(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
