"""`no_cache_block_id`: resolve and check the blocks that it names."""

from __future__ import annotations

from collections.abc import Sequence

from dit_cache_fx.errors import OptionError
from dit_cache_fx.ir.node_meta import BlockId
from dit_cache_fx.strategies.base import Strategy

#: names for the first and the second block list, as in published helpers
ALIASES = ("double_blocks", "single_blocks")


def never_cached(block: BlockId, strategy: Strategy, lists: Sequence[str]) -> bool:
    """Return whether `no_cache_block_id` names this block, by its list's name or alias."""
    names = {block.list_name}
    if block.list_name in lists[: len(ALIASES)]:
        names.add(ALIASES[lists.index(block.list_name)])
    ids = strategy.no_cache_block_id or {}
    return any(block.index in ids.get(name, ()) for name in names)


def check_block_ids(
    strategy: Strategy, lists: dict[str, int], aliases: dict[str, int] | None = None
) -> None:
    """Raise `OptionError` if `no_cache_block_id` names a list or block that does not exist.

    `lists`: name -> number of blocks, in call order. `aliases`: the same for "double_blocks" and
    "single_blocks" while the order is unknown.
    """
    names = list(lists)
    sizes = {**(aliases or dict(zip(ALIASES, lists.values(), strict=False))), **lists}
    for name, ids in (strategy.no_cache_block_id or {}).items():
        if name not in sizes:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(ids)},
                f"no block list of this name; the lists are {names} (or "
                f"{list(ALIASES)[: len(names)]} in call order)",
            )
        beyond = sorted(i for i in ids if i >= sizes[name])
        if beyond:
            raise OptionError(
                "no_cache_block_id",
                {name: sorted(ids)},
                f"{name} has {sizes[name]} blocks, ids 0 to {sizes[name] - 1}; got {beyond}",
            )
