"""`CachedModel`: the result of `apply`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_cache_fx._torch import (
    dynamo_callback,
    exporting,
    not_a_compiled_frame,
    traced_here,
    unseen,
)
from dit_cache_fx.capture import CallSignature, FlatCall
from dit_cache_fx.capture.outer_hook import after_call, before_call, outer_hook, own_forward
from dit_cache_fx.life_cycle import LifeCycle
from dit_cache_fx.lowering.lowered_program import Lowered
from dit_cache_fx.runtime.call_log import WANTS_GRADIENTS, CallLog
from dit_cache_fx.runtime.drive import NOTHING, Compiler, Serving, drive
from dit_cache_fx.runtime.engine import Engine, requires_grad
from dit_cache_fx.runtime.entry import Entry
from dit_cache_fx.runtime.execution import StepCompiler

#: attributes of the cached model itself; every other one belongs to the model
_OWN = frozenset({"_model", "_engine", "_rebuild", "_enabled", "_compiled_call_impl"})
#: attributes with which accelerate's hooks (offloading) wrap a forward: that of the cached model
_HOOK = frozenset({"forward", "_old_forward", "_hf_hook"})

#: attributes that can be set on the cached model itself
_SETTABLE = frozenset({"cur_timestep", "num_steps", "timesteps"})


class _Begun(NamedTuple):
    """A call that has begun: the engine's call, or None and the model's own forward.

    `hook`: runs around the call, and may have changed its arguments.
    """

    hook: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    serving: Serving | None
    uncached: Any


class _Alike(type):
    """A type that equals another one: pipelines compare the types of their components."""

    like: type | None = None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.like is not None and other is cls.like)

    def __hash__(cls) -> int:
        return type.__hash__(cls) if cls.like is None else hash(cls.like)


class CachedModel(LifeCycle, nn.Module, metaclass=_Alike):
    """A view of a model whose forward reuses cached results instead of running some blocks.

    `apply` makes one. It shares everything with the model: parameters, submodules and hooks are the
    model's own dictionaries, so `.to()`, `load_state_dict`, LoRA and replaced layers act on both.
    Every attribute that does not belong to the cache is read from and written to the model.

    Example:
        >>> cached = dit_cache_fx.apply(model, "taylorcache", compute_ratio=0.5)
        >>> with torch.no_grad():
        ...     noise = cached(sample, timestep, prompt)
        >>> isinstance(cached, type(model))
        True
    """

    def __new__(cls, model: nn.Module, *_: Any) -> CachedModel:
        """Make an instance of a new class that equals the model's."""
        kind: Any = _Alike(cls.__name__, (cls,), {"like": type(model)})
        made: CachedModel = object.__new__(kind)
        return made

    def __init__(
        self, model: nn.Module, engine: Engine, rebuild: Callable[[nn.Module], CachedModel]
    ) -> None:
        # nn.Module.__init__ would create new dictionaries
        for name in vars(nn.Module()):
            if name != "training":
                self.__dict__[name] = model.__dict__[name]
        # a saved pipeline stores this as the module of the model's class
        self.__dict__["__module__"] = type(model).__module__
        self._model = model
        self._engine = engine
        self._rebuild = rebuild
        self._enabled = True

    # --- being the model -------------------------------------------------------------------------

    @not_a_compiled_frame
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward, called as before."""
        if torch.compiler.is_dynamo_compiling() or traced_here((*args, *kwargs.values())):
            return self._traced(self._model.forward, args, kwargs)
        callback = dynamo_callback()
        begun = CachedModel._begun if callback is None else unseen(CachedModel._begun)
        hook, args, kwargs, serving, uncached = begun(self, args, kwargs, callback)
        output = uncached(*args, **kwargs) if serving is None else drive(serving)
        if hook is None:
            return output
        return (after_call if callback is None else unseen(after_call))(hook, self._model, output)

    def _traced(self, uncached: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the answer inside another graph under construction, where there is no host."""
        wanted = not exporting() and self._uncached_because(args, kwargs)
        if wanted or not self._enabled:
            return uncached(*args, **kwargs)
        return self._engine.carried(args, kwargs)

    def _begun(self, args: Any, kwargs: Any, callback: object) -> _Begun:
        """Begin a call: run the hook around the model, if there is one."""
        model = self._model
        hook = outer_hook(model)
        if hook is not None:
            args, kwargs = before_call(hook, model, args, kwargs)
        serving = self._serving(args, kwargs, callback)
        return _Begun(hook, args, kwargs, serving, own_forward(model) if serving is None else None)

    def _serving(self, args: Any, kwargs: Any, callback: object) -> Serving | None:
        """Return the engine's call; None if the model itself answers."""
        if not self._enabled:
            return None
        reason = self._uncached_because(args, kwargs)
        if reason is not None:
            self._engine.call_log.warn_once(reason)
            self._engine.passed(args, kwargs)
            return None
        return self._engine.serve(
            args, kwargs, Compiler(callback) if callback is not None else NOTHING
        )

    def _uncached_because(self, args: Any, kwargs: Any) -> str | None:
        if self._model.training:
            return "the model is in training mode (call .eval())"
        if requires_grad(self._model, args, kwargs):
            return WANTS_GRADIENTS
        return None

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name in _HOOK:  # its own, and missing
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name in _HOOK or name in _SETTABLE:
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def __repr__(self) -> str:
        return f"CachedModel({self._engine.call_log.strategy.name}, {self._model!r})"

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The model's class, so that `isinstance` works as for the model."""
        return type(self._model)

    @property
    def training(self) -> bool:  # type: ignore[override, misc]
        """The model's own mode."""
        return self._model.training

    def train(self, mode: bool = True) -> CachedModel:
        self._model.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> CachedModel:
        self._model.to(*args, **kwargs)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> CachedModel:
        self._model._apply(*args, **kwargs)
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the model's modules; during `torch.export` also those with the cache's state."""
        yield from super().named_modules(*args, **kwargs)
        if exporting():
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            path = f"{prefix}.cache_state" if prefix else "cache_state"
            for name, module in self.cache_state.named_children():
                yield f"{path}.{name}", module

    @property
    def cache_state(self) -> nn.ModuleDict:
        """Return the modules with the state of an exported program, one for each graph."""
        return self._engine.graphs.carried(self._engine.call_log.tracker.context)

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedModel:
        """Copy the model, cached in the same way, without cached tensors."""
        return _rebuilt(self._rebuild, copy.deepcopy(self._model, memo), self._settings())

    def __copy__(self) -> CachedModel:
        return _rebuilt(self._rebuild, self._model, self._settings())

    def __reduce__(self) -> Any:
        return _rebuilt, (self._rebuild, self._model, self._settings())

    def _settings(self) -> _Settings:
        compiler = self._engine.step_compiler
        options = None if compiler is None else compiler.options
        return _Settings(self._enabled, self._call_log.count.given, options)

    def _captured(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Entry, FlatCall, CallSignature]:
        """Return the graph for a call like this; capture it if there is none."""
        entry, call = self._engine.captured(args, kwargs)
        return entry, call, self._engine.subject.signature

    # --- compiling -----------------------------------------------------------------------------

    def compile_steps(self, **options: Any) -> None:
        """Compile the graph of each kind of step by itself, on its first run.

        A reused step then checks no guards of code that it skips, and with `mode="reduce-overhead"`
        each kind of step is a separate CUDA graph. `torch.compile` of the cached model is
        different: it makes one graph that contains the decision.

        Args:
            options (`Any`):
                The options of `torch.compile`, which raises for those that it does not take. With
                `fullgraph=True` it also raises for a graph that a block breaks; without it, the
                blocks of such a graph are compiled one by one.

        Example:
            >>> cached.compile_steps(fullgraph=True)
        """
        self._engine.step_compiler = StepCompiler(options)

    # --- life cycle ----------------------------------------------------------------------------

    @property
    def _call_log(self) -> CallLog:
        return self._engine.call_log

    def _lowered(self) -> Sequence[Lowered]:
        return self._engine.graphs.all()

    def clear_states(self) -> None:
        """Forget the cached tensors and the place in the generation; keep the graphs."""
        self._engine.clear_states()

    def reset_states(self) -> None:
        """Forget everything, including graphs and counts."""
        self._engine.reset_states()

    def _own_context(self, name: str, more: dict[str, Any]) -> AbstractContextManager[Any] | None:
        own = getattr(self._model, "cache_context", None)  # the model's own hooks may use it
        return own and own(name, **more)  # type: ignore[no-any-return]


class _Settings(NamedTuple):
    """Settings of the user on a cached model, which its copies keep."""

    enabled: bool
    num_steps: int | None
    step_options: dict[str, Any] | None


def _rebuilt(
    rebuild: Callable[[nn.Module], CachedModel], model: nn.Module, settings: _Settings
) -> CachedModel:
    cached = rebuild(model)
    cached._enabled = settings.enabled
    cached.num_steps = settings.num_steps
    if settings.step_options is not None:
        cached.compile_steps(**settings.step_options)
    return cached


def original(model: nn.Module) -> nn.Module:
    """Return the model behind a cached one; any other model as it is."""
    return model._model if isinstance(model, CachedModel) else model


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile(model)` made the model."""
    return hasattr(model, "_orig_mod")
