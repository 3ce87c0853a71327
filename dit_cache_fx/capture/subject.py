"""What is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_cache_fx.capture.leaves import BlockList, candidate_lists, named_list
from dit_cache_fx.capture.signature import CallSignature, FlatCall, unflatten_call
from dit_cache_fx.ir.program import BlockId
from dit_cache_fx.strategies import Strategy, never_cached


@dataclass(frozen=True)
class Subject:
    """What is captured: the model, how it is called, and where its blocks are looked for."""

    model: nn.Module
    signature: CallSignature
    blocks: tuple[str, ...] | None  # the block lists' names where the user gave them
    strategy: Strategy
    check: bool = True

    def lists(self) -> list[BlockList]:
        """The lists that may hold the trunk, as they are now."""
        if self.blocks is None:
            return candidate_lists(self.model)
        return [named_list(self.model, name) for name in self.blocks]

    def always_runs(self, name: str) -> bool:
        """Whether the block of this name may be one that is never cached.

        Before the trunk is found an alias ("double_blocks") can mean any of the lists.
        """
        list_name, _, index = name.rpartition(".")
        block = BlockId(list_name, int(index))
        return any(
            never_cached(block, self.strategy, lists) for lists in ((list_name,), ("", list_name))
        )

    def opened(self, lists: Sequence[BlockList]) -> list[nn.Module]:
        """The blocks whose inside is recorded, to find the strategy's signal there."""
        wanted = self.strategy.has_rule and self.strategy.looks_at() == "modulated"
        return [blocks.modules[0] for blocks in lists] if wanted else []

    def run(self, call: FlatCall, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's own answer to a flattened call with these tensors."""
        arguments = unflatten_call(call.skeleton, list(tensors))
        return self.signature.call(self.model.forward, arguments)
