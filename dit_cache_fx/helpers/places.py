"""Find the model that holds given blocks, and the positions of the blocks in it."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.capture.leaves import LISTS
from dit_cache_fx.errors import OptionError

Given = Mapping[str, Sequence[nn.Module]]


def given_blocks(**lists: Any) -> Given:
    """Return the arguments that hold blocks, each as a sequence of modules.

    Raises `OptionError` if one is no list of modules, or all are empty.
    """
    given = {name: _modules(name, value) for name, value in lists.items()}
    if not any(given.values()):
        raise OptionError(
            "double_blocks", [], "at least one of double_blocks and single_blocks must hold blocks"
        )
    return {name: blocks for name, blocks in given.items() if blocks}


def _modules(name: str, value: Any) -> list[nn.Module]:
    expected = "a list of the model's block modules, for example model.double_blocks"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(name, _what(value), expected)
    blocks = list(value)
    for index, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise OptionError(f"{name}[{index}]", _what(block), expected)
    return blocks


def _what(value: Any) -> Any:
    return type(value).__name__ if isinstance(value, nn.Module) else value


def model_with(given: Given) -> nn.Module:
    """Return the only module of this process whose module lists hold all of these blocks.

    A module does not know its parents, so the search covers all modules that are alive.
    """
    wanted = {block for blocks in given.values() for block in blocks}
    # type(): isinstance would call the objects' own code
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    found: list[nn.Module] = [m for m in alive if wanted <= _members(m)]
    if len(found) == 1:
        return found[0]
    names = [type(m).__name__ for m in found]
    reason = f"{len(found)} modules hold these lists: {names}" if found else "no module holds them"
    raise OptionError("model", None, f"{reason}; pass the model that is called: model=...")


def _members(model: nn.Module) -> set[nn.Module]:
    """Return the members of this module's own lists; empty for a list or a view itself."""
    if issubclass(type(model), (CachedModel, *LISTS)):
        return set()
    children = vars(model).get("_modules", {}).values()
    return {m for child in children if isinstance(child, LISTS) for m in child}


def places(
    model: nn.Module, given: Given, never: Mapping[str, Collection[int]]
) -> tuple[list[str], dict[str, set[int]]]:
    """Return the model's lists that hold the given blocks, and the ids in them to leave uncached.

    `never`: ids in the given lists. Blocks of the model's lists that were not given are not cached
    either.
    """
    where = _where(model)
    sizes = {path: index + 1 for path, index in where.values()}
    ids: dict[str, set[int]] = {}
    for name, blocks in given.items():
        for index, block in enumerate(blocks):
            if block not in where:
                raise OptionError(
                    f"{name}[{index}]",
                    type(block).__name__,
                    f"no module list of the model ({type(model).__name__}) holds this block; "
                    f"it has {sorted(sizes)}",
                )
            path, place = where[block]
            left = ids.setdefault(path, set(range(sizes[path])))
            if index not in never.get(name, ()):
                left.discard(place)
    return list(ids), ids


def _where(model: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """Return, for each member of a module list, the list's path and its index there."""
    where: dict[nn.Module, tuple[str, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LISTS):
            for index, member in enumerate(module):
                where.setdefault(member, (path, index))
    return where


def checked_ids(given: Given, ids: Any) -> dict[str, set[int]]:
    """Return `no_cache_block_id` in terms of the given lists.

    Raises `OptionError` for a list that was not given, or an id beyond its end.
    """
    for name, some in ids.items():
        if name not in given:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(some)},
                f"no list is called {name!r}; given are {list(given)}",
            )
        beyond = sorted(i for i in some if i >= len(given[name]))
        if beyond:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(some)},
                f"{name} has {len(given[name])} blocks, ids 0 to {len(given[name]) - 1}; "
                f"got {beyond}",
            )
    return {name: set(some) for name, some in ids.items()}
