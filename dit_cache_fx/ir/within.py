"""Contexts that a node runs within: what the model's forward has entered around a module's call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import fx

#: node.meta key, on the call of a module: its `Within`, where it is not empty
WITHIN = "dit_cache_within"


class AttentionKernels(NamedTuple):
    """Names of the `SDPBackend`s that are enabled within a context and outside, by priority."""

    inside: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Within:
    """The state that a module's call finds; a graph itself runs without any autocast.

    `autocast`: device type and dtype where it is on. `attention`: None where the kernels are those
    of the graph's caller.
    """

    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    cache: bool = True  # whether autocast keeps the weights that it has cast
    attention: AttentionKernels | None = None

    def __bool__(self) -> bool:
        return bool(self.autocast) or self.attention is not None

    def __str__(self) -> str:
        """The contexts, as Python source that needs the name `torch` only."""
        contexts = [
            f"torch.autocast({device!r}, {dtype}, cache_enabled={self.cache})"
            for device, dtype in self.autocast
        ]
        if self.attention is not None:
            names = ", ".join(f"torch.nn.attention.SDPBackend.{n}" for n in self.attention.inside)
            contexts.append(f"torch.nn.attention.sdpa_kernel([{names}], set_priority=True)")
        return ", ".join(contexts)


def generate_contexts(graph: fx.Graph) -> None:
    """Let the graph's code enter the contexts of its nodes.

    After:

        with torch.autocast('cpu', torch.bfloat16, cache_enabled=True):
            model_blocks_0 = getattr(self.model.blocks, "0")(x);  x = None
    """
    within = {f"{n.name} = ": str(n.meta[WITHIN]) for n in graph.nodes if n.meta.get(WITHIN)}
    if within:
        graph.on_generate_code(lambda _: partial(_entered, within))


def _entered(within: Mapping[str, str], body: Sequence[str]) -> list[str]:
    return [_line(within, text) for text in body]


def _line(within: Mapping[str, str], text: str) -> str:
    start = text[: text.find(" = ") + 3]
    return f"with {within[start]}:\n    {text}" if start in within else text
