"""Choose the leaf modules of a capture: candidate blocks, and the layers around them.

A leaf module is one `call_module` of the user's own, live module. So hooks, quantised or offloaded
weights, LoRA layers that are added later and compiled forwards keep working, and nothing inside the
module becomes a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from dit_cache_fx.errors import OptionError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class BlockList:
    """A list of modules inside the model: `name` is its attribute path."""

    name: str
    modules: tuple[nn.Module, ...]


def candidate_lists(model: nn.Module) -> list[BlockList]:
    """Return every `nn.ModuleList` that is not inside a member of another one.

    A list whose members are lists themselves (`[attention, feed-forward]` pairs) is never called as
    such: its members represent it.
    """
    return list(_lists(model, ""))


def named_list(model: nn.Module, name: str) -> BlockList:
    """Return the module list at this attribute path."""
    return BlockList(name, tuple(model.get_submodule(name).children()))


def _lists(module: nn.Module, prefix: str) -> Iterator[BlockList]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        members = tuple(child.children())
        callable_members = not any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in members)
        if isinstance(child, nn.ModuleList) and members and callable_members:
            yield BlockList(path, members)
        else:
            yield from _lists(child, f"{path}.")


def leaf_modules(model: nn.Module, lists: Sequence[BlockList]) -> dict[nn.Module, str]:
    """Return module -> name for every module that the capture does not trace into.

    Layers inside blocks are among them: some models call one from outside (a block's embedding).
    """
    leaves: dict[nn.Module, str] = {}
    for blocks in lists:
        for index, block in enumerate(blocks.modules):
            leaves.setdefault(block, f"{blocks.name}.{index}")
    _add_layers(model, "", leaves)
    return leaves


def _add_layers(module: nn.Module, prefix: str, leaves: dict[nn.Module, str]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inside = any(module in leaves for module in child.modules())
        if not inside and _is_layer(child):
            leaves[child] = path
        else:
            _add_layers(child, f"{path}.", leaves)


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer: weights without parts, torch's own, or a wrapped one."""
    if isinstance(module, _CONTAINERS):
        return False
    if _is_adapted(module) or _is_hooked(module):
        return True
    if next(module.children(), None) is None and _owns_tensors(module):
        return True
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))


def _owns_tensors(module: nn.Module) -> bool:
    """Return whether a module has weights: without any, it is the model's own code (positions)."""
    return bool(module._parameters or module._buffers)


def _is_adapted(module: nn.Module) -> bool:
    """Return whether a module wraps an adapted layer as `base_layer` (LoRA and similar)."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


#: containers that can hold blocks
LISTS = (nn.ModuleList, nn.Sequential)
Blocks = str | nn.ModuleList | Sequence[str | nn.ModuleList]


def listed(blocks: Blocks) -> list[str | nn.ModuleList]:
    """Return one name or list, or several of them, as a list; raise `OptionError` otherwise."""
    if isinstance(blocks, (str, *LISTS)):
        return [blocks]
    if not isinstance(blocks, Iterable):
        raise OptionError(
            "blocks", blocks, "attribute paths of module lists, or the lists themselves"
        )
    return list(blocks)
