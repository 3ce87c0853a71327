"""`apply`: composes the stages, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from dit_cache_fx.cached_model import CachedModel, is_compiled, original
from dit_cache_fx.capture import (
    BlockList,
    CallSignature,
    Subject,
    candidate_lists,
    named_list,
    named_timestep,
)
from dit_cache_fx.capture.callable import positional_names
from dit_cache_fx.capture.leaves import LISTS, Blocks, listed
from dit_cache_fx.errors import DiscoveryError, OptionError
from dit_cache_fx.forward_patch import installed_on
from dit_cache_fx.runtime.engine import Engine
from dit_cache_fx.strategies import ALIASES, Strategy, check_block_ids, make_strategy
from dit_cache_fx.strategies.calibrated import check_model


def apply(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    blocks: Blocks | None = None,
    timestep: str | None = None,
    check: bool = True,
    **options: Any,
) -> CachedModel:
    """Return a cached model, called exactly as `model`; `model` itself stays as it is.

    The two share their weights and their blocks. The first call of each input signature captures a
    graph.

    Args:
        model (`nn.Module`):
            A diffusion transformer in evaluation mode.
        strategy (`str | Strategy`):
            "deepcache", "teacache", "taylorcache", "newtoncache", "hicache", "foca", "exponential",
            "firstblockcache" (also "dbcache"), "magcache" or "easycache", with `options`; or a
            `Strategy` object.
        blocks (`str | nn.ModuleList | Sequence[str | nn.ModuleList]`, *optional*):
            The block lists, as attribute paths or as the lists themselves. When None, they are
            found from the graph.
        timestep (`str`, *optional*):
            The name of forward's timestep argument. When None, it is found.
        check (`bool`, defaults to `True`):
            Check each captured graph against the model on a second input. Where the model's forward
            changes something around its blocks that they may read, the blocks run once more.
        options (`Any`):
            The options of the strategy, where `strategy` is a name: see the classes of these names.

    Raises:
        OptionError: An argument cannot work. The text says what would.
        DiscoveryError: The model holds no block list.

    Example:
        >>> pipe.transformer = dit_cache_fx.apply(
        ...     pipe.transformer, "taylorcache", schedule="quality", num_steps=50
        ... )
    """
    if not isinstance(model, nn.Module):
        raise OptionError("model", model, "an nn.Module")
    if is_compiled(model):
        raise OptionError("model", type(model).__name__, "apply first, then torch.compile")
    for given in (model, original(model)):
        if vars(given).get("_compiled_call_impl") is not None:
            raise OptionError(
                "model",
                type(model).__name__,
                "model.compile() was called on it, which a cached model would not go through: "
                "apply to a model that is not compiled, then call cached.compile()",
            )
    model = original(model)
    if installed_on(model) is not None:
        raise OptionError("model", type(model).__name__, "a helper is enabled on it: disable() it")
    chosen = make_strategy(strategy, options)
    if model.training:
        raise OptionError("model.training", True, "call model.eval() first")
    if any(p.is_meta for p in model.parameters()):
        raise OptionError(
            "model",
            type(model).__name__,
            "it has weights on the meta device: not loaded, or offloaded layer by layer (then "
            "apply first, and enable the offloading afterwards)",
        )
    signature = _signature(model, timestep)
    named_timestep(signature.parameters, timestep, more=signature.open)
    lists = candidate_lists(model) if blocks is None else _named_lists(model, blocks)
    if not lists:
        raise DiscoveryError(
            "no block list found: the model holds no nn.ModuleList. A cache needs the model's "
            "blocks in an nn.ModuleList (blocks=['attribute.path'])"
        )
    names = None if blocks is None else tuple(b.name for b in lists)
    check_model(chosen, model)
    _check_ids_early(chosen, lists, known=blocks is not None)
    return _cached(model, chosen, names, timestep, check)


def _cached(
    model: nn.Module,
    strategy: Strategy,
    blocks: tuple[str, ...] | None,
    timestep: str | None,
    check: bool,
) -> CachedModel:
    """A model whose arguments were looked at: a copy of a cached one is made in the same way."""
    signature = _signature(model, timestep)
    argument = named_timestep(signature.parameters, timestep, more=signature.open)
    engine = Engine(Subject(model, signature, blocks, strategy, check), argument)
    again = partial(_cached, strategy=strategy, blocks=blocks, timestep=timestep, check=check)
    return CachedModel(model, engine, again)


def _signature(model: nn.Module, timestep: str | None) -> CallSignature:
    names = positional_names(model)
    return CallSignature(model.forward, names if timestep in (None, *names) else ())


def _named_lists(model: nn.Module, blocks: Blocks) -> list[BlockList]:
    names = {m: n for n, m in model.named_modules() if isinstance(m, LISTS)}
    lists = []
    for item in listed(blocks):
        found = next((m for m, n in names.items() if m is item or n == item), None)
        if found is None or not len(found):
            what = item if isinstance(item, str) else type(item).__name__
            raise OptionError(
                "blocks", what, f"no such module list in the model; it has {sorted(names.values())}"
            )
        lists.append(named_list(model, names[found]))
    if not lists:
        raise OptionError("blocks", blocks, "at least one block list, or None to find them")
    return lists


def _check_ids_early(strategy: Strategy, lists: Sequence[BlockList], known: bool) -> None:
    """Refuse ids that cannot be right whatever lists the capture will find."""
    sizes = {b.name: len(b.modules) for b in lists}
    if known:
        check_block_ids(strategy, sizes)
        return
    largest = max(sizes.values())
    check_block_ids(strategy, sizes, aliases=dict.fromkeys(ALIASES, largest))
