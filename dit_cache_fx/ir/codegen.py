"""Generate the Python code of a graph: contexts of its nodes, and module paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from keyword import iskeyword

from torch import fx

from dit_cache_fx.ir.node_meta import meta_of
from dit_cache_fx.ir.nodes import module_reads


def customize_code(graph: fx.Graph) -> None:
    """Change the code that is generated for a graph.

    Each node runs in its contexts. A module on the way to several others is looked up once: many
    models have an attribute lookup of their own, which takes a microsecond.

    Before:

        model_blocks_0 = getattr(self.model.blocks, "0")(x);  x = None
        model_blocks_1 = getattr(self.model.blocks, "1")(model_blocks_0);  model_blocks_0 = None

    After:

        model_blocks = self.model.blocks
        with torch.autocast('cpu', torch.bfloat16, cache_enabled=True):
            model_blocks_0 = getattr(model_blocks, "0")(x);  x = None
        model_blocks_1 = getattr(model_blocks, "1")(model_blocks_0);  model_blocks_0 = None
    """
    within = {n.name: str(w) for n in graph.nodes if (w := meta_of(n).within)}
    paths = {n.name: str(n.target) for n in module_reads(graph)}
    names = _names(_shared(paths.values()), {n.name for n in graph.nodes})
    graph.on_generate_code(lambda _: partial(_written, within, paths, names))


def _shared(targets: Iterable[str]) -> list[str]:
    """Return the paths on the way to several targets. Of two for the same targets, the longer."""
    uses = Counter(path for target in targets for path in _above(target))
    onward = Counter[str]()
    for path, count in uses.items():
        above = path.rpartition(".")[0]
        onward[above] = max(onward[above], count)
    return [path for path, count in uses.items() if count > max(onward[path], 1)]


def _above(target: str) -> list[str]:
    """Return the paths on the way to a target, the shortest first."""
    return [*accumulate(target.split("."), "{}.{}".format)][:-1]


def _names(paths: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Return a name of a variable for each path."""
    names: dict[str, str] = {}
    for path in paths:
        name = re.sub(r"\W", "_", path)
        while name in taken:
            name += "_"
        taken.add(name)
        names[path] = name
    return names


def _written(
    within: Mapping[str, str],
    paths: Mapping[str, str],
    names: Mapping[str, str],
    body: Sequence[str],
) -> list[str]:
    lines = [f"{name} = {_lookup(path, names)}\n" for path, name in sorted(names.items())]
    for text in body:
        node = text.partition(" = ")[0]
        if node in paths:
            theirs = _expression("self", paths[node], str.isidentifier)
            text = text.replace(f" = {theirs}", f" = {_lookup(paths[node], names)}", 1)
        lines.append(f"with {within[node]}:\n    {text}" if node in within else text)
    return lines


def _lookup(path: str, names: Mapping[str, str]) -> str:
    """Return the expression of a path, by the longest path on the way that has a name."""
    known = [above for above in _above(path) if above in names]
    if not known:
        return _expression("self", path)
    return _expression(names[known[-1]], path[len(known[-1]) + 1 :])


def _is_attribute(name: str) -> bool:
    return name.isidentifier() and not iskeyword(name)


def _expression(base: str, path: str, is_attribute: Callable[[str], bool] = _is_attribute) -> str:
    """Return a path as Python code; `torch.fx` takes keywords for names of attributes."""
    for part in path.split("."):
        base = f"{base}.{part}" if is_attribute(part) else f'getattr({base}, "{part}")'
    return base
