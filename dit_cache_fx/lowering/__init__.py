"""Lower a program after its passes to graphs that run.

`variants` gives one graph for a computed step and one for a reused step, each fully pruned, picked
on the host. `one_graph` joins both in a single graph with the decision in it (`torch.cond`), for
`torch.compile` and `torch.export`.
"""

from dit_cache_fx.lowering.one_graph import OneGraph, lower_one_graph
from dit_cache_fx.lowering.part import CompiledPart, Part
from dit_cache_fx.lowering.preamble import (
    CompiledSteps,
    Preamble,
    lower_compiled_steps,
    split_preamble,
)
from dit_cache_fx.lowering.variants import Variants, lower_variants

__all__ = [
    "CompiledPart",
    "CompiledSteps",
    "OneGraph",
    "Part",
    "Preamble",
    "Variants",
    "lower_compiled_steps",
    "lower_one_graph",
    "lower_variants",
    "split_preamble",
]
