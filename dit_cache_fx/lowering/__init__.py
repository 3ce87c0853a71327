"""Lower a program after its passes to graphs that run.

`variants` gives one graph for a computed step and one for a reused step, each fully pruned, picked
on the host. `one_graph` joins both in a single graph with the decision in it (`torch.cond`), for
`torch.compile` and `torch.export`.
"""

from dit_cache_fx.lowering.one_graph import OneGraph, lower_one_graph
from dit_cache_fx.lowering.part import CompiledPart, Part
from dit_cache_fx.lowering.preamble import Preamble, split_preamble
from dit_cache_fx.lowering.split_part import (
    SplitPart,
    compiled_variants,
    own_copy,
    prepared,
    split_variants,
)
from dit_cache_fx.lowering.variants import Variants, lower_variants

__all__ = [
    "CompiledPart",
    "OneGraph",
    "Part",
    "Preamble",
    "SplitPart",
    "Variants",
    "compiled_variants",
    "lower_one_graph",
    "lower_variants",
    "own_copy",
    "prepared",
    "split_preamble",
    "split_variants",
]
