"""`backend`: the cache as a backend of `torch.compile`.

Dynamo captures the model and inlines its blocks. Here the blocks become calls again (`outline`),
the result becomes a `Program` (`capture`), goes through the same passes, and is lowered to
variants. The inner compiler compiles each variant on its first run (`parts`); the host decides
which one runs (`graph`).
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
    """Return a backend for `torch.compile` that caches the model's blocks.

    The object has the methods of a cached model (`cache_report()`, `disable()`, ...). Use one for
    each model. If a model cannot be cached, `inner` compiles it as it is, with a warning.

    Args:
        strategy (`str | Strategy`):
            A name that `apply` takes, with `strategy_options`, or a `Strategy` object.
        inner (`str | Callable`, defaults to `"inductor"`):
            The backend that compiles the graphs: a registered name, or a callable.
        mode (`str`, *optional*):
            The mode of the inner backend, as in `torch.compile`. "reduce-overhead" makes a CUDA
            graph for each kind of step.
        options (`Mapping[str, Any]`, *optional*):
            The options of the inner backend, as in `torch.compile`.
        blocks (`str | nn.ModuleList | Sequence[str | nn.ModuleList]`, *optional*):
            The block lists, as attribute paths or as the lists themselves. When None, they are
            determined from the graph.
        timestep (`str`, *optional*):
            The name of forward's timestep argument. When None, it is determined from the arguments.
        strategy_options (`Any`):
            The options of the strategy, if `strategy` is a name: see the class of that name.

    Returns:
        A `Backend`.

    Raises:
        OptionError: An argument has a value that cannot work. The text names the values that would.

    Example:
        >>> cache = dit_cache_fx.backend("taylorcache", compute_ratio=0.3)
        >>> compiled = torch.compile(model, backend=cache)
        >>> print(cache.cache_report())
        taylorcache...
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
    """Support `torch.compile(model, backend="dit_cache_fx", options=dict(strategy=..., ...))`.

    `options` are the arguments of `backend`; those of the inner backend are its `options` in turn.
    The backend object cannot be reached this way, and each graph has one of its own.
    """
    arguments = dict(options or {})
    if "strategy" not in arguments:
        expected = (
            "for example options={'strategy': 'taylorcache', 'no_cache_steps': range(0, 50, 2)}"
        )
        raise OptionError("options", options, expected)
    if mode is not None:
        arguments.setdefault("mode", mode)
    return backend(**arguments)(gm, example_inputs)


def _named(blocks: Blocks) -> list[str | nn.ModuleList]:
    """Return `blocks` as a list, without a model to look for them in."""
    named = listed(blocks)
    if not named or not all(isinstance(item, (str, *LISTS)) for item in named):
        raise OptionError(
            "blocks", blocks, "attribute paths of module lists, or the lists themselves"
        )
    return named
