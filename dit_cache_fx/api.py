"""`apply` and `restore`: cache a model or a pipeline, and undo it."""

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
#: arguments of `apply` that are not the strategy's, and their defaults
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
    """Return a cached model, called exactly as `model`; `model` itself does not change.

    The two share their weights and their blocks. The first call of each input signature (shapes,
    dtypes, devices and constants) captures a graph. Call the cached model without gradients, under
    `torch.no_grad()` or `torch.inference_mode()`: with gradients it runs uncached, with a warning.

    A pipeline is changed in place and returned: cached models replace its `transformer` and its
    other transformers, if it has any (`transformer_2`). They use the timesteps of `pipe.scheduler`,
    and two of them share the steps of a run. `restore` undoes this.

    Args:
        model (`nn.Module | DiffusionPipeline`):
            A diffusion transformer in evaluation mode, or a pipeline that holds one.
        strategy (`str | Strategy`):
            "deepcache", "teacache", "taylorcache", "newtoncache", "hicache", "foca", "exponential",
            "firstblockcache" (also "dbcache"), "magcache" or "easycache", with `options`; or a
            `Strategy` object.
        blocks (`str | nn.ModuleList | Sequence[str | nn.ModuleList]`, *optional*):
            The block lists, as attribute paths or as the lists themselves. When None, they are
            determined from the graph.
        timestep (`str`, *optional*):
            The name of forward's timestep argument. When None, it is determined from the arguments.
        check (`bool`, defaults to `True`):
            Check each captured graph against the model on a second input. If the model's forward
            changes something around its blocks that they may read, the blocks run once more.
        options (`Any`):
            The options of the strategy, if `strategy` is a name: see the class of that name. For a
            pipeline, also options for a single transformer, by its name:
            `transformer_2={"schedule": "quality"}`, or False to leave it uncached.

    Returns:
        A `CachedModel`, or the pipeline.

    Raises:
        OptionError: An argument has a value that cannot work. The text names the values that would.
        DiscoveryError: The model has no block list. The first call raises it if none can be used,
            or if the timestep argument cannot be determined.
        CaptureError: The first call raises it if the model cannot be captured, or if the captured
            graph differs from the model.

    Example:
        >>> cached = dit_cache_fx.apply(model, "taylorcache", schedule="quality", num_steps=50)
        >>> pipe = dit_cache_fx.apply(pipe, "taylorcache", schedule="quality")
    """
    arguments: dict[str, Any] = {"blocks": blocks, "timestep": timestep, "check": check}
    if isinstance(model, nn.Module):
        return _apply_to_model(model, strategy, options, **arguments)

    apply_to_pipeline(model, strategy, {**arguments, **options})
    return model


def apply_to_pipeline(pipe: Any, strategy: str | Strategy, options: dict[str, Any]) -> None:
    """Apply to a pipeline, which may be an nn.Module itself. `options`: all other arguments."""

    def cache(model: nn.Module, chosen: str | Strategy, **own: Any) -> CachedModel:
        named = {name: own.pop(name, value) for name, value in _OTHERS.items()}
        return _apply_to_model(model, chosen, own, **named)

    cache_pipeline(pipe, strategy, options, cache)


@overload
def restore(model: CachedModel) -> nn.Module: ...


@overload
def restore(model: PipelineT) -> PipelineT: ...


def restore(model: Any) -> Any:
    """Return the original of a cached model, or a pipeline with its original transformers.

    The cached tensors are freed. Anything that is not cached is returned as it is.

    Args:
        model (`CachedModel | DiffusionPipeline`):
            The cached model or the pipeline that `apply` returned.

    Returns:
        The original model, or the pipeline.

    Example:
        >>> pipe = dit_cache_fx.apply(pipe, "taylorcache", schedule="quality")
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
        raise OptionError(
            "model", type(model).__name__, "a helper is enabled on it: call its disable() first"
        )
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
    """Refuse a model whose calls would bypass the cached model, or go through another cache."""
    name = type(model).__name__
    if is_compiled(model):
        raise OptionError("model", name, "call apply first, then torch.compile")
    for given in (model, original(model)):
        if vars(given).get("_compiled_call_impl") is not None:
            raise OptionError(
                "model",
                name,
                "model.compile() was called on it, which a cached model would bypass: apply to a "
                "model that is not compiled, then call cached.compile()",
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
    """Make a cached model from checked arguments; a copy of one is made in the same way."""
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
        raise OptionError(
            "blocks", blocks, "at least one block list, or None to determine them from the graph"
        )
    return lists


def _check_ids_early(strategy: Strategy, lists: Sequence[BlockList], known: bool) -> None:
    """Refuse ids that are wrong for every block list that the capture may find."""
    sizes = {b.name: len(b.modules) for b in lists}
    if known:
        check_block_ids(strategy, sizes)
        return
    largest = max(sizes.values())
    check_block_ids(strategy, sizes, aliases=dict.fromkeys(ALIASES, largest))
