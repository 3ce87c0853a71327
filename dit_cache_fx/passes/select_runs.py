"""Pass 2: group the blocks that are cached together."""

from __future__ import annotations

from dit_cache_fx.errors import OptionError
from dit_cache_fx.ir.node_meta import BlockId, block_of
from dit_cache_fx.ir.program import Program, Region
from dit_cache_fx.strategies import Strategy, never_cached


def select_runs(program: Program, strategy: Strategy) -> None:
    """Group the cached blocks into runs; a block that is never cached ends a run.

    Before, with `no_cache_block_id={"blocks": {2}}`:

        %b0 = call_module[model.blocks.0](%x)
        %b1 = call_module[model.blocks.1](%b0)
        %b2 = call_module[model.blocks.2](%b1)
        %b3 = call_module[model.blocks.3](%b2)

    After: the same graph, and `program.regions` is `[blocks.0, blocks.1]`, `[blocks.3]`.
    """
    runs: list[list[BlockId]] = [[]]
    calls = program.block_calls()
    for position, call in enumerate(calls):
        block = block_of(call)
        named = never_cached(block, strategy, tuple(program.block_lists))
        if named or strategy.always_runs(position, len(calls)):
            runs.append([])
        else:
            runs[-1].append(block)
    if calls and all(strategy.always_runs(i, len(calls)) for i in range(len(calls))):
        wanted = f"each of the model's {len(calls)} blocks always runs: leave at least one to cache"
        raise OptionError("strategy", strategy, wanted)
    filled = [run for run in runs if run]
    program.regions = tuple(Region(i, tuple(run)) for i, run in enumerate(filled))
