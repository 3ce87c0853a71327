"""How a user names block lists (`blocks=...`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from dit_cache_fx.errors import OptionError

#: what can hold blocks
LISTS = (nn.ModuleList, nn.Sequential)
Blocks = str | nn.ModuleList | Sequence[str | nn.ModuleList]


def listed(blocks: Blocks) -> list[str | nn.ModuleList]:
    """One name or list, or several of them, as a list; raises `OptionError` for anything else."""
    if isinstance(blocks, (str, *LISTS)):
        return [blocks]
    if not isinstance(blocks, Iterable):
        raise OptionError("blocks", blocks, "attribute paths of module lists, or the lists")
    return list(blocks)
