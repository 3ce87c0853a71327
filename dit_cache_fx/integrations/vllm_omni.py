"""A cache backend for vllm-omni: `CacheBackend` with a session for each request.

In a worker, `register()` adds the backend to vllm-omni under the name "dit_cache_fx". As a plugin
of vllm-omni it runs automatically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

from vllm_omni.diffusion.cache.base import CacheBackend  # type: ignore[import-not-found]

from dit_cache_fx.api import apply_to_pipeline
from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.errors import OptionError
from dit_cache_fx.pipeline import restore_pipeline, transformers_of
from dit_cache_fx.runtime.tracking.session import Session

NAME = "dit_cache_fx"
#: options of `apply` with the same name in vllm-omni's own configuration
_SHARED = ("rel_l1_thresh", "coefficients")


class DitCacheBackend(CacheBackend):  # type: ignore[misc]
    """Caches the transformers of a vllm-omni pipeline.

    A pipeline that runs whole requests is refreshed for each of them. One that runs step by step
    needs no refresh: each request has a session, which is stored in the request's state and freed
    with it. Rows of several requests run as one batch.

    Args:
        config (`Mapping[str, Any] | DiffusionCacheConfig`):
            `strategy` and the options of `dit_cache_fx.apply`, as a mapping or as the configuration
            that vllm-omni made from one.

    Raises:
        OptionError: `config` has no `strategy`.

    Example:
        >>> backend = DitCacheBackend({"strategy": "taylorcache", "computed_steps": 4})
        >>> backend.enable(pipeline)
        >>> backend.refresh(pipeline, num_inference_steps=12)
        >>> backend.disable(pipeline)
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._strategy, self._options = _options(config)

    def enable(self, pipeline: Any) -> None:
        """Cache the pipeline's transformers, for whole requests and for steps.

        Args:
            pipeline (`Any`):
                A pipeline of vllm-omni.

        Raises:
            OptionError: An option has a value that cannot work, or the pipeline has no transformer.
        """
        apply_to_pipeline(pipeline, self._strategy, self._options)
        if hasattr(pipeline, "denoise_step"):
            pipeline.denoise_step = self._stepwise(pipeline, pipeline.denoise_step)
        self.enabled = True

    def disable(self, pipeline: Any) -> None:
        """Restore the original transformers.

        Args:
            pipeline (`Any`):
                A pipeline that `enable` was called with.
        """
        restore_pipeline(pipeline)
        vars(pipeline).pop("denoise_step", None)
        self.enabled = False

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Start a request: forget the state of the one before.

        Args:
            pipeline (`Any`):
                A pipeline that `enable` was called with.
            num_inference_steps (`int`):
                The number of steps of the request; 0 if unknown.
            verbose (`bool`, defaults to `True`):
                Without effect; part of vllm-omni's interface.
        """
        for cached in cached_in(pipeline).values():
            cached.clear_states()
            cached.num_steps = num_inference_steps or None

    # --- step by step ----------------------------------------------------------------------------

    @contextmanager
    def step(self, pipeline: Any, states: Sequence[Any]) -> Iterator[None]:
        """Give calls of the transformers a row for each of these requests, in order.

        Args:
            pipeline (`Any`):
                A pipeline that `enable` was called with.
            states (`Sequence[Any]`):
                The state of each request (vllm-omni's `StepRequestState`).
        """
        with ExitStack() as entered:
            for name, cached in cached_in(pipeline).items():
                sessions = [_session_of(state, name, cached) for state in states]
                one = len(sessions) == 1
                entered.enter_context(sessions[0] if one else cached.batch(sessions))
            yield

    def _stepwise(self, pipeline: Any, denoise_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(input_batch: Any, *, states: Sequence[Any] | None = None, **more: Any) -> Any:
            if not states:
                return denoise_step(input_batch, **more)
            with self.step(pipeline, states):
                return denoise_step(input_batch, states=states, **more)

        return step


def _session_of(state: Any, name: str, cached: CachedModel) -> Session:
    """Return the session of a request for one transformer; the request's state stores it."""
    sessions: dict[str, Session] = state.extra.setdefault(NAME, {})
    if name not in sessions:
        weak = ref(state)
        sessions[name] = cached.new_session()
        sessions[name].timesteps = lambda: getattr(weak(), "timesteps", None)
    return sessions[name]


def cached_in(pipeline: Any) -> dict[str, CachedModel]:
    """Return the cached transformers of a pipeline, by name.

    Args:
        pipeline (`Any`):
            A pipeline of vllm-omni.

    Example:
        >>> DitCacheBackend({"strategy": "taylorcache", "computed_steps": 4}).enable(pipeline)
        >>> reports = {name: model.cache_report() for name, model in cached_in(pipeline).items()}
    """
    found = transformers_of(pipeline)
    return {name: model for name, model in found.items() if isinstance(model, CachedModel)}


def register() -> None:
    """Add the backend to those that vllm-omni's configuration can name.

    For whole requests, use `cache_backend="dit_cache_fx"` with the options as `cache_config`. For
    execution by steps, which vllm-omni refuses with any named backend, name none and pass the
    options as `cache_config={"dit_cache_fx": {...}}`.

    Example:
        >>> register()
    """
    from vllm_omni.diffusion.worker import diffusion_model_runner as runner  # type: ignore

    known = runner.get_cache_backend
    if getattr(known, "of", None) is not None:  # it is registered already
        return

    def get_cache_backend(name: str | None, config: Any) -> Any:
        if name == NAME:
            return DitCacheBackend(config)
        own = _mapping(config).get(NAME) if name in (None, "none") else None
        return known(name, config) if own is None else DitCacheBackend(own)

    get_cache_backend.of = known  # type: ignore[attr-defined]
    runner.get_cache_backend = get_cache_backend


def _options(config: Any) -> tuple[Any, dict[str, Any]]:
    options = dict(_mapping(config))
    strategy = options.pop("strategy", None)
    if strategy is None:
        raise OptionError("strategy", None, "the config's strategy, such as 'taylorcache'")
    if not isinstance(config, Mapping):
        given = {name: getattr(config, name, None) for name in _SHARED}
        options.update((name, value) for name, value in given.items() if value is not None)
    return strategy, options


def _mapping(config: Any) -> Mapping[str, Any]:
    """Return the options that are not vllm-omni's own."""
    found = config if isinstance(config, Mapping) else getattr(config, "_extra_params", None)
    return found if isinstance(found, Mapping) else {}
