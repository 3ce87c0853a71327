"""`apply` composes the stages; `restore` undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, overload

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
from dit_cache_fx.pipeline import behind, cache_pipeline, restore_pipeline, uncached
from dit_cache_fx.runtime.engine import Engine
from dit_cache_fx.strategies import ALIASES, Strategy, check_block_ids, make_strategy
from dit_cache_fx.strategies.calibrated import check_model

PipelineT = TypeVar("PipelineT")
#: the arguments of `apply` that are not the strategy's, and their defaults
_OTHERS = {"blocks": None, "timestep": None, "check": True}


@overload
def apply(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    blocks: Blocks | None = None,
    timestep: str | None = None,
    check: bool = True,
    **options: Any,
) -> CachedModel: ...


@overload
def apply(
    model: PipelineT,
    strategy: str | Strategy,
    *,
    blocks: Blocks | None = None,
    timestep: str | None = None,
    check: bool = True,
    **options: Any,
) -> PipelineT: ...


def apply(
    model: Any,
    strategy: str | Strategy,
    *,
    blocks: Blocks | None = None,
    timestep: str | None = None,
    check: bool = True,
    **options: Any,
) -> Any:
    """Return a cached model, called exactly as `model`; `model` itself stays as it is.

    The two share their weights and their blocks. The first call of each input signature captures a
    graph.

    Given a pipeline, put cached models in the place of its `transformer` and, if it has one, of its
    `transformer_2`, and return the pipeline. They go by the timesteps of `pipe.scheduler`, and two
    of them share the steps of a run. `restore` puts the originals back.

    Args:
        model (`nn.Module | DiffusionPipeline`):
            A diffusion transformer in evaluation mode, or a pipeline that holds one.
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
            For a pipeline, also the options that differ for one transformer, by its name:
            `transformer_2={"schedule": "quality"}`, or False to leave it uncached.

    Raises:
        OptionError: An argument cannot work. The text says what would.
        DiscoveryError: The model holds no block list.

    Example:
        >>> pipe = dit_cache_fx.apply(pipe, "taylorcache", schedule="quality")
    """
    arguments: dict[str, Any] = {"blocks": blocks, "timestep": timestep, "check": check}
    if isinstance(model, nn.Module):
        return _apply_to_model(model, strategy, options, **arguments)

    apply_to_pipeline(model, strategy, {**arguments, **options})
    return model


def apply_to_pipeline(pipe: Any, strategy: str | Strategy, options: dict[str, Any]) -> None:
    """`apply` on a pipeline, which may be an nn.Module itself. `options`: everything else."""

    def cache(model: nn.Module, chosen: str | Strategy, **own: Any) -> CachedModel:
        named = {name: own.pop(name, value) for name, value in _OTHERS.items()}
        return _apply_to_model(model, chosen, own, **named)

    cache_pipeline(pipe, strategy, options, cache)


@overload
def restore(model: CachedModel) -> nn.Module: ...


@overload
def restore(model: PipelineT) -> PipelineT: ...


def restore(model: Any) -> Any:
    """Return the model behind a cached one, or a pipeline with its original transformers again.

    The held tensors are freed.

    Args:
        model (`CachedModel | DiffusionPipeline`):
            The cached model or the pipeline that `apply` returned.

    Example:
        >>> pipe = dit_cache_fx.restore(pipe)
    """
    if not isinstance(model, nn.Module):
        restore_pipeline(model)
        return model
    cached = behind(model)
    return uncached(cached) if isinstance(cached, CachedModel) else model


def _apply_to_model(
    model: nn.Module,
    strategy: str | Strategy,
    options: dict[str, Any],
    *,
    blocks: Blocks | None,
    timestep: str | None,
    check: bool,
) -> CachedModel:
    _check_callable(model)
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


def _check_callable(model: nn.Module) -> None:
    """Raise where calls would not go through a cached model, or would through another cache."""
    name = type(model).__name__
    if is_compiled(model):
        raise OptionError("model", name, "apply first, then torch.compile")
    for given in (model, original(model)):
        if vars(given).get("_compiled_call_impl") is not None:
            raise OptionError(
                "model",
                name,
                "model.compile() was called on it, which a cached model would not go through: "
                "apply to a model that is not compiled, then call cached.compile()",
            )
    if getattr(original(model), "is_cache_enabled", False) is True:
        raise OptionError(
            "model", name, "a cache of diffusers is enabled on it: call its disable_cache() first"
        )


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
