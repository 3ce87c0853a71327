"""Guards on values that the model's own code reads from tensors during tracing.

These are the results of `.item()`, `bool(...)` and `.tolist()`, and the sizes of masked selections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache_fx._torch import Emitter, emit_node, opaque, untraced
from dit_cache_fx.values.pytree import flatten


@fx.has_side_effect
def read_value(operator: Any, args: Any, kwargs: Any) -> Any:
    """Guard the result of an operator that returns no tensor (`.item()`, `torch.equal`)."""
    return operator(*args, **kwargs)


@fx.has_side_effect
def read_list(tensor: torch.Tensor) -> Any:
    """Guard the result of `.tolist()` or `.numpy()`."""
    return tensor.tolist()


@fx.has_side_effect
def read_count(mask: torch.Tensor) -> torch.Size:
    """Guard the number of rows that a mask selects, compared as a shape."""
    return torch.Size([int(mask.count_nonzero())])


@fx.has_side_effect
def read_shape(tensor: torch.Tensor) -> torch.Size:
    """Guard the shape of a result with a data-dependent shape."""
    return tensor.shape


#: graph nodes that become guards
READS = (read_value, read_list, read_count, read_shape)

# operators that reach a dispatch mode before they decompose into a tagged operator
_COMPOSITE_READS = (torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default)


class DataReads(TorchDispatchMode):
    """Turns operators with data-dependent results into guards."""

    supports_higher_order_operators = True  # lets `opaque` through

    def __init__(self, read: list[Any]) -> None:
        super().__init__()
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is opaque:
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags or func in _COMPOSITE_READS:
            with untraced():
                value = func(*args, **kwargs)
            if emit_node(read_value, (func, args, kwargs), {}, "read_value"):
                self._read.append(value)
            return value
        result = func(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            self._read_sizes(func, flatten((args, kwargs))[0], flatten(result)[0])
        return result

    def _read_sizes(self, func: Any, inputs: list[torch.Tensor], outputs: Any) -> None:
        """Guard the sizes of a result: by its masks alone, if they determine the sizes.

        Then the selected tensor (a text refiner's output) need not be computed for the guard.
        """
        masks = _masks(func, inputs)
        for tensor in outputs if masks is None else masks:
            read = read_shape if masks is None else read_count
            with untraced():
                value = read(tensor)
            if emit_node(read, (tensor,), {}, read.__name__):
                self._read.append(value)


def _masks(func: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return the masks that determine the size of a selection; None if other tensors do."""
    if func is torch.ops.aten.index.Tensor:
        return [t for t in inputs[1:] if t.dtype in (torch.bool, torch.uint8)]
    if func is torch.ops.aten.masked_select.default:
        return inputs[1:]
    return inputs if func is torch.ops.aten.nonzero.default else None


class PythonReads(TorchFunctionMode):
    """Turns `.tolist()` and `.numpy()`, which are no operators, into guards."""

    _READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)

    def __init__(self, read: list[Any]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._READS:
            return func(*args, **(kwargs or {}))
        reading = _ListRead(func, self._read)
        opaque(reading, [args[0]])
        return reading.value


class _ListRead:
    """Reads a whole tensor, as an operator that is opaque to the tracer."""

    def __init__(self, func: Callable[[torch.Tensor], Any], read: list[Any]) -> None:
        self._func = func
        self._read = read
        self.value: Any = None

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._list = tensors[0].tolist()
        self.value = self._func(tensors[0])
        return []

    def emit(
        self, graph: Emitter, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]
    ) -> Sequence[Any]:
        if isinstance(inputs[0], fx.Proxy):
            graph.call(read_list, (inputs[0],), {}, "read_list")
            self._read.append(self._list)
        return []
