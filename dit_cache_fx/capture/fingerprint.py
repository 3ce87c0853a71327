"""Detect changes of the model since its capture.

A graph contains decisions of the model's own code on plain Python attributes, so a change of those
(an option, a replaced layer, a dtype) must lead to a new capture. Modules that the graph calls are
looked up live; their own attributes and the blocks need no such check.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping

import torch
from torch import nn

from dit_cache_fx.capture.attributes import TORCHS

#: (path of the module, kind of entry) -> its value
Fingerprint = dict[tuple[str, str], Hashable]

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_OTHER = object()


def fingerprint(
    model: nn.Module, whole: Collection[nn.Module] = (), blocks: Collection[nn.Module] = ()
) -> Fingerprint:
    """Return the structure and options that the graph depends on, outside of `whole`.

    Weights may change: only their dtype and device count. Modules in `whole` that are not `blocks`
    count by identity and a replaced forward: another one may change its input in place, and that
    input may be the tensor to cache. Their hooks do not count: most of them only look on.
    """
    return dict(_parts(model, "", whole, blocks))


def volatile(before: Fingerprint, after: Fingerprint) -> frozenset[tuple[str, str]]:
    """Return the entries that the model's forward itself changed: notes to itself, no options."""
    return frozenset(k for k in {*before, *after} if before.get(k) != after.get(k))


def _parts(
    module: nn.Module, path: str, whole: Collection[nn.Module], blocks: Collection[nn.Module]
) -> Iterator[tuple[tuple[str, str], Hashable]]:
    yield (path, "class"), id(type(module))
    yield (path, "forward"), "forward" in vars(module)
    if path:  # the model's own hooks run outside of the graph
        yield (path, "hooks"), bool(module._forward_hooks or module._forward_pre_hooks)
    for name, value in list(vars(module).items()):  # other threads may capture the module now
        if name not in TORCHS and (plain := _plain(value)) is not _OTHER:
            yield (path, name), plain
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        yield (path, name), None if tensor is None else (tensor.dtype, tensor.device)
    for name, child in module._modules.items():
        inner = f"{path}.{name}"
        if child is None or child not in whole:
            yield (inner, "module"), id(child)
        if child is not None and child in whole:
            tensor = next(child.parameters(), None)
            yield (inner, "weights"), None if tensor is None else (tensor.dtype, tensor.device)
            if child not in blocks:
                yield (inner, "modules"), tuple(map(_behavior, child.modules()))
        elif child is not None:
            yield from _parts(child, inner, whole, blocks)


def _behavior(module: nn.Module) -> tuple[int, bool]:
    return id(module), "forward" in vars(module)


def _plain(value: object) -> Hashable:
    """Return a comparable value: number, text, or a container of such; `_OTHER` for all else."""
    if isinstance(value, float):
        return float(f"{value:.12g}")  # see `attributes.ROUNDING`
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((str(k), _plain(v)) for k, v in value.items())
    return _OTHER
