"""From Dynamo's graph, called with tensors of certain shapes, to graphs that answer its calls."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dit_cache_fx.dynamo.capture import Input, Outlined, capture_graph
from dit_cache_fx.dynamo.inner import Compile
from dit_cache_fx.dynamo.parts import compiled_part
from dit_cache_fx.dynamo.shared import Shared
from dit_cache_fx.ir.program import operations
from dit_cache_fx.lowering import Part, Variants, lower_variants
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.passes import run_passes
from dit_cache_fx.runtime.graphs import block_bytes
from dit_cache_fx.strategies import check_block_ids
from dit_cache_fx.values.pytree import Identity

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Entry(Lowered):
    """Graphs that answer calls of Dynamo's graph.

    `changed`: which of its tensors the graph changes in place. Behind the output the graphs give
    what is in these afterwards.
    """

    changed: tuple[int, ...] = ()


def lower(
    outlined: Outlined, inputs: Sequence[Input], shared: Shared, compile_graph: Compile
) -> Entry:
    """The graphs for inputs like these, which `compile_graph` compiles when they are called first.

    Raises `CaptureError` or `DiscoveryError` where there can be none.
    """
    strategy = shared.host.strategy
    traced = capture_graph(outlined, inputs, strategy)
    program = traced.program
    check_block_ids(strategy, {**program.block_lists, **outlined.elsewhere})
    nodes = operations(program.graph)
    run_passes(program, strategy)
    variants = lower_variants(program)
    origins = dict(zip(program.inputs, outlined.origins, strict=True))

    def compiled(part: Part) -> Part:
        return compiled_part(part, compile_graph, variants.held, outlined.dynamos, origins)

    ready = variants.mapped(compiled)
    entry = Entry(
        program,
        ready,
        nodes,
        block_bytes(traced.recording, traced.blocks),
        shared.serial(_identity(ready)),
        traced.changed,
    )
    shared.programs.add(entry)
    log.info("captured %s", entry)
    return entry


def _identity(variants: Variants) -> Hashable:
    """What tells programs apart: the code of their graphs, the constants in it, what is held."""
    parts = [p for p in (variants.prefix, variants.compute, variants.reuse) if p is not None]
    code = tuple(part.gm.code for part in parts)
    constants = tuple(
        Identity(getattr(part.gm, str(node.target)))
        for part in parts
        for node in part.gm.graph.find_nodes(op="get_attr")
    )
    return code, constants, tuple(variants.held.items())
