"""Names of the inputs of Dynamo's graph, and of the modules that its nodes come from.

Dynamo names both by their access path in the compiled function: `L['self']._modules['img_in']`,
`L['kwargs']['timestep']`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import fx

from dit_cache_fx._torch import dynamo_source

_LOCAL = re.compile(r"^[LG]\['(\w+)'\]")
_STEP = re.compile(
    r"\.__dict__\['(?P<dict>[^']+)'\]|\._modules\['(?P<module>[^']+)'\]|\.(?P<attribute>[^.\[]+)"
    r"|\['(?P<key>[^']+)'\]|\[(?P<index>\d+)\]"
)
_CLOSURE = re.compile(r"\.__closure__\[\d+\]\.cell_contents")
#: from a method (kept by a hook, or about to be called) to its module
_METHOD = re.compile(r"(?:\.\w+)?\.__self__(?=[.\[]|$)")
#: parts of a path that are no names: a module's containers, and wrappers around a module
_SILENT = {"_modules", "_parameters", "_buffers", "_orig_mod"}

Path = tuple[str, ...]


class ModuleCall(NamedTuple):
    """A module call that contains a node: Dynamo's key of the call, and the module's path."""

    key: str
    path: Path


def path_of(source: str) -> Path:
    """Return the names in an access path, starting with the local variable.

    `L['self']._modules['blocks']._modules['0']` gives `("self", "blocks", "0")`.
    """
    source = _METHOD.sub("", _CLOSURE.sub("", source))
    local = _LOCAL.match(source)
    start, rest = (local[1], source[local.end() :]) if local else ("", source)
    steps = [next(name for name in found.groups() if name) for found in _STEP.finditer(rest)]
    return (start, *(step for step in steps if step not in _SILENT))


def module_calls(node: fx.Node) -> list[ModuleCall]:
    """Return the module calls that contain a node of Dynamo's graph, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [ModuleCall(key, path_of(entry[0])) for key, entry in stack.items()]


def is_owned(node: fx.Node, value: object) -> bool:
    """Return whether an input is a parameter or buffer of a module, and not the call's own."""
    if isinstance(value, torch.nn.Parameter):
        return True
    source = dynamo_source(node)
    return "_parameters" in source or "_buffers" in source or path_of(source)[0] == "self"


def argument_of(node: fx.Node) -> str:
    """Return the argument of an input: its name, or one made from its access path."""
    start, *rest = path_of(dynamo_source(node))
    if start.endswith("kwargs") and rest and not rest[0].isdigit():
        start, *rest = rest
    return "_".join([start or node.name, *rest])
