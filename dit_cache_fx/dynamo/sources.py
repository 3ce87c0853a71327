"""What the inputs of Dynamo's graph and the modules that its nodes come from are called.

Dynamo names both by how the compiled function reaches them: `L['self']._modules['img_in']`,
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
#: from a method (that a hook has kept) to the module that it is of
_METHOD = re.compile(r"\.\w+\.__self__(?=[.\[]|$)")
#: steps of a path that name nothing: where a module keeps things, and wrappers around one
_SILENT = {"_modules", "_parameters", "_buffers", "_orig_mod"}

Path = tuple[str, ...]


class ModuleCall(NamedTuple):
    """A module call that a node is from: Dynamo's key for the call, and the module's path."""

    key: str
    path: Path


def path_of(source: str) -> Path:
    """The names that lead to something, the local variable that it starts from first.

    `L['self']._modules['blocks']._modules['0']` gives `("self", "blocks", "0")`.
    """
    source = _METHOD.sub("", _CLOSURE.sub("", source))
    local = _LOCAL.match(source)
    start, rest = (local[1], source[local.end() :]) if local else ("", source)
    steps = [next(name for name in found.groups() if name) for found in _STEP.finditer(rest)]
    return (start, *(step for step in steps if step not in _SILENT))


def module_calls(node: fx.Node) -> list[ModuleCall]:
    """The module calls that a node of Dynamo's graph is inside of, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [ModuleCall(key, path_of(entry[0])) for key, entry in stack.items()]


def is_owned(node: fx.Node, value: object) -> bool:
    """Whether an input is a parameter or buffer of a module, and none of the call's own."""
    if isinstance(value, torch.nn.Parameter):
        return True
    source = dynamo_source(node)
    return "_parameters" in source or "_buffers" in source or path_of(source)[0] == "self"


def argument_of(node: fx.Node) -> str:
    """The argument that an input came in: by its name, or what is made of its way to there."""
    start, *rest = path_of(dynamo_source(node))
    if start.endswith("kwargs") and rest and not rest[0].isdigit():
        start, *rest = rest
    return "_".join([start or node.name, *rest])
