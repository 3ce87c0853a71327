"""Cache each transformer of a pipeline, and restore the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from dit_cache_fx.cached_model import CachedModel, is_compiled, original
from dit_cache_fx.errors import OptionError
from dit_cache_fx.runtime.shared_run import share_run
from dit_cache_fx.strategies import Strategy
from dit_cache_fx.strategies.options import options_of
from dit_cache_fx.strategies.registry import BY_NAME

#: attributes of a pipeline whose name contains this hold a model to cache
TRANSFORMER = "transformer"
#: options that select the steps to compute: one replaces another
_WAYS = ("no_cache_steps", "compute_ratio", "schedule", "computed_steps")


class Choice(NamedTuple):
    """The caching of one transformer: a strategy, its options, other arguments of `apply`."""

    strategy: str | Strategy
    options: dict[str, Any]

    def with_own(self, name: str, own: Any) -> Choice:
        """Add the options for one transformer alone."""
        if not isinstance(own, Mapping):
            raise OptionError(
                name,
                own,
                "the options of this transformer alone, such as dict(schedule='quality'), or "
                "False to leave it uncached",
            )
        more = dict(own)
        if "strategy" in more:
            return Choice(more.pop("strategy"), self.options)._known()._with(more)
        return self._with(more)

    def _with(self, more: Mapping[str, Any]) -> Choice:
        dropped = _WAYS if any(way in more for way in _WAYS) else ()
        if isinstance(self.strategy, Strategy):
            known = {k: v for k, v in more.items() if k in options_of(type(self.strategy))}
            ways = {way: None for way in dropped if way not in known}
            strategy = replace(self.strategy, **ways, **known) if known else self.strategy
            return Choice(strategy, {**self.options, **_without(more, known)})
        return Choice(self.strategy, {**_without(self.options, dropped), **more})

    def _known(self) -> Choice:
        """Keep only the common options that another strategy also has."""
        kind = BY_NAME.get(self.strategy) if isinstance(self.strategy, str) else None
        names = {*(() if kind is None else options_of(kind)), "blocks", "timestep", "check"}
        return Choice(self.strategy, {k: v for k, v in self.options.items() if k in names})


class PipelineTimesteps:
    """The timesteps of a pipeline's run, read when the run has begun.

    It does not keep the pipeline alive, which holds the model that holds it. A pipeline made from
    this one (`from_pipe`) continues with its scheduler.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = _weak(pipe)
        self._scheduler = getattr(pipe, "scheduler", None)

    def __call__(self) -> Any:
        scheduler = getattr(self._pipe(), "scheduler", None) or self._scheduler
        return getattr(scheduler, "timesteps", None)


def cache_pipeline(
    pipe: Any,
    strategy: str | Strategy,
    options: dict[str, Any],
    cache: Callable[..., CachedModel],
) -> None:
    """Replace each transformer of a pipeline by a cached one.

    `options`: for all, and under a transformer's name for that one. `cache`: caches one model.
    """
    found = transformers_of(pipe)
    own = {name: options[name] for name in options if TRANSFORMER in name}
    for name in own:
        if name not in found:
            raise OptionError(
                name, own[name], f"{type(pipe).__name__} has no such model; it has {sorted(found)}"
            )
    common = Choice(strategy, _without(options, own))
    made: dict[str, CachedModel] = {}
    for name, model in found.items():
        _check_untouched(pipe, name, model)
        if own.get(name, {}) is not False:
            choice = common.with_own(name, own.get(name, {}))
            made[name] = cache(model, choice.strategy, **choice.options)
    if not made:
        raise OptionError(*next(iter(own.items())), "at least one transformer to cache")
    share_run([cached._call_log for cached in made.values()], PipelineTimesteps(pipe))
    for name, cached in made.items():  # all of them, or none
        setattr(pipe, name, cached)


def restore_pipeline(pipe: Any) -> None:
    """Restore the original transformers."""
    for name, model in transformers_of(pipe).items():
        cached = behind(model)
        if isinstance(cached, CachedModel):
            setattr(pipe, name, uncached(cached))


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline, by the names of its attributes.

    Raises `OptionError` if it has none.
    """
    held = (*getattr(pipe, "__dict__", ()), *getattr(pipe, "_modules", ()))
    names = dict.fromkeys((TRANSFORMER, *held))
    found = {name: getattr(pipe, name, None) for name in names if TRANSFORMER in name}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not models:
        raise OptionError("model", type(pipe).__name__, _without_transformer(pipe, names))
    return models


def behind(model: nn.Module) -> nn.Module:
    """Return the model that was passed to `torch.compile`; any other model as it is."""
    while is_compiled(model):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def uncached(cached: CachedModel) -> nn.Module:
    """Return the original of a cached model, without cached tensors, with its offloading hooks."""
    cached.clear_states()
    model, hook = original(cached), vars(cached).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import (  # type: ignore[import-untyped]
            add_hook_to_module,
            remove_hook_from_module,
        )

        remove_hook_from_module(cached)
        add_hook_to_module(model, hook)
    return model


def _check_untouched(pipe: Any, name: str, model: nn.Module) -> None:
    if isinstance(behind(model), CachedModel):
        raise OptionError(
            "model",
            type(pipe).__name__,
            f"its {name} is cached already: call dit_cache_fx.restore(pipe) first",
        )


def _without_transformer(pipe: Any, names: Mapping[str, Any]) -> str:
    """Return the reason why there is nothing to cache, and what would be right."""
    expected = "an nn.Module, or a pipeline that holds a Diffusion Transformer as its .transformer"
    if hasattr(pipe, TRANSFORMER):
        return f"{expected}; here that is {getattr(pipe, TRANSFORMER)!r}, not a loaded model"
    models = [
        f"{name} ({type(value).__name__})"
        for name in names
        if isinstance(value := getattr(pipe, name, None), nn.Module)
    ]
    return f"{expected}; it has {', '.join(models)}" if models else expected


def _weak(pipe: Any) -> Callable[[], Any]:
    try:
        return ref(pipe)
    except TypeError:  # a class without weak references
        return lambda: pipe


def _without(options: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
