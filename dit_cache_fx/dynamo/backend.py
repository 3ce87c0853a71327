"""The second front end: the cache as a backend of `torch.compile`.

Dynamo captures the model; here the blocks that it has inlined become calls again (`outline`), the
result becomes a `Program` (`capture`), goes through the same passes, and is lowered to variants.
The inner compiler compiles each variant when it is needed first (`parts`); which one runs is
decided on the host (`graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from dit_cache_fx.capture.leaves import LISTS, Blocks, listed
from dit_cache_fx.dynamo.front_end import Backend
from dit_cache_fx.dynamo.inner import Inner
from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies import Strategy, make_strategy


def backend(
    strategy: str | Strategy,
    *,
    inner: Inner = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    timestep: str | None = None,
    **strategy_options: Any,
) -> Backend:
    """A backend for `torch.compile(model, backend=...)` that caches the model's blocks.

    The object has the life cycle of a cached model (`cache_report()`, `disable()`, ...). Use one
    for each model. What cannot be cached is compiled by `inner` as it is, with a warning.

    Args:
        strategy: a name that `apply` takes, with `strategy_options`, or a `Strategy`.
        inner: the backend that compiles the graphs: a registered name, or a callable.
        mode: of the inner backend, as in `torch.compile`; "reduce-overhead" gives each graph a
            CUDA graph.
        options: of the inner backend, as in `torch.compile`.
        blocks: the block lists, as attribute paths or `nn.ModuleList`s; found from the graph when
            None.
        timestep: the name of forward's timestep argument; found when None.

    Raises:
        OptionError: an argument that cannot work, with what would.
    """
    chosen = make_strategy(strategy, strategy_options)
    if timestep is not None and not isinstance(timestep, str):
        raise OptionError("timestep", timestep, "the name of forward's timestep argument")
    named = None if blocks is None else _named(blocks)
    return Backend(chosen, inner, mode, options, named, timestep)


def registered(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="dit_cache_fx", options=dict(strategy=..., ...))`.

    `options` are the arguments of `backend`; those of the inner backend are its `options` in turn.
    The backend object is out of reach this way, and each graph has one of its own.
    """
    arguments = dict(options or {})
    if "strategy" not in arguments:
        expected = "options={'strategy': 'taylorcache', 'no_cache_steps': range(0, 50, 2)}, say"
        raise OptionError("options", options, expected)
    if mode is not None:
        arguments.setdefault("mode", mode)
    return backend(**arguments)(gm, example_inputs)


def _named(blocks: Blocks) -> list[str | nn.ModuleList]:
    """`blocks` as a list; there is no model yet to look for them in."""
    named = listed(blocks)
    if not named or not all(isinstance(item, (str, *LISTS)) for item in named):
        raise OptionError("blocks", blocks, "attribute paths of module lists, or the lists")
    return named
