"""Lower Dynamo's graph, called with tensors of certain shapes, to graphs that answer its calls."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_cache_fx.dynamo.capture import Input, Outlined, capture_graph
from dit_cache_fx.dynamo.inner import Compile
from dit_cache_fx.dynamo.parts import compiled_part
from dit_cache_fx.dynamo.shared import Shared
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.ir.alone import Alone
from dit_cache_fx.ir.nodes import operations, tensor_spec
from dit_cache_fx.lowering import Part, Variants, lower_variants
from dit_cache_fx.lowering.lowered_program import Lowered, block_bytes
from dit_cache_fx.passes import run_passes
from dit_cache_fx.strategies import check_block_ids, spread_over
from dit_cache_fx.strategies.calibrated import check_graph
from dit_cache_fx.values.pytree import Identity
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import is_distributed

_DISTRIBUTED = (
    "the call has distributed tensors (DTensor), which a backend does not support; use "
    "dit_cache_fx.apply(model, ...), then torch.compile or compile_steps()"
)

#: a number in the code of a graph
_NUMBER = re.compile(r"(?<![\w.])\d+\.?\d*(?:e[+-]?\d+)?")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class DynamoEntry(Lowered):
    """Graphs that answer calls of Dynamo's graph.

    `changed`: the tensors that the graph changes in place. If there are any, the graphs return the
    output and the new values of these tensors.
    """

    changed: tuple[int, ...] = ()


def lower(
    outlined: Outlined,
    inputs: Sequence[Input],
    shared: Shared,
    compile_graph: Compile,
    whole: bool,
    alone: Alone | None = None,
) -> DynamoEntry:
    """Return the graphs for inputs like these; `compile_graph` compiles them on their first call.

    `whole`: Dynamo's graph is the whole model, not a piece of it.

    Raises `CaptureError` or `DiscoveryError` if there can be none.
    """
    strategy = spread_over(shared.call_log.strategy, shared.ranks)
    given = [inputs[i] for i in outlined.given if i < len(inputs)]
    if any(isinstance(v, torch.Tensor) and is_distributed(v) for v in given):
        raise CaptureError(_DISTRIBUTED)
    traced = capture_graph(outlined, inputs, strategy)
    program = traced.program
    lists = {**program.block_lists, **outlined.elsewhere}
    check_block_ids(strategy, lists)
    owned = [program.node(name) for name in sorted(program.owned) if whole]
    check_graph(strategy, lists, [tensor_spec(node).shape for node in owned])
    nodes = operations(program.graph)
    program.alone = alone
    run_passes(program, strategy)
    variants = lower_variants(program)
    origins = dict(zip(program.inputs, outlined.origins, strict=True))

    def compiled(part: Part) -> Part:
        return compiled_part(part, compile_graph, variants.cached, outlined.dynamos, origins)

    ready = variants.mapped(compiled)
    entry = DynamoEntry(
        program,
        ready,
        nodes,
        block_bytes(traced.recording, traced.blocks),
        shared.serial(_identity(ready, outlined)),
        strategy,
        traced.changed,
    )
    shared.programs.add(entry)
    log.info("captured %s", entry)
    return entry


def _identity(variants: Variants, outlined: Outlined) -> Hashable:
    """Return the identity of a program: the code of its graphs, constants, cached tensors.

    A timestep that is a constant differs in each of its graphs, and so do the values that the code
    computes from it; the other numbers in the model's call separate programs then.
    """
    parts = [p for p in (variants.prefix, variants.compute, variants.reuse) if p is not None]
    moves = outlined.constant is not None
    code = tuple(_NUMBER.sub("0", part.gm.code) if moves else part.gm.code for part in parts)
    values = (
        getattr(part.gm, str(node.target))
        for part in parts
        for node in part.gm.graph.find_nodes(op="get_attr")
    )
    constants = tuple(_form(value) if moves else Identity(value) for value in values)
    numbers = outlined.numbers_beside if moves else None
    return code, constants, tuple(variants.cached.items()), numbers


def _form(value: Any) -> Hashable:
    return TensorSpec.of(value) if isinstance(value, torch.Tensor) else Identity(value)
