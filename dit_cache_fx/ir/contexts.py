"""Generate the `with` blocks for the contexts of a graph's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import fx

from dit_cache_fx.ir.node_meta import meta_of


def generate_contexts(graph: fx.Graph) -> None:
    """Wrap each node in its contexts when the graph's code is generated.

    After:

        with torch.autocast('cpu', torch.bfloat16, cache_enabled=True):
            model_blocks_0 = getattr(self.model.blocks, "0")(x);  x = None
    """
    within = {f"{n.name} = ": str(w) for n in graph.nodes if (w := meta_of(n).within)}
    if within:
        graph.on_generate_code(lambda _: partial(_entered, within))


def _entered(within: Mapping[str, str], body: Sequence[str]) -> list[str]:
    return [_line(within, text) for text in body]


def _line(within: Mapping[str, str], text: str) -> str:
    start = text[: text.find(" = ") + 3]
    return f"with {within[start]}:\n    {text}" if start in within else text
