"""Whether the model is still what was captured.

A graph holds what the model's own code did with plain Python attributes, so a change of those (an
option, an adapter's scale, a layer put in another's place, a dtype) must lead to a new capture.
Modules that the graph calls whole are looked up live and need no such check.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_IGNORED = frozenset({"training"})


def fingerprint(model: nn.Module, whole: Collection[nn.Module]) -> Hashable:
    """A value that changes with the model's structure and options outside the modules in `whole`.

    Weights may change: only their dtype and device are part of it.
    """
    return tuple(_parts(model, whole))


def _parts(module: nn.Module, whole: Collection[nn.Module]) -> Iterator[Hashable]:
    yield id(type(module)), module.__dict__.get("forward") is not None
    for name, value in vars(module).items():
        if isinstance(value, _PLAIN) and name not in _IGNORED:
            yield name, value
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        yield None if tensor is None else (tensor.dtype, tensor.device)
    for name, child in module._modules.items():
        if child is None:
            continue
        if child in whole:
            yield name, *_first_tensor(child)
        else:
            yield name, id(child)
            yield from _parts(child, whole)


def _first_tensor(module: nn.Module) -> tuple[Any, Any]:
    tensor = next(module.parameters(), None)
    return (None, None) if tensor is None else (tensor.dtype, tensor.device)
